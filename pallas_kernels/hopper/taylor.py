"""Taylor linear attention on Hopper: the forward pass and the sums of pieces of a sequence (see `ops/taylor.py`).

One block takes one head, or a part of its values, of one piece of a sequence, chunk by chunk of 64 tokens. Its first
warpgroup keeps the state in registers, S^T (V, 160) of packed features (`taylor_state.py`), and publishes it in bf16
before it adds a chunk.
The two others take turns with the chunks: scores straight from q k^T inside the chunk, phi(q) S for what lies before.

The normaliser needs no features: sum_j p_ij over earlier tokens is their number plus a quadratic form of [q, 1] with
the moments of k, which are kept in fp32 and read as the sum of two bf16 matrices. z is fp32 throughout; inside a chunk
it sums the rounded p that o is made of, so that a document's first o is its v, and its gradient vanishes as it should.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import mosaic
from pallas_kernels.hopper.mosaic import CHUNK_TOKENS
from pallas_kernels.hopper.taylor_packing import FEATURE_DIM, PACKED_DIM, SCALE, expand
from pallas_kernels.hopper.taylor_state import (
    COUNT_ENTRY,
    MOMENTS_SHAPE,
    SUMS_COLUMNS,
    SUMS_PARTS,
    VALUE_DIM,
    Documents,
    Parts,
    State,
    copy_chunk,
    decoded,
    groups,
    moment_weights,
    owned_by,
    place,
    row_factors,
    unit,
)

CHUNK_SLOTS = 6
"""Chunks in flight; even, so that a slot always meets the same output warpgroup and its phases stay in step."""
SUMS_SLOTS = 4
"""Those of `sums`: few enough for two blocks on a multiprocessor."""


@functools.partial(jax.jit, static_argnames="pieces")
def forward(q, k, v, initial=None, *, documents=None, pieces: int):
    """Return o (B, T, H, V) and z (B, parts, T rounded up to 64), parts of all heads.

    q and k are (B, T, H, 16), v is (B, T, H, V), all bf16, T >= 64; V is 64 or a multiple of 16 above (`Parts`).
    `initial` (B parts pieces, 64, SUMS_COLUMNS) is what each piece starts from, fp32, as `sums` returns it, with the
    number of tokens at COUNT_ENTRY; without it `pieces` is 1.
    `documents` (B, T / 64, Documents.ROW) int32 keeps packed documents apart; padding gets o = 0 and z = 1, unreadable
    rows NaN. Tokens past T are read as zeros and not written.
    """
    batch, time, *_ = v.shape
    parts, chunks = Parts.of(v), pl.cdiv(time, CHUNK_TOKENS)
    dtype = v.dtype
    given = () if initial is None else (initial,)
    packed = () if documents is None else (documents,)

    def body(*refs):
        count_sources = 3 + len(packed)
        sources, initial, (o_ref, z_ref), tiles, refs = groups(refs, count_sources, len(given), 2, count_sources)
        phi_tile, sums_tile, unit_tile, state_tile, form_tile, o_tile, z_tile, filled, ready, free, started = refs
        (q_tile, k_tile, v_tile), packed_tiles = groups(tiles, 3)
        docs = Documents.of(packed_tiles)
        group = lax.axis_index("warpgroup")
        block = lax.axis_index("block")
        row, head, begin, count = place(block, parts.heads, chunks, pieces)

        def fetch(n):
            copy_chunk(parts, sources, tiles, filled, lax.rem(n, CHUNK_SLOTS), row, head, begin + n)

        @pl.when(group == 0)
        def keep_state():
            weights = moment_weights(0.5 * SCALE * SCALE, SCALE)

            def publish(n, state, moments):
                turn = lax.rem(n, 2)
                state_tile.at[turn][...] = state.astype(dtype)
                weighted = moments * weights
                high = weighted.astype(dtype)
                form_tile.at[turn, 0][...] = high
                form_tile.at[turn, 1][...] = (weighted - high.astype(jnp.float32)).astype(dtype)
                plgpu.commit_smem()
                plgpu.barrier_arrive(ready.at[turn])

            options = {"fetch": fetch, "count": count} | owned_by(docs, lambda n: (begin + n) * CHUNK_TOKENS)
            State(k_tile, v_tile, filled, phi_tile, sums_tile, **options).accumulate(
                block, *initial, publish=publish, free=free
            )

        @pl.when(group > 0)
        def write_outputs():
            mine = group - 1
            pl.when(mine == 0)(lambda: unit_tile.__setitem__(..., unit().astype(dtype)))
            plgpu.commit_smem()
            plgpu.barrier_arrive(started)
            plgpu.barrier_wait(started)
            causal = mosaic.iota(mosaic.PAIRS_SHAPE, 0) >= mosaic.iota(mosaic.PAIRS_SHAPE, 1)
            tokens_before = initial[0][block, *COUNT_ENTRY] if given else 0.0

            def step(i, _):
                n = 2 * i + mine
                slot, first = lax.rem(n, CHUNK_SLOTS), (begin + n) * CHUNK_TOKENS
                plgpu.barrier_wait(filled.at[slot])
                queries = q_tile.at[slot]

                def scores(accumulator):
                    mosaic.multiply(accumulator, queries, k_tile.at[slot].T)
                    x = mosaic.load(queries)
                    return x, expand(x, query=True), accumulator[...]

                x, phi, s = mosaic.products(scores, mosaic.PAIRS_SHAPE)
                seen = causal
                if docs is not None:
                    beginnings = docs.begin(slot)
                    starts, reads = decoded(beginnings), jnp.where(beginnings < first, 1.0, 0.0)
                    seen &= mosaic.across(starts, s.shape) <= mosaic.iota(s.shape, 1) + first
                    phi = phi * mosaic.across(reads.astype(dtype), phi.shape)
                plgpu.barrier_wait(ready.at[mine])

                def read(form, o):
                    for tile, start in ((queries, 0), (unit_tile, FEATURE_DIM)):
                        for part in range(2):
                            mosaic.multiply(form, tile, form_tile.at[mine, part, pl.ds(start, FEATURE_DIM)])
                    for e, width in ((0, 64), (64, 64), (128, 32)):
                        mosaic.multiply(o, phi[:, e : e + width], state_tile.at[mine, :, pl.ds(e, width)].T)
                    p = jnp.where(seen, 1.0 + s * (SCALE + s * (0.5 * SCALE * SCALE)), 0.0).astype(dtype)
                    mosaic.multiply(o, p, v_tile.at[slot])
                    return p.astype(jnp.float32).sum(axis=1), form[...], o[...]

                z, form, o = mosaic.products(read, (CHUNK_TOKENS, FEATURE_DIM), (CHUNK_TOKENS, VALUE_DIM))
                form = (form * x.astype(jnp.float32)).sum(axis=1)
                if docs is not None:
                    z = z + form * reads + jnp.maximum(first - starts, 0).astype(jnp.float32)
                    z = z + jnp.where(beginnings < 0, tokens_before, 0.0)
                    z = jnp.where(z > 0, z, jnp.where(starts == Documents.UNREADABLE, jnp.nan, 1.0))
                else:
                    z = z + form + (tokens_before + first.astype(jnp.float32))
                plgpu.barrier_arrive(free.at[mine])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                o_tile.at[mine][...] = (o * mosaic.across(1.0 / z, o.shape)).astype(dtype)
                z_tile.at[mine][...] = z
                plgpu.commit_smem()
                tokens = pl.ds(first, CHUNK_TOKENS)
                plgpu.copy_smem_to_gmem(o_tile.at[mine], parts.of_tokens(o_ref, row, tokens, head))
                plgpu.copy_smem_to_gmem(z_tile.at[mine], z_ref.at[row, head, tokens])

            lax.fori_loop(0, lax.div(count + 1 - mine, 2), step, None)
            plgpu.wait_smem_to_gmem(0)

    out_type = [
        jax.ShapeDtypeStruct(v.shape, dtype),
        jax.ShapeDtypeStruct((batch, parts.heads, chunks * CHUNK_TOKENS), jnp.float32),
    ]
    scratch = [
        mosaic.swizzled((CHUNK_SLOTS, CHUNK_TOKENS, FEATURE_DIM), mosaic.NARROW_SWIZZLE),
        mosaic.swizzled((CHUNK_SLOTS, CHUNK_TOKENS, FEATURE_DIM), mosaic.NARROW_SWIZZLE),
        mosaic.swizzled((CHUNK_SLOTS, CHUNK_TOKENS, VALUE_DIM), parts.swizzle),
        *(Documents.scratch(CHUNK_SLOTS) for _ in packed),
        *State.scratch(parts.swizzle),
        mosaic.swizzled((CHUNK_TOKENS, FEATURE_DIM), mosaic.NARROW_SWIZZLE),
        mosaic.swizzled((2, VALUE_DIM, PACKED_DIM), mosaic.MEDIUM_SWIZZLE),
        mosaic.swizzled((2, 2, *MOMENTS_SHAPE), mosaic.NARROW_SWIZZLE),
        mosaic.swizzled((2, CHUNK_TOKENS, VALUE_DIM), parts.output_swizzle),
        plgpu.SMEM((2, CHUNK_TOKENS), jnp.float32),
        plgpu.Barrier(num_arrivals=3 + len(packed), num_barriers=CHUNK_SLOTS),
        plgpu.Barrier(num_arrivals=1, num_barriers=2),
        plgpu.Barrier(num_arrivals=1, num_barriers=2),
        plgpu.Barrier(num_arrivals=2),
    ]
    return plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=scratch,
        grid=(batch * parts.heads * pieces,),
        grid_names=("block",),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        kernel_name="taylor_forward",
    )(q, k, v, *packed, *given)


@functools.partial(jax.jit, static_argnames=("reverse", "pieces", "taken"))
def sums(x, y, *factors, documents=None, reverse: bool = False, pieces: int, taken: range | None = None):
    """Return what each taken piece adds to the sums (B parts taken, 64, SUMS_COLUMNS), fp32.

    x is (B, T, H, 16), y is (B, T, H, V), bf16, T >= 64. `factors` are none, or (z, weight), fp32 (B, parts, T rounded
    up to 64): then phi(x) is divided by z and the moments are weighted. With `documents` only the tokens of the
    document that goes on behind the piece count; `reverse` scans the piece from its end, and goes on before it.
    """
    batch, time, *_ = y.shape
    parts, chunks = Parts.of(y), pl.cdiv(time, CHUNK_TOKENS)
    taken = taken or range(pieces)
    packed = () if documents is None else (documents,)
    count_sources = 2 + len(factors) + len(packed)

    def body(*refs):
        sources, (sums_ref,), tiles, (phi_tile, sums_tile, filled) = groups(refs, count_sources, 1, count_sources)
        (x_tile, y_tile), factor_tiles, packed_tiles = groups(tiles, 2, len(factors))
        docs = Documents.of(packed_tiles)
        block = lax.axis_index("block")
        row, head, begin, count = place(block, parts.heads, chunks, pieces, taken)

        def chunk(n):
            return begin + count - 1 - n if reverse else begin + n

        def fetch(n):
            copy_chunk(parts, sources, tiles, filled, lax.rem(n, SUMS_SLOTS), row, head, chunk(n))

        options = owned_by(docs, lambda n: (chunks - 1 - chunk(n) if reverse else chunk(n)) * CHUNK_TOKENS)
        if factors:
            z_tile, weight_tile = factor_tiles
            options["factors"] = row_factors(z_tile, weight_tile, docs)
        state = State(x_tile, y_tile, filled, phi_tile, sums_tile, fetch=fetch, count=count, **options)
        totals = state.accumulate(block, publish=lambda n, state, moments: plgpu.commit_smem())
        for columns, total in zip(SUMS_PARTS, totals, strict=True):
            sums_ref.at[block, :, columns][...] = total

    blocks = batch * parts.heads * len(taken)
    return plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct((blocks, VALUE_DIM, SUMS_COLUMNS), jnp.float32)],
        scratch_types=[
            mosaic.swizzled((SUMS_SLOTS, CHUNK_TOKENS, FEATURE_DIM), mosaic.NARROW_SWIZZLE),
            mosaic.swizzled((SUMS_SLOTS, CHUNK_TOKENS, VALUE_DIM), parts.swizzle),
            *(plgpu.SMEM((SUMS_SLOTS, CHUNK_TOKENS), jnp.float32) for _ in factors),
            *(Documents.scratch(SUMS_SLOTS) for _ in packed),
            *State.scratch(parts.swizzle),
            plgpu.Barrier(num_arrivals=count_sources, num_barriers=SUMS_SLOTS),
        ],
        grid=(blocks,),
        grid_names=("block",),
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        kernel_name="taylor_sums",
    )(x, y, *factors, *packed)
