"""Taylor linear attention by chunks on tensor cores, in Triton kernels (see `ops/triton/taylor.py`).

With scores p_ts = 1 + s + s^2/2 of s = c q_t.k_s inside a chunk, and the features F and their weights w between chunks
(`taylor_features.py`), S the sum of F(k) v^T before the chunk and h that of F(k):

    o_t = (sum_s p_ts v_s + (w F(q_t))^T S) / z_t        z_t = sum_s p_ts + (w F(q_t)).h

`states` walks over the chunks with S and h, and back with their gradients R and g, which are like sums:

    R = sum_t w F(q_t) do_t^T / z_t                      g = -sum_t w F(q_t) delta_t / z_t, delta = do.o

`outputs` takes all chunks at once. Sums with v and without it are of the same rounded numbers, so that o is exactly v
where all values are alike, and gradients then cancel. Their gradients are in `taylor_backward.py`.

Arrays are (B, T, H, .) of any T, K up to 16 and any V. Documents are numbers (B, T) that rise along a row, 0 at
padding, and `held` (B, chunks + 1), whose state it is before each chunk and after the last: a token of that document
alone reads the state, or is written to it.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels.triton.chunks import CHUNK_TOKENS, CHUNK_WARPS, like
from pallas_kernels.triton.launch import Type, launch
from pallas_kernels.triton.taylor_features import (
    CHANNELS,
    FEATURES,
    PACKED_FEATURES,
    PIECE,
    PIECES,
    PIECES_OF_FEATURES,
    factors,
    feature_numbers,
    features_by_row,
    weights,
)
from pallas_kernels.triton.tiles import CHUNK, at_chunk, places, program_of_chunk, zeros

WIDTHS = 16, 32, 64
"""Columns of values that a program takes together."""
WALK_STAGES, PIECE_STAGES = 3, 1
"""Of the loads of loops over chunks, and over pieces of features."""


class Cut(NamedTuple):
    """B, T, H, K and V of a call; kernels know them by it."""

    batch: int
    time: int
    heads: int
    keys: int
    values: int

    @classmethod
    def of(cls, k, v) -> "Cut":
        """Return that of (B, T, H, K) keys and (B, T, H, V) values."""
        batch, time, heads, keys = k.shape
        return cls(batch, time, heads, keys, v.shape[-1])

    @property
    def chunks(self) -> int:
        """Of a sequence; the last one may be short."""
        return -(-self.time // CHUNK_TOKENS)

    @property
    def width(self) -> int:
        """Columns of a strip of values."""
        return next((width for width in WIDTHS if width >= self.values), WIDTHS[-1])

    @property
    def strips(self) -> int:
        """Of the values; the last one may be narrow."""
        return -(-self.values // self.width)

    def sums(self) -> list[Type]:
        """Return the types of S and h for every sequence."""
        shape = self.batch, self.heads, PACKED_FEATURES
        return [Type((*shape, self.values), jnp.float32), Type(shape, jnp.float32)]

    def starts(self, dtype) -> list[Type]:
        """Return the types of S and h for every chunk."""
        shape = self.batch, self.heads, self.chunks, PACKED_FEATURES
        return [Type((*shape, self.values), dtype), Type(shape, jnp.float32)]


class Documents(NamedTuple):
    """Which document each token is of (B, T), and each state (B, chunks + 1); int32, no state's is 0."""

    numbers: jax.Array
    held: jax.Array


def states(x, y, documents: Documents, first: tuple, back: tuple | None = None, *, scale: float) -> list[jax.Array]:
    """Return S and h before every chunk and after the last one or, with `back`, R and g after every chunk and at first.

    Args:
      x: keys, or queries (B, T, H, K), of which features are.
      y: values, or do (B, T, H, V), with which these are multiplied.
      first: S (B, H, PACKED_FEATURES, V) and h (B, H, PACKED_FEATURES) before all chunks, or R and g after them, fp32.
      back: 1 / z and delta, (B, T, H) fp32.
    """
    cut = Cut.of(x, y)
    arguments = [x, y, *documents, *first, *(back or (None, None))]
    return launch(
        taylor_states,
        cut.heads * cut.strips * PIECES_OF_FEATURES,
        arguments,
        [*cut.starts(y.dtype), *cut.sums()],
        warps=CHUNK_WARPS,
        stages=WALK_STAGES,
        cut=cut,
        scale=scale,
        back=back is not None,
    )


