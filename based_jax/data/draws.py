"""Random draws that the synthetic tasks share, many rows at once."""

import numpy as np


def distinct(rng: np.random.Generator, population: int, size: int, rows: int) -> np.ndarray:
    """Return (rows, size) int64: in each row `size` different members of range(population), in random order.

    Floyd's algorithm (Bentley and Floyd 1987, "A sample of brilliance"): its time does not depend on the population.
    """
    chosen = np.empty((rows, size), np.int64)
    for place, last in enumerate(range(population - size, population)):
        drawn = rng.integers(last + 1, size=rows)
        taken = (chosen[:, :place] == drawn[:, None]).any(axis=1)
        chosen[:, place] = np.where(taken, last, drawn)
    return rng.permuted(chosen, axis=1)
