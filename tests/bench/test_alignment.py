"""Names that were recorded beside those of the program that ran, with every defect that a recording has."""

import random

import pytest

from based_jax.bench.alignment import aligned

LAYERS, RUNS = 12, 3
LAYER = "norm", "call", "scale", "call", "call", "add", "never", "call"
PROGRAM = ["begin", *(name if name == "call" else f"{name}{i % 2}" for i in range(LAYERS) for name in LAYER), "end"]
EXPECTED = {name: [i for i, other in enumerate(PROGRAM) if other == name] for name in PROGRAM}
CALLS, NORMS = EXPECTED["call"], EXPECTED["norm0"]
ONE_RUN = [i for i, name in enumerate(PROGRAM) if not name.startswith("never")]


def found(places, names=None, runs=RUNS):
    """Return what is found of the runs whose places were recorded, where names say other ones for some of them."""
    given = names or {}
    return aligned([given.get(i, PROGRAM[place]) for i, place in enumerate(places)], EXPECTED, len(PROGRAM), runs)


def near(found, places, most=1):
    """Return whether all is bound, to the right place or the one next to it."""
    return all(a is not None and abs(a - b) <= most for a, b in zip(found, places, strict=True))


def test_what_is_whole_is_bound_by_its_order():
    assert found(ONE_RUN * RUNS) == ONE_RUN * RUNS
    assert found(ONE_RUN, runs=1) == ONE_RUN
    twice = [i for i in ONE_RUN for _ in range(1 + (PROGRAM[i] == "call"))]
    assert found(twice * RUNS) == twice * RUNS


@pytest.mark.parametrize("dropped", [CALLS[0], CALLS[17], CALLS[-1], NORMS[0], NORMS[3], 0])
def test_what_is_missing_shifts_no_other(dropped):
    fewer = [i for i in ONE_RUN if i != dropped]
    assert near(found(fewer * RUNS), fewer * RUNS)
    once = [*ONE_RUN, *fewer, *ONE_RUN]
    assert near(found(once), once)


@pytest.mark.parametrize("again", [CALLS[0], CALLS[18], CALLS[-1], NORMS[4]])
def test_what_is_too_many_is_left_alone(again):
    more = [i for place in ONE_RUN for i in [place] * (2 if place == again else 1)]
    result = found(more * RUNS)
    assert result.count(None) == RUNS
    bound = [(a, b) for a, b in zip(result, more * RUNS, strict=True) if a is not None]
    assert near(*zip(*bound, strict=True))


def test_what_runs_beside_one_another_is_found_in_either_order():
    rng = random.Random(0)
    mixed = [i for _ in range(RUNS) for i in sorted(ONE_RUN, key=lambda i: i + rng.uniform(0, 3))]
    assert near(found(mixed), mixed, most=3)
    fewer = [i for i in mixed if i != CALLS[20]]
    assert near(found(fewer), fewer, most=4)


def test_runs_that_recorded_a_name_equally_often_agree():
    rng = random.Random(1)
    runs = [[i for i in sorted(ONE_RUN, key=lambda i: i + rng.uniform(0, 2)) if i != CALLS[9]] for _ in range(RUNS)]
    places = [place for run in runs for place in run]
    calls = [a for a, place in zip(found(places), places, strict=True) if PROGRAM[place] == "call"]
    each = len(calls) // RUNS
    assert calls[:each] == calls[each : 2 * each] == calls[2 * each :]


def test_names_that_nothing_goes_by_or_that_nothing_places_are_left_alone():
    middle = len(ONE_RUN) + 5
    assert found(ONE_RUN * RUNS, {middle: None})[middle] is None
    assert found(ONE_RUN * RUNS, {middle: "memset"})[middle] is None
    assert found(CALLS[1:]) == [None] * (len(CALLS) - 1) and found([]) == []
