"""MQAR: bit-exact with the reference, properties of the task, and batches as pure functions of the step."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from based_jax.data.mqar import IGNORE, PRESETS, MqarConfig, MqarSource, Segment, get_preset, mqar, segment_seeds
from based_jax.errors import UserError

PARITY = Path(__file__).parent.parent / "parity"
TINY = PRESETS["tiny"]


@pytest.mark.parametrize("name", ["mqar_s", "mqar_fig2_64_4"])
def test_equals_the_reference(name):
    with np.load(PARITY / f"{name}.npz") as reference:
        meta = json.loads(str(reference["meta"]))
        plain, labels = reference["out.inputs_plain"], reference["out.labels"]
    shape = [meta[key] for key in ("vocab_size", "num_examples", "input_seq_len", "num_kv_pairs", "seed")]
    inputs, own_labels = mqar(*shape, random_non_queries=False)
    np.testing.assert_array_equal(inputs, plain)
    np.testing.assert_array_equal(own_labels, labels)
    filled, filled_labels = mqar(*shape)
    np.testing.assert_array_equal(filled[plain != 0], plain[plain != 0])
    np.testing.assert_array_equal(filled_labels, labels)


def test_segment_seeds_equal_the_reference():
    reference = json.loads((PARITY / "mqar_segment_seeds.json").read_text())
    train, test = segment_seeds(reference["seed"], 5, 7)
    assert train == reference["train_segment_seeds"]
    assert test == reference["test_segment_seeds"]


def oracle(vocab_size, num_examples, seq_len, num_kv_pairs, seed, power_a):
    """The reference's procedure, one numpy call a row."""
    rng = np.random.RandomState(seed)
    half, space = vocab_size // 2, (seq_len - 2 * num_kv_pairs) // 2
    rows = range(num_examples)
    keys = [rng.choice(np.arange(1, half), size=num_kv_pairs, replace=False) for _ in rows]
    values = [rng.choice(np.arange(half, vocab_size), size=num_kv_pairs, replace=False) for _ in rows]
    p = power_a * np.arange(1, space + 1) ** (power_a - 1)
    gaps = [rng.choice(space, size=num_kv_pairs, replace=False, p=p / p.sum()) for _ in rows]
    inputs, labels = np.zeros((num_examples, seq_len), int), np.full((num_examples, seq_len), IGNORE)
    for row in rows:
        for pair in range(num_kv_pairs):
            inputs[row, 2 * pair : 2 * pair + 2] = keys[row][pair], values[row][pair]
            query = 2 * num_kv_pairs + 2 * gaps[row][pair]
            inputs[row, query], labels[row, query] = keys[row][pair], values[row][pair]
    return inputs, labels


@pytest.mark.parametrize(
    "vocab_size, num_examples, seq_len, num_kv_pairs, power_a",
    [
        (8192, 40, 256, 64, 0.01),  # as many gaps as there is space
        (8192, 40, 64, 4, 0.01),
        (9, 30, 8, 2, 0.01),
        (5, 20, 4, 1, 0.01),  # one gap
        (67, 1500, 32, 8, 0.01),  # several chains, an odd vocabulary
        (64, 1100, 62, 15, 0.5),
        (300, 30, 256, 1, 2.0),
    ],
)
@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1])
def test_equals_row_by_row_sampling(vocab_size, num_examples, seq_len, num_kv_pairs, power_a, seed):
    arguments = (vocab_size, num_examples, seq_len, num_kv_pairs, seed, power_a)
    expected_inputs, expected_labels = oracle(*arguments)
    inputs, labels = mqar(*arguments, random_non_queries=False)
    np.testing.assert_array_equal(inputs, expected_inputs)
    np.testing.assert_array_equal(labels, expected_labels)


def test_every_query_asks_for_its_own_value():
    inputs, labels = mqar(128, 50, 64, 8, seed=3)
    assert inputs.dtype == labels.dtype == np.int32
    assert (inputs >= 0).all() and (inputs < 128).all() and (inputs[:, 16:] != 0).mean() > 0.9
    for row, targets in zip(inputs, labels, strict=True):
        pairs = dict(zip(row[0:16:2], row[1:16:2], strict=True))
        queries = np.flatnonzero(targets != IGNORE)
        assert len(pairs) == len(queries) == 8
        assert [pairs[row[q]] for q in queries] == targets[queries].tolist()


def test_filler_depends_on_the_seed_alone():
    np.testing.assert_array_equal(mqar(64, 20, 32, 4, seed=5)[0], mqar(64, 20, 32, 4, seed=5)[0])
    assert (mqar(64, 20, 32, 4, seed=5)[0] != mqar(64, 20, 32, 4, seed=6)[0]).any()