@triton.jit
def taylor_states(
    x_ref,
    y_ref,
    numbers_ref,
    held_ref,
    first_ref,
    first_sums_ref,
    share_ref,
    delta_ref,
    starts_ref,
    start_sums_ref,
    last_ref,
    last_sums_ref,
    cut: tl.constexpr,
    scale: tl.constexpr,
    back: tl.constexpr,
):
    """Walk over the chunks with a piece of features of a strip of a state."""
    i = tl.program_id(0)
    sequence, strip, piece = (i // (PIECES * cut.strips)).to(tl.int64), i // PIECES % cut.strips, i % PIECES
    S = tl.load(state_at(first_ref, sequence, piece, strip, cut), mask=state_is_there(strip, cut), other=0.0)
    sums = tl.load(sums_at(first_sums_ref, sequence, piece))
    for step in range(cut.chunks):
        n = cut.chunks - 1 - step if back else step
        number, at = sequence * cut.chunks + n, at_chunk(sequence, n, cut)
        store_sums(starts_ref, start_sums_ref, number, piece, strip, S, sums, cut)
        before, after = held_about(held_ref, sequence, n, cut)
        mine = load_documents(numbers_ref, sequence, n, cut) == (before if back else after)
        x, y = load_keys(x_ref, at, n, cut), load_values(y_ref, at, n, strip, cut)
        features, share, ones = features_by_row(x, piece), mine.to(tl.float32), 1.0
        if back:
            features *= tl.trans(weights(piece, scale))
            share *= load_numbers(share_ref, at, n, cut)
            ones = -load_numbers(delta_ref, at, n, cut)[None, :]
        features, kept = (features * share[None, :]).to(y.dtype), (before == after).to(tl.float32)
        S = tl.dot(features, y, S * kept)
        sums = sums * kept + tl.sum(features.to(tl.float32) * ones, axis=1)
    store_sums(last_ref, last_sums_ref, sequence, piece, strip, S, sums, cut)


def outputs(q, k, v, documents: Documents, starts, start_sums, *, scale: float) -> list[jax.Array]:
    """Return o like v and z (B, T, H) fp32, 0 and 1 at padding, given the sums before every chunk."""
    cut = Cut.of(k, v)
    results = [like(v), Type(v.shape[:3], jnp.float32)]
    arguments = [q, k, v, *documents, starts, start_sums]
    options: dict[str, Any] = {"cut": cut, "scale": scale}
    programs = cut.heads * cut.chunks * cut.strips
    return launch(taylor_outputs, programs, arguments, results, warps=CHUNK_WARPS, stages=PIECE_STAGES, **options)


@triton.jit
def taylor_outputs(
    q_ref,
    k_ref,
    v_ref,
    numbers_ref,
    held_ref,
    starts_ref,
    start_sums_ref,
    o_ref,
    z_ref,
    cut: tl.constexpr,
    scale: tl.constexpr,
):
    """Sum over pieces of features for a chunk's strip of values."""
    number, at, strip = program_of_chunk(cut, cut.strips)
    sequence, n = number // cut.chunks, number % cut.chunks
    documents = load_documents(numbers_ref, sequence, n, cut)
    reads = documents == tl.load(held_ref + sequence // cut.heads * (cut.chunks + 1) + n)
    q, k = load_keys(q_ref, at, n, cut), load_keys(k_ref, at, n, cut)
    o, z = zeros(CHUNK, cut.width), zeros(CHUNK, PIECE)
    for piece in range(PIECES):
        a, b = factors(q, piece)
        features = (weights(piece, scale) * a * b).to(v_ref.dtype.element_ty)
        S = tl.load(state_at(starts_ref, number, piece, strip, cut), mask=state_is_there(strip, cut), other=0.0)
        o = tl.dot(features, S, o)
        z += features.to(tl.float32) * tl.load(sums_at(start_sums_ref, number, piece))[None, :]
    p = scores(q, k, documents, scale).to(v_ref.dtype.element_ty)
    z = tl.sum(p.to(tl.float32), axis=1) + tl.where(reads, tl.sum(z, axis=1), 0.0)
    z = tl.where(documents == 0, 1.0, z)
    v = load_values(v_ref, at, n, strip, cut)
    o = tl.dot(p, v, tl.where(reads[:, None], o, 0.0)) / z[:, None]
    store_values(o_ref, at, n, strip, o, cut)
    if strip == 0:
        tl.store(z_ref + at + tl.arange(0, CHUNK) * cut.heads, z, mask=tokens_left(n, cut))


@triton.jit
def scores(a, b, documents, scale: tl.constexpr, of_keys: tl.constexpr = False):
    """Return p of queries a and keys b of a chunk, or of keys a and queries b; 0 where one does not see the other."""
    s = scale * tl.dot(a, tl.trans(b))
    return tl.where(visible(documents, of_keys), 1.0 + s + 0.5 * s * s, 0.0)


@triton.jit
def visible(documents, of_keys: tl.constexpr = False):
    """Return which of a chunk's queries, by row, or with `of_keys` by column, see which of its keys."""
    row, column = places(CHUNK)
    causal = row <= column if of_keys else row >= column
    return causal & (documents[:, None] == documents[None, :]) & (documents != 0)[None, :]


@triton.jit
def held_about(held_ref, sequence, n, cut: tl.constexpr):
    """Return whose state it is before and after chunk n."""
    place = held_ref + sequence // cut.heads * (cut.chunks + 1) + n
    return tl.load(place), tl.load(place + 1)


@triton.jit
def tokens_left(n, cut: tl.constexpr):
    """Return which tokens of chunk n there are."""
    return tl.arange(0, CHUNK) + n * CHUNK < cut.time


@triton.jit
def load_documents(numbers_ref, sequence, n, cut: tl.constexpr):
    """Return the numbers of the documents of a chunk's tokens, 0 after the last."""
    t = tl.arange(0, CHUNK) + n * CHUNK
    return tl.load(numbers_ref + sequence // cut.heads * cut.time + t, mask=t < cut.time, other=0)


@triton.jit
def load_numbers(ref, at, n, cut: tl.constexpr):
    """Return a chunk of (B, T, H), 0 after the last token."""
    return tl.load(ref + at + tl.arange(0, CHUNK) * cut.heads, mask=tokens_left(n, cut), other=0.0)


@triton.jit
def load_keys(ref, at, n, cut: tl.constexpr):
    """Return a chunk of (B, T, H, K), filled up to CHANNELS."""
    pointers, there = rows_at(ref, at, n, 0, cut, cut.keys, CHANNELS)
    return tl.load(pointers, mask=there, other=0.0)


@triton.jit
def load_values(ref, at, n, strip, cut: tl.constexpr):
    """Return a chunk's strip of (B, T, H, V), filled up."""
    pointers, there = rows_at(ref, at, n, strip * cut.width, cut, cut.values, cut.width)
    return tl.load(pointers, mask=there, other=0.0)


@triton.jit
def store_keys(ref, at, n, x, cut: tl.constexpr):
    """Store what `load_keys` would load."""
    pointers, there = rows_at(ref, at, n, 0, cut, cut.keys, CHANNELS)
    tl.store(pointers, x.to(ref.dtype.element_ty), mask=there)


@triton.jit
def store_values(ref, at, n, strip, x, cut: tl.constexpr):
    """Store what `load_values` would load."""
    pointers, there = rows_at(ref, at, n, strip * cut.width, cut, cut.values, cut.width)
    tl.store(pointers, x.to(ref.dtype.element_ty), mask=there)


@triton.jit
def rows_at(ref, at, n, column, cut: tl.constexpr, size: tl.constexpr, width: tl.constexpr):
    """Return pointers to columns from one on of chunk n of (B, T, H, size), and which of them are there."""
    columns = tl.arange(0, width) + column
    pointers = ref + at * size + tl.arange(0, CHUNK)[:, None] * (cut.heads * size) + columns[None, :]
    return pointers, tokens_left(n, cut)[:, None] & (columns < size)[None, :]


@triton.jit
def state_at(ref, number, piece, strip, cut: tl.constexpr):
    """Return pointers to a piece of features of a strip of a state, (PIECE, width)."""
    columns = tl.arange(0, cut.width) + strip * cut.width
    rows = number * FEATURES * cut.values + feature_numbers(piece) * cut.values
    return ref + rows[:, None] + columns[None, :]


@triton.jit
def state_is_there(strip, cut: tl.constexpr):
    """Return which columns of a strip of a state there are, (1, width)."""
    return (tl.arange(0, cut.width) + strip * cut.width < cut.values)[None, :]


@triton.jit
def sums_at(ref, number, piece):
    """Return pointers to a piece of the features' sums."""
    return ref + number * FEATURES + feature_numbers(piece)


@triton.jit
def store_sums(ref, sums_ref, number, piece, strip, S, sums, cut: tl.constexpr):
    """Store a piece of features of a strip of a state, and with the first strip the features' sums."""
    there = state_is_there(strip, cut)
    tl.store(state_at(ref, number, piece, strip, cut), S.to(ref.dtype.element_ty), mask=there)
    if strip == 0:
        tl.store(sums_at(sums_ref, number, piece), sums)
