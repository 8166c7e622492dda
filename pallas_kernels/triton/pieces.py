"""States at the borders of a sequence's pieces, which kernels then walk over side by side (see `one_decay.py`).

Few sequences of few heads leave most of a GPU idle: a walk over chunks is one after the other. So rows are cut into
pieces of tokens that are rows of their own. A piece of log-decay a, from no state on, ends with U, and from S_p on with

    S_{p+1} = exp(a_p) S_p + U_p

The U of all pieces are made at once, and then these few sums; of gradients likewise, from the last piece to the first.
"""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels.triton.chunks import MULTIPROCESSORS, Cut
from pallas_kernels.triton.launch import Type, launch
from pallas_kernels.triton.one_decay import at_last, decays, times
from pallas_kernels.triton.tiles import (
    STRIP,
    at_chunk,
    keys_at,
    numbers_at,
    program_of_strip,
    state_at,
    store,
    values_at,
    zeros,
)

WALKS_BESIDE = 2
"""That a multiprocessor takes."""
FEWEST = 3
"""Pieces that pay for reading every chunk once more: on one H200 4,096 chunks of 128 x 64 states take 119 us so, by as
many walks as a GPU takes at once, and a walk alone takes 2.8 us a chunk: 96 walks are as fast without."""
LEAST_CHUNKS = 4
"""Of a piece."""
CARRIED_ELEMENTS = 1024
"""Of a program that walks over the pieces: the least that a state has."""
CARRIED = tl.constexpr(CARRIED_ELEMENTS)
CARRYING_WARPS = 4


def count(walks: int, chunks: int) -> int:
    """Return into how many pieces to cut sequences of so many chunks, which so many programs would walk over.

    Of pieces that need no filling up there may be half as many.
    """
    most = min(WALKS_BESIDE * MULTIPROCESSORS // walks, chunks // LEAST_CHUNKS)
    if most < FEWEST:
        return 1
    even = (n for n in range(most, max(FEWEST, most // 2) - 1, -1) if chunks % n == 0)
    return next(even, most)


def starts(k, v, c, state) -> jax.Array:
    """Return the states (B P, H, K, V) in fp32 before every piece.

    Args:
      k, v, c: as of `one_decay.forward`, of B P rows: those of a sequence's P pieces follow each other.
      state: (B, H, K, V) fp32, before the sequences.
    """
    return _at_borders(k, v, c, state, scale=1.0, backwards=False)


def ends(q, do, c, dlast, *, scale: float) -> jax.Array:
    """Return the gradients (B P, H, K, V) of the states after every piece, given those after the sequences."""
    return _at_borders(q, do, c, dlast, scale=scale, backwards=True)


def _at_borders(k, v, c, state, *, scale: float, backwards: bool) -> jax.Array:
    cut, pieces = Cut.of(k, v), v.shape[0] // state.shape[0]
    if pieces == 1:
        return state
    of_pieces = [Type((cut.batch, *state.shape[1:]), jnp.float32), Type((cut.batch, cut.heads), jnp.float32)]
    made = cut.by_strip(one_decay_sums, [k, c], [v], [], of_pieces, warps=4, scale=scale, backwards=backwards)
    sums, decay = (x.reshape(-1, pieces, *x.shape[1:]) for x in made)
    results, programs = [Type(sums.shape, jnp.float32)], cut.heads * cut.keys * cut.values // CARRIED_ELEMENTS
    options = {"cut": cut, "pieces": pieces, "backwards": backwards}
    [found] = launch(one_decay_borders, programs, [sums, decay, state], results, warps=CARRYING_WARPS, **options)
    return found.reshape(of_pieces[0].shape)


@triton.jit
def one_decay_sums(
    k_ref, c_ref, v_ref, sums_ref, decay_ref, cut: tl.constexpr, scale: tl.constexpr, backwards: tl.constexpr
):
    """Walk over the chunks of a piece, from no state on."""
    sequence, column = program_of_strip(cut)
    S, decay = zeros(cut.keys, STRIP), 0.0
    for i in range(cut.chunks):
        n = cut.chunks - 1 - i if backwards else i
        at = at_chunk(sequence, n, cut)
        k, v = tl.load(keys_at(k_ref, at, cut)), tl.load(values_at(v_ref, at, column, cut))
        c = tl.load(numbers_at(c_ref, at, cut))
        since, until, all_of_it = decays(c)
        S = all_of_it * S + tl.dot(tl.trans(k), times(scale * since if backwards else until, v))
        decay += tl.sum(at_last(c))
    store(state_at(sums_ref, sequence, column, cut), S)
    if column == 0:
        tl.store(decay_ref + sequence, decay)


@triton.jit
def one_decay_borders(
    sums_ref, decay_ref, state_ref, borders_ref, cut: tl.constexpr, pieces: tl.constexpr, backwards: tl.constexpr
):
    """Walk over the pieces of a sequence with some elements of a state."""
    size: tl.constexpr = cut.keys * cut.values
    blocks: tl.constexpr = size // CARRIED
    sequence = (tl.program_id(0) // blocks).to(tl.int64)
    elements = tl.program_id(0) % blocks * CARRIED + tl.arange(0, CARRIED)
    S = tl.load(state_ref + sequence * size + elements)
    for i in range(pieces):
        p = pieces - 1 - i if backwards else i
        number = (sequence // cut.heads * pieces + p) * cut.heads + sequence % cut.heads
        tl.store(borders_ref + number * size + elements, S)
        S = tl.exp(tl.load(decay_ref + number)) * S + tl.load(sums_ref + number * size + elements)
