"""The reduction from rows to configurations."""

import math

import pytest
from helpers import synthetic_rows as synthetic

from based_jax.errors import UserError
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


DIVERGED = ({"accuracy": None}, {"accuracy": math.nan}, {"status": "diverged"}, {"diverged": True})


@pytest.mark.parametrize("change", DIVERGED, ids=str)
def test_a_run_that_diverged_has_no_accuracy_and_is_counted(change):
    lost = synthetic.row(BASED, 64, lr=1e-1, accuracy=0.5) | change
    [point] = configurations([lost])
    assert math.isnan(point.median) and (point.diverged_runs, point.diverged_seeds) == (1, 1)
    [point] = configurations([lost, synthetic.row(BASED, 64, accuracy=0.2), synthetic.row(BASED, 64, seed=1) | change])
    assert point.median == point.low == 0.2 and (point.diverged_runs, point.diverged_seeds) == (2, 1)


def test_rows_of_several_tasks_or_tests_are_refused():
    row = synthetic.row(BASED, 64)
    of_task = {
        kind: row | {"config": row["config"] | {"data": {"kind": kind, "seq_len": length}}}
        for kind, length in (("mqar", 1024), ("text", 1024))
    }
    shorter = row | {"config": row["config"] | {"data": {"seq_len": 64}}}
    for other, sentence in (
        (of_task["text"], "different tasks, 'mqar' and 'text'; a picture is of one"),
        (row | {"segments": {"64x4": 1.0}}, "were tested on different segments"),
        (shorter, "'1,024 tokens' and '64 tokens'"),
    ):
        with pytest.raises(UserError, match=sentence):
            configurations([of_task["mqar"], other])
    untold = of_task["mqar"] | {"segments": {}, "diverged": True}
    assert len(configurations([of_task["mqar"], untold])) == 1


def test_a_feature_map_that_diverged_at_a_width_is_a_gap():
    maps = [synthetic.row([synthetic.CONV, ("linear", {"num_heads": 1, "feature_dim": 16})], d) for d in (64, 128, 256)]
    [line] = by_feature_map(configurations([maps[0], maps[1] | {"accuracy": None}, maps[2]])).values()
    assert [math.isnan(x.median) for x in line] == [False, True, False]


def test_the_front_is_what_nothing_smaller_beats():
    assert front([(4, 0.5), (1, 0.2), (2, 0.6), (2, 0.3), (8, 0.6), (16, 0.9)]) == [(1, 0.2), (2, 0.6), (16, 0.9)]


def test_of_several_models_with_a_map_at_a_width_the_best_counts():
    taylor = ("taylor", {"num_heads": 1, "feature_dim": 16})
    stacks = {0.2: [taylor, taylor], 0.9: [synthetic.CONV, taylor], 0.4: [taylor]}
    points = configurations([synthetic.row(layers, 64, accuracy=value) for value, layers in stacks.items()])
    assert {key: [x.median for x in line] for key, line in by_feature_map(points).items()} == {
        ("Taylor, 2nd order", "K = 16"): [0.9]
    }
