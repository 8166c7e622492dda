"""Pieces of sequences: how many, and what each starts from; the kernel that sums them runs in Pallas' interpreter."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.cases import parametrize_some
from helpers.interpreted import replace_products
from jax.experimental.pallas import mosaic_gpu as plgpu

from based_jax.ops.hopper import taylor_pieces

SUMS = 64, 176


@pytest.mark.parametrize(
    "sequences, chunks, pieces", [(128, 32, 1), (32, 128, 4), (16, 512, 8), (1, 1, 1), (1, 32, 8), (200, 32, 1)]
)
def test_pieces_fill_the_chip(sequences, chunks, pieces):
    assert taylor_pieces.number_of_pieces(sequences, chunks) == pieces


BOTH = (False, True)
EACH = [(2, 3, 9, 2, *options) for options in itertools.product(BOTH, BOTH, BOTH)]


OTHERS = [(1, 1, 44, 11, False, True, False), (1, 1, 44, 11, True, True, True), (2, 66, 9, 1, False, True, True)]


@parametrize_some(
    "batch, heads, chunks, pieces, reverse, packed, from_state",
    [*EACH, *OTHERS],
    [(2, 3, 9, 2, False, False, True), (2, 3, 9, 2, True, True, False), *OTHERS],
)
def test_a_piece_starts_from_all_that_lies_before_it(
    rng, monkeypatch, batch, heads, chunks, pieces, reverse, packed, from_state
):
    replace_products(monkeypatch)
    time = chunks * 64
    assert taylor_pieces.number_of_pieces(batch * heads, chunks) == pieces
    values, pattern = rng.normal(size=(batch, heads, time)), rng.normal(size=SUMS)
    ids = _packed_ids(rng, batch, time) if packed else np.ones((batch, time), np.int32)
    docs = taylor_pieces.documents(jnp.asarray(ids), chunks, reverse=reverse) if packed else None
    owners, scanned = _owners(ids, reverse), ids[:, ::-1] if reverse else ids
    first = rng.normal(size=(batch, heads)) * from_state

    def total(begin, end, start=0.0):
        """Return the state after tokens [begin, end) of the scan, from the one before them."""
        order = values[:, :, ::-1] if reverse else values
        member = (scanned[:, begin:end] == owners[:, end, None]) & (scanned[:, begin:end] != 0)
        return (
            np.einsum("bt,bht->bh", member, order[:, :, begin:end]) + (owners[:, [begin]] == owners[:, [end]]) * start
        )

    def sums(pieces, taken):
        bounds = [(i * chunks // pieces * 64, (i + 1) * chunks // pieces * 64) for i in taken]
        bounds = [(time - end, time - begin) for begin, end in bounds] if reverse else bounds
        return [_arrays(np.stack([total(*bound) for bound in bounds], axis=2), pattern)]

    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        starts, whole = taylor_pieces.running(
            _arrays(first, pattern) if from_state else None,
            sums,
            **{"batch": batch, "heads": heads, "chunks": chunks, "pieces": pieces, "docs": docs, "reverse": reverse},
        )
    if pieces > 1:
        bounds = [(piece * chunks // pieces * 64, (piece + 1) * chunks // pieces * 64) for piece in range(pieces)]
        wanted = [total(0, time - end if reverse else begin, first) for begin, end in bounds]
        _assert_close(starts, _arrays(np.stack(wanted, axis=2), pattern))
    _assert_close(whole(), _arrays(total(0, time, first), pattern))


def _arrays(scalars: np.ndarray, pattern: np.ndarray) -> jnp.ndarray:
    """Return one array of sums for each scalar."""
    return jax.device_put((scalars.reshape(-1, 1, 1) * pattern).astype(np.float32))


def _assert_close(got, wanted) -> None:
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-3)


def _owners(ids: np.ndarray, reverse: bool) -> np.ndarray:
    """Return (B, T + 1): the document of the state before each token, and after the last, in the scan's order."""
    ids = ids[:, ::-1] if reverse else ids
    owners = [ids[np.arange(len(ids)), (ids != 0).argmax(axis=1)]]
    for column in ids.T:
        owners.append(np.where(column != 0, column, owners[-1]))
    return np.stack(owners, axis=1)


def _packed_ids(rng, batch: int, time: int) -> np.ndarray:
    """Return (B, T) ids of documents of up to 500 tokens, some of them followed by padding."""
    rows = []
    for _ in range(batch):
        row = [0] * int(rng.integers(0, 100))
        while len(row) < time:
            row += [len(row) + 1] * int(rng.integers(1, 500)) + [0] * int(rng.integers(0, 2) * rng.integers(1, 200))
        rows.append(row[:time])
    return np.array(rows, np.int32)
