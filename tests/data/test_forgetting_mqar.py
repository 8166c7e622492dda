import numpy as np
import pytest

from based_jax.data.forgetting_mqar import PRESETS, ForgettingMqarConfig, ForgettingMqarSegment, forgetting_mqar, owners
from based_jax.data.mqar import mqar
from based_jax.errors import UserError
from based_jax.labels import NO_LABEL


@pytest.mark.parametrize("random_non_queries", [False, True])
@pytest.mark.parametrize(
    "vocab_size, seq_len, num_kv_pairs, num_updates",
    [(8192, 64, 4, 4), (64, 32, 4, 8), (64, 48, 1, 20), (129, 128, 16, 32), (64, 16, 4, 0)],
)
def test_labels_are_the_latest_values(vocab_size, seq_len, num_kv_pairs, num_updates, random_non_queries):
    sizes = (vocab_size, 60, seq_len, num_kv_pairs, num_updates)
    inputs, labels = forgetting_mqar(*sizes, seed=4, random_non_queries=random_non_queries)
    context = 2 * (num_kv_pairs + num_updates)
    for row, expected in zip(inputs.tolist(), labels.tolist(), strict=True):
        memory, asked = {}, []
        for position in range(0, context, 2):
            memory[row[position]] = row[position + 1]
        for position, label in enumerate(expected):
            if label != NO_LABEL:
                assert position >= context and memory[row[position]] == label
                asked.append(row[position])
        assert len(memory) == num_kv_pairs and sorted(asked) == sorted(memory)
        assert len(set(row[1:context:2])) == num_kv_pairs + num_updates
        assert all(1 <= key < vocab_size // 2 for key in memory)


def test_stale_values_are_wrong_where_keys_were_rewritten():
    inputs, labels = forgetting_mqar(256, 300, 64, 4, 12, seed=0)
    wrong = 0
    for row, expected in zip(inputs.tolist(), labels.tolist(), strict=True):
        first = {}
        for position in range(0, 32, 2):
            first.setdefault(row[position], row[position + 1])
        wrong += sum(label not in (NO_LABEL, first.get(token)) for token, label in zip(row, expected, strict=True))
    assert wrong > 0.6 * 4 * 300


def test_without_updates_it_is_mqar():
    for own, plain in zip(forgetting_mqar(64, 70, 32, 4, 0, seed=5), mqar(64, 70, 32, 4, seed=5), strict=True):
        np.testing.assert_array_equal(own, plain)


def test_updates_come_after_their_key_and_all_over_the_context():
    owner = owners(np.random.default_rng(0), 2000, 3, 5)
    for row in owner.tolist():
        known = 0
        for key in row:
            assert key <= known
            known = max(known, key + 1)
        assert known == 3
    updated = np.array([[key in row[:i] for i, key in enumerate(row)] for row in owner.tolist()])
    assert not updated[:, 0].any()
    np.testing.assert_allclose(updated[:, 1:].mean(axis=0), 5 / 7, atol=0.05)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"vocab_size": 32}, "vocab_size 32"),
        ({"test": (ForgettingMqarSegment(1, 16, 2, 5),)}, "seq_len 16"),
        ({"test": (ForgettingMqarSegment(1, 17, 2, 2),)}, "seq_len 17"),
        ({"test": (ForgettingMqarSegment(1, 16, 0, 2),)}, "num_kv_pairs 0"),
        ({"test": (ForgettingMqarSegment(1, 16, 2, -1),)}, "num_updates -1"),
    ],
)
def test_bad_values_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        ForgettingMqarConfig(**{"train": PRESETS["tiny"].train, "test": (), **changes})