@pytest.mark.parametrize(
    "arguments, named",
    [
        ((64, 0, 32, 4, 0), "0"),
        ((64, 5, 32, 0, 0), "1 pair"),
        ((64, 5, 31, 4, 0), "31"),
        ((64, 5, 32, 9, 0), "9"),
        ((32, 5, 32, 4, 0), "vocab_size 32"),
        ((64, 5, 32, 4, -1), "seed -1"),
    ],
)
def test_bad_values_are_named(arguments, named):
    with pytest.raises(UserError, match=named):
        mqar(*arguments)


def test_presets():
    figure2 = get_preset("figure2")
    assert [segment.name for segment in figure2.train] == ["64x4", "128x8", "256x16", "256x32", "256x64"]
    assert sum(segment.num_examples for segment in figure2.train) == 180_000
    assert MqarSource(figure2, 256).steps_per_epoch == 707
    assert MqarSource(figure2, 256).eval_names[-1] == "1024x256"
    with pytest.raises(UserError, match="did you mean 'figure2'"):
        get_preset("figure3")
    with pytest.raises(UserError, match="distinct test segments"):
        MqarConfig(train=TINY.train, test=(Segment(1, 16, 2), Segment(2, 16, 2)))


def test_an_epoch_reads_the_segments_in_order():
    source = MqarSource(TINY, batch_size=8)
    batches = [source.batch(step) for step in range(source.steps_per_epoch)]
    assert [batch["inputs"].shape for batch in batches] == 7 * [(8, 16)] + 3 * [(8, 32)]
    short = batches[:7]
    seed = segment_seeds(TINY.seed, 2, 2)[0][0]
    inputs, labels = mqar(64, 50, 16, 2, seed)
    np.testing.assert_array_equal(np.concatenate([batch["inputs"] for batch in short])[:50], inputs)
    np.testing.assert_array_equal(np.concatenate([batch["labels"] for batch in short])[:50], labels)
    assert (short[-1]["labels"][2:] == IGNORE).all() and (short[-1]["labels"][:2] != IGNORE).any()
    np.testing.assert_array_equal(source.batch(source.steps_per_epoch)["inputs"], batches[0]["inputs"])


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_batch_depends_on_the_step_alone(shuffle):
    source = MqarSource(TINY, batch_size=8, shuffle=shuffle)
    in_order = [source.batch(step) for step in range(25)]
    fresh = MqarSource(TINY, batch_size=8, shuffle=shuffle)
    for step in (24, 3, 17, 3):
        for key, array in fresh.batch(step).items():
            np.testing.assert_array_equal(array, in_order[step][key])


def test_shuffling_reads_every_example_once_in_a_new_order():
    plain, shuffled = MqarSource(TINY, 8), MqarSource(TINY, 8, shuffle=True)
    steps = plain.steps_per_epoch

    def examples(source, epoch):
        batches = [source.batch(step) for step in range(epoch * steps, (epoch + 1) * steps)]
        return [row.tobytes() for batch in batches for row in np.stack(list(batch.values()), axis=1)]

    assert examples(plain, 0) == examples(plain, 1)
    assert examples(shuffled, 0) != examples(shuffled, 1)
    assert sorted(examples(shuffled, 0)) == sorted(examples(shuffled, 1)) == sorted(examples(plain, 0))


@pytest.mark.parametrize("process_count", [2, 4])
def test_hosts_concatenate_to_the_single_batch(process_count):
    single = MqarSource(TINY, 8, shuffle=True)
    hosts = [
        MqarSource(TINY, 8, shuffle=True, process_index=i, process_count=process_count) for i in range(process_count)
    ]
    for step in range(single.steps_per_epoch):
        parts = [host.batch(step) for host in hosts]
        for key, array in single.batch(step).items():
            np.testing.assert_array_equal(np.concatenate([part[key] for part in parts]), array)
    with pytest.raises(UserError, match="batch_size 9"):
        MqarSource(TINY, 9, process_count=2)


def test_eval_reads_each_test_segment_once():
    source = MqarSource(TINY, batch_size=4)
    assert source.eval_names == ("16x2", "32x4")
    batches = list(source.eval_batches("32x4"))
    assert [batch["inputs"].shape for batch in batches] == 3 * [(4, 32)]
    labels = mqar(64, 11, 32, 4, segment_seeds(TINY.seed, 2, 2)[1][1])[1]
    np.testing.assert_array_equal(np.concatenate([batch["labels"] for batch in batches])[:11], labels)
    assert (batches[-1]["labels"][3:] == IGNORE).all()
    with pytest.raises(UserError, match="did you mean '32x4'"):
        next(source.eval_batches("32x8"))


def test_importing_mqar_is_light():
    heavy = ("jax", "tensorflow", "tensorflow_datasets", "grain")
    code = f"import sys, based_jax.data.mqar; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
