"""Segments: what holds for every synthetic task, and batches as pure functions of the step."""

import dataclasses
import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from based_jax.data import mqar
from based_jax.data.segments import SegmentSource, segment_seeds
from based_jax.errors import UserError
from based_jax.labels import NO_LABEL

PARITY = Path(__file__).parent.parent / "parity"
TINY = mqar.PRESETS["tiny"]
MODULES = (
    "compositional_mqar",
    "compression",
    "forgetting_mqar",
    "in_context_ngram",
    "induction_heads",
    "memorization",
    "mqar",
    "needle",
    "selective_copying",
    "state_tracking",
)
EVERY_TASK = pytest.mark.parametrize("module", MODULES)


def presets(module):
    return importlib.import_module(f"based_jax.data.{module}").PRESETS


def all_examples(task):
    return [task.generate(split, index) for split in ("train", "test") for index in range(len(getattr(task, split)))]


def same(a, b):
    return all(np.array_equal(x, y) for pair in zip(a, b, strict=True) for x, y in zip(*pair, strict=True))


@EVERY_TASK
def test_examples_are_ids_of_the_shape_that_the_segment_says(module):
    task = presets(module)["tiny"]
    for segment, (inputs, labels) in zip(task.train + task.test, all_examples(task), strict=True):
        assert inputs.shape == labels.shape == (segment.num_examples, segment.seq_len)
        assert inputs.dtype == labels.dtype == np.int32
        assert inputs.min() >= 0 and inputs.max() < task.vocab_size
        asked = labels[labels != NO_LABEL]
        assert len(asked) and asked.min() >= 0 and asked.max() < task.vocab_size


def test_all_examples_are_made_at_once_and_each_once():
    asked = []

    def starmap(generate, keys):
        asked.extend(keys)
        return [generate(*key) for key in keys]

    source = SegmentSource(TINY, 4)
    source.examples("train", 1)
    source.make_all(starmap)
    assert asked == [("train", 0), ("test", 0), ("test", 1)]
    made = [source.examples(split, i) for split in ("train", "test") for i in range(2)]
    assert same(made, all_examples(TINY))


@EVERY_TASK
def test_examples_depend_on_the_task_alone(module):
    task = presets(module)["tiny"]
    np.random.seed(1)
    first = all_examples(task)
    np.random.seed(2)
    assert same(first, all_examples(dataclasses.replace(task)))
    assert not same(first, all_examples(dataclasses.replace(task, seed=task.seed + 1)))


@EVERY_TASK
def test_training_and_test_differ(module):
    task = presets(module)["tiny"]
    task = dataclasses.replace(task, train=task.test)
    for index, segment in enumerate(task.test):
        (seen, _), (new, _) = task.generate("train", index), task.generate("test", index)
        assert seen.shape == new.shape and (seen != new).any(), segment.name


@EVERY_TASK
def test_test_segments_have_names_and_are_checked(module):
    for task in presets(module).values():
        names = [segment.name for segment in task.test]
        assert len(set(names)) == len(names)
    for changes, message in [
        ({"test": (task.test[0], task.test[0])}, "distinct test segments"),
        ({"train": ()}, "needs a training segment"),
        ({"train": (dataclasses.replace(task.train[0], num_examples=0),)}, "at least 1 example in a segment, not 0"),
        ({"seed": -1}, "seed -1"),
        ({"seed": 2**32}, "seed 4294967296"),
    ]:
        with pytest.raises(UserError, match=message):
            dataclasses.replace(task, **changes)
    with pytest.raises(UserError, match="Unknown split 'validation'"):
        task.generate("validation", 0)


def test_importing_all_of_them_is_light():
    heavy = ("jax", "tensorflow", "tensorflow_datasets", "grain")
    names = ", ".join(f"based_jax.data.{module}" for module in MODULES)
    code = f"import sys, {names}; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_segment_seeds_equal_the_reference():
    reference = json.loads((PARITY / "mqar_segment_seeds.json").read_text())
    train, test = segment_seeds(reference["seed"], 5, 7)
    assert train == reference["train_segment_seeds"]
    assert test == reference["test_segment_seeds"]


