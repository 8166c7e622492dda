"""What was recorded of a program that ran several times beside what it runs: two sequences of names, with defects.

A name that was recorded as often as it is expected is bound by its order. Those bound so tell how far the program was
at each time; a name of which some are missing or too many is bound by that, in order, each to the nearest place.
"""

import bisect
import collections
import statistics
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

NEIGHBOURS = 2
"""On each side whose median stands for a place: what runs beside one another is recorded in either order."""
ALONE = 8.0
"""What it costs to leave a place or what was recorded alone, in places between two that are bound to each other."""


def aligned(
    recorded: Sequence[str | None], expected: Mapping[str, Sequence[int]], length: int, runs: int
) -> list[int | None]:
    """Return the place in a run of each name that was recorded; None where it cannot be told.

    Args:
      recorded: the names, in the order of their starts; None for one that is not known.
      expected: the places in a run that go by each name, in order.
      length: how many places a run has.
      runs: that were recorded, one after the other.
    """
    found: dict[int, int] = {}
    unsure = []
    for name, where in _by_name(recorded).items():
        every = [run * length + place for run in range(runs) for place in expected.get(name, ())]
        each, rest = divmod(len(where), max(1, len(every)))
        if every and each and not rest:
            found |= {i: every[number // each] for number, i in enumerate(where)}
        elif every:
            unsure.append((where, expected[name]))
    clock = _Clock(found, length)
    for where, there in unsure if clock.known else ():
        found |= _bound(where, there, clock, runs)
    return [found[i] % length if i in found else None for i in range(len(recorded))]


def _by_name(names: Sequence[str | None]) -> dict[str, list[int]]:
    where = collections.defaultdict(list)
    for i, name in enumerate(names):
        if name is not None:
            where[name].append(i)
    return where


class _Clock:
    """How far the runs were when something was recorded, by what is bound already; places count through all runs."""

    def __init__(self, found: Mapping[int, int], length: int):
        self.length = length
        self.known = sorted(found)
        places = [found[i] for i in self.known]
        reach = [min(i, NEIGHBOURS, len(places) - 1 - i) for i in range(len(places))]
        around = [places[i - near : i + near + 1] for i, near in enumerate(reach)]
        self.places = [statistics.median(near) for near in around]

    def at(self, i: int) -> tuple[int, float]:
        """Return the run and the place in it at the i-th that was recorded: between its neighbours."""
        after = bisect.bisect(self.known, i)
        run, place = divmod(statistics.fmean(self.places[max(0, after - 1) : after + 1]), self.length)
        return int(run), place


def _bound(where: Iterable[int], there: Sequence[int], clock: _Clock, runs: int) -> dict[int, int]:
    """Return to which place each of one name is bound, if to any; runs that recorded it equally often agree."""
    by_run: list[list[tuple[int, float]]] = [[] for _ in range(runs)]
    for i in where:
        run, place = clock.at(i)
        by_run[run].append((i, place))
    times = [[place for _, place in each] for each in by_run]
    if len(set(map(len, times))) == 1:
        times = [[statistics.median(same) for same in zip(*times, strict=True)]] * runs
    return {
        each[number][0]: there[place]
        for each, near in zip(by_run, times, strict=True)
        for number, place in _nearest(near, there)
    }


def _nearest(times: Sequence[float], places: Sequence[int]) -> list[tuple[int, int]]:
    """Return pairs of indices, both in order, that cost least: what lies between them, and `ALONE` for any other."""
    costs = [ALONE * np.arange(len(places) + 1)]
    for time in times:
        both = costs[-1][:-1] + np.abs(np.asarray(places) - time)
        row = np.minimum(costs[-1] + ALONE, np.concatenate([[np.inf], both]))
        costs.append(np.minimum.accumulate(row - costs[0]) + costs[0])
    pairs, j = [], len(places)
    for i in range(len(times), 0, -1):
        while j and np.isclose(costs[i][j], costs[i][j - 1] + ALONE):
            j -= 1
        if not np.isclose(costs[i][j], costs[i - 1][j] + ALONE):
            j -= 1
            pairs.append((i - 1, j))
    return pairs[::-1]
