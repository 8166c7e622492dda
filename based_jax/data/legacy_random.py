"""Many draws at once from numpy's legacy `RandomState` stream, exactly as one call a row would give them.

numpy keeps this stream stable for ever, so data made with it can be compared bit for bit with data made elsewhere.
"""

import itertools

import numpy as np


def uniform_choices(rng: np.random.RandomState, population: int, size: int, rows: int) -> np.ndarray:
    """Return (rows, size) indices: each row is what `rng.choice(population, size, replace=False)` returns next.

    That call shuffles the whole population and keeps the head. The shuffle runs in C and takes over 95 % of the time:
    a row spends about 1.4 words of the stream for each member of the population, and a row starts where the last one
    ended, so no vectorised form reads the stream faster (one tracing the head through bulk draws took twice as long).
    """
    permutations = map(rng.permutation, itertools.repeat(population, rows))
    return np.fromiter((order[:size] for order in permutations), dtype=(np.int64, (size,)), count=rows)


def weighted_choices(rng: np.random.RandomState, weights: np.ndarray, size: int, rows: int) -> np.ndarray:
    """Return (rows, size) indices: each row is what `rng.choice(len(weights), size, replace=False, p=weights)` returns.

    Such a call reads as many doubles as it happens to need, so `rng` is left somewhere past the last row's end: draw
    nothing from it afterwards.
    """
    chosen, left = [np.empty((0, size), np.int64)], rows
    stream, doubles_per_row = np.empty(0), 2.0 * size
    while left > 0:
        stream = np.concatenate([stream, rng.random_sample(int(1.1 * doubles_per_row * (left + 8)))])
        block, end = consecutive_choices(stream, weights, size, chains=1 + left // 512)
        chosen.append(block[:left])
        left, stream = left - len(block), stream[end:]
        doubles_per_row = end / len(block) if len(block) else 2 * doubles_per_row
    return np.concatenate(chosen)


def consecutive_choices(stream: np.ndarray, weights: np.ndarray, size: int, chains: int) -> tuple[np.ndarray, int]:
    """Return the rows of choices that `stream` holds one after the other from offset 0, and the offset behind the last.

    A row is a pure function of the offset where it starts, and it ends where the next one starts. `chains` of them set
    out together from evenly spaced guesses and stop at the first offset that any chain has visited, because from there
    on the two are the same. The row at every offset on the true chain is then known, and the chain itself is read off.
    """
    row_at = np.full(len(stream) + 1, -1)
    starts = np.linspace(0, len(stream), chains, endpoint=False).astype(int)
    rows, ends, known = [np.empty((0, size), np.int64)], [np.empty(0, int)], 0
    while starts.size:
        chosen, after = choose_at(stream, starts, weights, size)
        whole = after <= len(stream)
        row_at[starts[whole]] = known + np.arange(whole.sum())
        known += int(whole.sum())
        rows.append(chosen[whole])
        ends.append(after[whole])
        starts = np.unique(after[whole])
        starts = starts[row_at[starts] < 0]
    end_of = np.concatenate(ends)
    chain = follow(row_at[end_of], row_at[0])
    return np.concatenate(rows)[chain], int(end_of[chain[-1]]) if chain.size else 0


def follow(successor: np.ndarray, first: int) -> np.ndarray:
    """Return first, successor[first], successor[successor[first]], ... up to the first -1, by repeated doubling."""
    jump = np.append(successor, -1)  # index -1 reads the end marker, which stays put
    chain = np.array([first])
    while chain[-1] >= 0:
        chain = np.concatenate([chain, jump[chain]])
        jump = jump[jump]
    return chain[chain >= 0]


def choose_at(stream: np.ndarray, starts: np.ndarray, weights: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return, for each start, one choice without replacement read from `stream` there, and the offset where it ends.

    As numpy does it: draw as many doubles as choices are missing, look them up in the cumulative weights of what is
    left, keep first appearances in order, and repeat. A row whose end lies behind the stream is meaningless.
    """
    space = len(weights)
    remaining = np.tile(weights, (len(starts), 1))
    chosen, count, ends = np.empty((len(starts), size), np.int64), np.zeros(len(starts), int), starts.copy()
    while (active := np.flatnonzero(count < size)).size:
        missing = size - count[active]
        row, place = ragged(missing)
        doubles = stream[np.minimum(ends[active][row] + place, len(stream) - 1)]
        cumulative = np.cumsum(remaining[active], axis=1)
        cumulative /= cumulative[:, -1:]
        # Complex numbers sort by real, then imaginary part: one search finds each double in its own row of the table.
        table = np.arange(active.size)[:, None] + 1j * cumulative
        key = np.searchsorted(table.ravel(), row + 1j * doubles, side="right")
        new = key[first_appearances(key, table.size)]
        row, value = np.divmod(new, space)
        found = np.bincount(row, minlength=active.size)
        chosen[active[row], count[active][row] + ragged(found)[1]] = value
        remaining[active[row], value] = 0
        count[active] += found
        ends[active] += missing
    return chosen, ends


def ragged(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the row and the place in its row of every item of rows of these lengths, laid end to end."""
    row = np.repeat(np.arange(lengths.size), lengths)
    return row, np.arange(row.size) - (np.cumsum(lengths) - lengths)[row]


def first_appearances(keys: np.ndarray, bound: int) -> np.ndarray:
    """Return a mask of the keys, all below `bound`, that equal no earlier key."""
    first = np.empty(bound, np.int64)
    order = np.arange(keys.size)
    first[keys[::-1]] = order[::-1]  # of repeated keys the last assignment stays
    return first[keys] == order