def test_an_epoch_reads_the_segments_in_order():
    source = SegmentSource(TINY, batch_size=8)
    batches = [source.batch(step) for step in range(source.steps_per_epoch)]
    assert [batch["inputs"].shape for batch in batches] == 7 * [(8, 16)] + 3 * [(8, 32)]
    short = batches[:7]
    seed = segment_seeds(TINY.seed, 2, 2)[0][0]
    inputs, labels = mqar.mqar(64, 50, 16, 2, seed)
    np.testing.assert_array_equal(np.concatenate([batch["inputs"] for batch in short])[:50], inputs)
    np.testing.assert_array_equal(np.concatenate([batch["labels"] for batch in short])[:50], labels)
    assert (short[-1]["labels"][2:] == NO_LABEL).all() and (short[-1]["labels"][:2] != NO_LABEL).any()
    np.testing.assert_array_equal(source.batch(source.steps_per_epoch)["inputs"], batches[0]["inputs"])


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_batch_depends_on_the_step_alone(shuffle):
    source = SegmentSource(TINY, batch_size=8, shuffle=shuffle)
    in_order = [source.batch(step) for step in range(25)]
    fresh = SegmentSource(TINY, batch_size=8, shuffle=shuffle)
    for step in (24, 3, 17, 3):
        for key, array in fresh.batch(step).items():
            np.testing.assert_array_equal(array, in_order[step][key])


def test_shuffling_reads_every_example_once_in_a_new_order():
    plain, shuffled = SegmentSource(TINY, 8), SegmentSource(TINY, 8, shuffle=True)
    steps = plain.steps_per_epoch

    def examples(source, epoch):
        batches = [source.batch(step) for step in range(epoch * steps, (epoch + 1) * steps)]
        return [row.tobytes() for batch in batches for row in np.stack(list(batch.values()), axis=1)]

    assert examples(plain, 0) == examples(plain, 1)
    assert examples(shuffled, 0) != examples(shuffled, 1)
    assert sorted(examples(shuffled, 0)) == sorted(examples(shuffled, 1)) == sorted(examples(plain, 0))


@pytest.mark.parametrize("rows", [[0, 1, 2, 3], [2, 3, 6, 7], [5]])
def test_hosts_feed_their_rows_of_the_single_batch(rows):
    single, host = SegmentSource(TINY, 8, shuffle=True), SegmentSource(TINY, 8, shuffle=True, rows=rows)
    for step in range(single.steps_per_epoch):
        own = host.batch(step)
        for key, array in single.batch(step).items():
            np.testing.assert_array_equal(own[key], array[rows])


def test_eval_reads_each_test_segment_once():
    source = SegmentSource(TINY, batch_size=4)
    assert source.eval_names == ("16x2", "32x4")
    batches = list(source.eval_batches("32x4"))
    assert [batch["inputs"].shape for batch in batches] == 3 * [(4, 32)]
    labels = mqar.mqar(64, 11, 32, 4, segment_seeds(TINY.seed, 2, 2)[1][1])[1]
    np.testing.assert_array_equal(np.concatenate([batch["labels"] for batch in batches])[:11], labels)
    assert (batches[-1]["labels"][3:] == NO_LABEL).all()
    with pytest.raises(UserError, match="did you mean '32x4'"):
        next(source.eval_batches("32x8"))


def test_a_batch_is_the_rows_that_the_order_names():
    source = SegmentSource(TINY, 8, shuffle=True)
    for epoch in (0, 3):
        order = source.order(epoch)
        assert len(order) == source.steps_per_epoch
        for position, (index, rows) in enumerate(order):
            batch = source.batch(epoch * source.steps_per_epoch + position)
            for own, examples in zip(batch.values(), source.examples("train", index), strict=True):
                np.testing.assert_array_equal(own[: len(rows)], examples[rows])


def test_examples_are_made_once():
    source = SegmentSource(TINY, 8)
    assert source.examples("train", 0)[0] is source.examples("train", 0)[0]
    assert source.examples("train", 0)[0] is not source.examples("test", 0)[0]
