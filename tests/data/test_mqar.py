"""MQAR: bit-exact with the reference, and properties of the task."""

import json
from pathlib import Path

import numpy as np
import pytest

from based_jax.data.mqar import PRESETS, MqarConfig, MqarSegment, mqar
from based_jax.data.segments import SegmentSource, segment_seeds
from based_jax.errors import UserError
from based_jax.labels import NO_LABEL

PARITY = Path(__file__).parent.parent / "parity"


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


def oracle(vocab_size, num_examples, seq_len, num_kv_pairs, seed, power_a):
    """The reference's procedure, one numpy call a row."""
    rng = np.random.RandomState(seed)
    half, space = vocab_size // 2, (seq_len - 2 * num_kv_pairs) // 2
    rows = range(num_examples)
    keys = [rng.choice(np.arange(1, half), size=num_kv_pairs, replace=False) for _ in rows]
    values = [rng.choice(np.arange(half, vocab_size), size=num_kv_pairs, replace=False) for _ in rows]
    p = power_a * np.arange(1, space + 1) ** (power_a - 1)
    gaps = [rng.choice(space, size=num_kv_pairs, replace=False, p=p / p.sum()) for _ in rows]
    inputs, labels = np.zeros((num_examples, seq_len), int), np.full((num_examples, seq_len), NO_LABEL)
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
        queries = np.flatnonzero(targets != NO_LABEL)
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
    figure2 = PRESETS["figure2"]
    assert [segment.name for segment in figure2.train] == ["64x4", "128x8", "256x16", "256x32", "256x64"]
    assert sum(segment.num_examples for segment in figure2.train) == 180_000
    assert SegmentSource(figure2, 256).steps_per_epoch == 707
    assert SegmentSource(figure2, 256).eval_names[-1] == "1024x256"


def test_a_segment_is_generated_from_its_seed():
    tiny = PRESETS["tiny"]
    seeds = segment_seeds(tiny.seed, 2, 2)
    for own, expected in zip(tiny.generate("train", 1), mqar(64, 21, 32, 4, seeds[0][1]), strict=True):
        np.testing.assert_array_equal(own, expected)
    for own, expected in zip(tiny.generate("test", 0), mqar(64, 10, 16, 2, seeds[1][0]), strict=True):
        np.testing.assert_array_equal(own, expected)


def test_a_config_checks_every_segment():
    with pytest.raises(UserError, match="seq_len 15"):
        MqarConfig(train=(MqarSegment(1, 16, 2),), test=(MqarSegment(1, 15, 2),))
