"""What counting explains: bits per held-out base of Markov models of each order, on the sequences of `configs/dna.py`.

Both strands of what the models train on are counted. Order k gives a base (n + 1/16) / (N + 1/4), n of the N times that
its k bases before were seen. The mixture gives (n + C p) / (N + C), p that of one order less and C counts.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from based_jax.data.dna import DnaSource
from based_jax.data.fasta import COMPLEMENTS, NOT_READ

ORDERS = range(13)
PSEUDO_COUNT = 1 / 16
MIXING_COUNTS = 16


def rows() -> Iterator[dict[str, Any]]:
    """Yield bits per base of each file's held-out bases, by model."""
    source = DnaSource(None, 8192, 1)
    seen = [strand for ids in source.kept for strand in (ids, COMPLEMENTS[ids[::-1]])]
    held_out = {name: source.held_out(name) for name in source.names}
    mixed = dict.fromkeys(held_out, 0.25)
    for order in ORDERS:
        counts = counted(seen, order)
        for name, stretches in held_out.items():
            parts = zip(*(cut(ids, order) for ids in stretches), strict=True)
            contexts, bases, known = (np.concatenate(part) for part in parts)
            these, all_four = counts[contexts, bases], counts[contexts].sum(1)
            mixture = (these + MIXING_COUNTS * mixed[name]) / (all_four + MIXING_COUNTS)
            mixed[name] = np.where(known, mixture, mixed[name])
            alone = (these + PSEUDO_COUNT) / (all_four + 4 * PSEUDO_COUNT)
            for model, probability in {"order": alone, "mixture": mixed[name]}.items():
                bits = -np.log2(probability[known]).mean()
                yield {"model": model, "order": order, "file": name, "bits": round(float(bits), 4)}


def cut(ids: np.ndarray, order: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return for each base the number of its context, the base, and whether all of both were read."""
    ids = ids.astype(np.int64)
    contexts, known = np.zeros(len(ids), np.int64), ids != NOT_READ
    for lag in range(1, order + 1):
        before = np.concatenate([np.full(min(lag, len(ids)), NOT_READ), ids[:-lag]])
        contexts += np.minimum(before, 3) << 2 * (lag - 1)
        known &= before != NOT_READ
    return contexts, np.minimum(ids, 3), known


def counted(stretches: Sequence[np.ndarray], order: int) -> np.ndarray:
    """Return how often each base followed each context: (4^order, 4)."""
    counts = np.zeros(4 ** (order + 1), np.int64)
    for ids in stretches:
        contexts, bases, known = cut(ids, order)
        counts += np.bincount((4 * contexts + bases)[known], minlength=len(counts))
    return counts.reshape(-1, 4)
