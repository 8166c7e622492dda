import itertools

import numpy as np
import pytest

from based_jax.data.segments import LengthSegment
from based_jax.data.state_tracking import GROUPS, PRESETS, StateTrackingConfig, products, state_tracking
from based_jax.errors import UserError


@pytest.mark.parametrize("group, size, things", [("parity", 2, 2), ("s3", 6, 3), ("a5", 60, 5), ("s5", 120, 5)])
def test_labels_follow_the_things_that_the_inputs_move(group, size, things):
    assert len(GROUPS[group]) == size
    inputs, labels = state_tracking(group, 20, 40, seed=4)
    for row, expected in zip(inputs.tolist(), labels.tolist(), strict=True):
        places = list(range(things))  # where each thing is
        for element, label in zip(row, expected, strict=True):
            places = [GROUPS[group][element][place] for place in places]
            assert GROUPS[group][label] == tuple(places)


def test_parity_counts_ones():
    inputs, labels = state_tracking("parity", 50, 33, seed=0)
    np.testing.assert_array_equal(labels, np.cumsum(inputs, axis=1) % 2)


def test_a5_holds_products_of_two_swaps():
    def swap(a, b):
        return tuple({a: b, b: a}.get(i, i) for i in range(5))

    pairs = itertools.product(itertools.combinations(range(5), 2), repeat=2)
    twice = {tuple(swap(*second)[i] for i in swap(*first)) for first, second in pairs}
    assert twice <= set(GROUPS["a5"])


@pytest.mark.parametrize("group", GROUPS)
def test_the_products_are_those_of_a_group(group):
    table = products(GROUPS[group])
    elements = np.arange(len(table))
    np.testing.assert_array_equal(table[0], elements)
    np.testing.assert_array_equal(table[:, 0], elements)
    assert (np.sort(table, axis=0) == elements[:, None]).all() and (np.sort(table, axis=1) == elements).all()
    a, b, c = np.random.default_rng(0).integers(len(table), size=(3, 500))
    np.testing.assert_array_equal(table[table[a, b], c], table[a, table[b, c]])
    assert (table == table.T).all() == (group == "parity")


def test_tests_are_longer_than_training():
    for task in PRESETS.values():
        assert max(segment.seq_len for segment in task.test) > max(segment.seq_len for segment in task.train)


@pytest.mark.parametrize(
    "changes, message", [({"group": "s55"}, "did you mean 's5'"), ({"test": (LengthSegment(1, 0),)}, "seq_len 0")]
)
def test_bad_values_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        StateTrackingConfig(**{"train": PRESETS["tiny"].train, "test": (), **changes})
