"""The reduction from rows to configurations."""

import math

import pytest
from helpers import synthetic_rows as synthetic

from based_jax.pictures.configurations import by_feature_map, configurations, front

BASED = [synthetic.CONV, ("taylor", {"num_heads": 1, "feature_dim": 16})]


def test_best_takes_the_best_rate_of_each_seed_then_the_median():
    accuracies = {0: [0.1, 0.7, 0.2], 1: [0.9, 0.3, 0.2], 2: [0.4, 0.5, 0.6]}
    rows = [
        synthetic.row(BASED, 64, lr=10.0 ** (i - 3), seed=seed, accuracy=value)
        for seed, values in accuracies.items()
        for i, value in enumerate(values)
    ]
    [point] = configurations(rows)
    assert (point.low, point.median, point.high) == (0.6, 0.7, 0.9)
    assert (point.row["config"]["optim"]["lr"], point.row["config"]["seed"]) == (1e-2, 0)
    assert len(point.chosen) == 3 and len(point.rows) == 9
    assert (point.family, point.label) == ("Based", "D 64, K 16")
    assert [point.state_bytes(convolution=x) for x in (False, True)] == [39_780, 40_548]


def test_an_even_number_of_seeds_has_its_median_between_two():
    [point] = configurations([synthetic.row(BASED, 64, seed=seed, accuracy=seed / 10) for seed in range(4)])
    assert point.median == pytest.approx(0.15) and point.row["accuracy"] == 0.1


def test_what_differs_in_anything_else_is_another_configuration():
    rows = synthetic.rows(seeds=2)
    heavier = [{**row, "config": row["config"] | {"epochs": 64}} for row in rows]
    architectures = len(list(synthetic.architectures()))
    assert len(configurations(rows)) == architectures
    assert len(configurations(rows + heavier)) == 2 * architectures


@pytest.mark.parametrize("value", [None, math.nan])
def test_a_run_without_accuracy_counts_as_nothing_answered(value):
    lost = synthetic.row(BASED, 64, lr=1e-1, accuracy=0.5) | {"accuracy": value, "status": "diverged"}
    [point] = configurations([lost])
    assert point.median == 0
    [point] = configurations([lost, synthetic.row(BASED, 64, accuracy=0.2)])
    assert point.median == 0.2


def test_the_front_is_what_nothing_smaller_beats():
    assert front([(4, 0.5), (1, 0.2), (2, 0.6), (2, 0.3), (8, 0.6), (16, 0.9)]) == [(1, 0.2), (2, 0.6), (16, 0.9)]


def test_of_several_models_with_a_map_at_a_width_the_best_counts():
    taylor = ("taylor", {"num_heads": 1, "feature_dim": 16})
    stacks = {0.2: [taylor, taylor], 0.9: [synthetic.CONV, taylor], 0.4: [taylor]}
    points = configurations([synthetic.row(layers, 64, accuracy=value) for value, layers in stacks.items()])
    assert {key: [x.median for x in line] for key, line in by_feature_map(points).items()} == {
        ("Taylor, 2nd order", "K = 16"): [0.9]
    }
