"""Taylor linear attention on Hopper: the backward pass, in two kernels shaped like the forward one.

With g = do / z and gz = -do.o / z, the gradient of p_ij is dP_ij = g_i.v_j + gz_i and that of s_ij is dP_ij (1 + s_ij).
The first kernel scans forward with the state of keys and values, S, and writes dq and gz:

    dq_i = c sum_j dS_ij k_j            inside the chunk
         + J(q_i)^T S g_i               before it, J the Jacobian of the weighted features (`taylor_packing.pull_back`)
         + gz_i c (sum_j k_j + c sum_j k_j k_j^T q_i)

The second scans backward with the state of queries and g, R, and writes dk and dv; the roles of the two sides are
exchanged, p being symmetric in them:

    dv_j = sum_i p_ij g_i + R^T phi(k_j)
    dk_j = c sum_i dS_ij q_i + J(k_j)^T R v_j + c (sum_i gz_i q_i + c sum_i gz_i q_i q_i^T k_j)

In both, one warpgroup keeps the sums and two take turns with the chunks. Nothing is stored per chunk. The first takes
g rounded to bf16, and gz from that g; the second takes do and 1/z apart, and the gz that goes with them: where g.v_j
and gz cancel, as for a document's first token, their errors do too.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import mosaic
from pallas_kernels.hopper.mosaic import CHUNK_TOKENS
from pallas_kernels.hopper.taylor_packing import FEATURE_DIM, PACKED_DIM, SCALE, expand, pull_back
from pallas_kernels.hopper.taylor_state import (
    MOMENTS_SHAPE,
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

CHUNK_SLOTS = 4
"""Chunks in flight; even, so that a slot always meets the same output warpgroup and its phases stay in step."""


@functools.partial(jax.jit, static_argnames="pieces")
def query_gradient(q, k, v, o, do, z, initial=None, *, documents=None, pieces: int):
    """Return dq (B, T, parts, 16) in bf16, which heads are the sums of, and gz (B, parts, T rounded up to 64) in fp32.

    The arguments are those of the forward kernel, its results and the gradient of o, bf16 but for z.
    """
    batch, time, *_ = v.shape
    parts, chunks = Parts.of(v), pl.cdiv(time, CHUNK_TOKENS)
    dtype = v.dtype
    given = () if initial is None else (initial,)
    packed = () if documents is None else (documents,)

    def body(*refs):
        count_sources = 6 + len(packed)
        sources, initial, (dq_ref, gz_ref), tiles, refs = groups(refs, count_sources, len(given), 2, count_sources)
        phi_tile, sums_tile, state_tile, form_tile, dq_tile, gz_tile, filled, ready, free = refs
        (q_tile, k_tile, v_tile, o_tile, do_tile, z_tile), packed_tiles = groups(tiles, 6)
        docs = Documents.of(packed_tiles)
        group = lax.axis_index("warpgroup")
        block = lax.axis_index("block")
        row, head, begin, count = place(block, parts.heads, chunks, pieces)

        def fetch(n):
            copy_chunk(parts, sources, tiles, filled, lax.rem(n, CHUNK_SLOTS), row, head, begin + n)

        @pl.when(group == 0)
        def keep_state():
            publish = _publisher(state_tile, form_tile, ready)
            options = {"fetch": fetch, "count": count} | owned_by(docs, lambda n: (begin + n) * CHUNK_TOKENS)
            State(k_tile, v_tile, filled, phi_tile, sums_tile, **options).accumulate(
                block, *initial, publish=publish, free=free
            )

        @pl.when(group > 0)
        def write_gradients():
            mine = group - 1
            causal = mosaic.iota(mosaic.PAIRS_SHAPE, 0) >= mosaic.iota(mosaic.PAIRS_SHAPE, 1)

            def step(i, _):
                n = 2 * i + mine
                slot = lax.rem(n, CHUNK_SLOTS)
                plgpu.barrier_wait(filled.at[slot])

                def scores(s):
                    mosaic.multiply(s, q_tile.at[slot], k_tile.at[slot].T)
                    g = mosaic.load(do_tile.at[slot]).astype(jnp.float32)
                    o = mosaic.load(o_tile.at[slot]).astype(jnp.float32)
                    inverse = 1.0 / plgpu.load(z_tile.at[slot], layout=mosaic.ROW_LAYOUT)
                    exact = -inverse * (g * o).sum(axis=1)
                    g = (g * mosaic.across(inverse, g.shape)).astype(dtype)
                    return g, -(g.astype(jnp.float32) * o).sum(axis=1), exact, s[...]

                g, gz, exact, s = mosaic.products(scores, mosaic.PAIRS_SHAPE)

                def score_gradients(dp):
                    mosaic.multiply(dp, g, v_tile.at[slot].T)
                    return dp[...]

                dp = mosaic.products(score_gradients, mosaic.PAIRS_SHAPE)
                seen, gz_before = causal, gz
                if docs is not None:
                    beginnings, first = docs.begin(slot), (begin + n) * CHUNK_TOKENS
                    seen &= mosaic.across(decoded(beginnings), s.shape) <= mosaic.iota(s.shape, 1) + first
                    reads = jnp.where(beginnings < first, 1.0, 0.0)
                    g, gz_before = g * mosaic.across(reads.astype(dtype), g.shape), gz * reads
                ds = jnp.where(seen, (dp + mosaic.across(gz, dp.shape)) * (1.0 + s * SCALE), 0.0).astype(dtype)
                x = mosaic.load(q_tile.at[slot])
                plgpu.barrier_wait(ready.at[mine])

                def read(u, before, dq):
                    mosaic.multiply(u, g, state_tile.at[mine])
                    mosaic.multiply(before, q_tile.at[slot], form_tile.at[mine, pl.ds(0, FEATURE_DIM)])
                    mosaic.multiply(before, unit().astype(dtype), form_tile.at[mine, pl.ds(FEATURE_DIM, FEATURE_DIM)])
                    mosaic.multiply(dq, ds, k_tile.at[slot])
                    return u[...], before[...], dq[...]

                u, before, dq = mosaic.products(read, (CHUNK_TOKENS, PACKED_DIM), *((CHUNK_TOKENS, FEATURE_DIM),) * 2)
                plgpu.barrier_arrive(free.at[mine])
                # In fp32: where keys or values have a mean, this term and the next cancel more the longer the sequence.
                before = before * mosaic.across(gz_before, before.shape)
                dq = SCALE * (dq + before + pull_back(x, u))
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                dq_tile.at[mine][...] = dq.astype(dtype)
                gz_tile.at[mine][...] = exact
                plgpu.commit_smem()
                tokens = pl.ds((begin + n) * CHUNK_TOKENS, CHUNK_TOKENS)
                plgpu.copy_smem_to_gmem(dq_tile.at[mine], dq_ref.at[row, tokens, head])
                plgpu.copy_smem_to_gmem(gz_tile.at[mine], gz_ref.at[row, head, tokens])

            lax.fori_loop(0, lax.div(count + 1 - mine, 2), step, None)
            plgpu.wait_smem_to_gmem(0)

    scratch = [
        *_slots(parts, FEATURE_DIM, FEATURE_DIM, VALUE_DIM),
        *(mosaic.swizzled((CHUNK_SLOTS, CHUNK_TOKENS, VALUE_DIM), parts.output_swizzle) for _ in ("o", "do")),
        _per_token(),
        *(Documents.scratch(CHUNK_SLOTS) for _ in packed),
        *State.scratch(parts.swizzle),
        *_published(parts),
        mosaic.swizzled((2, CHUNK_TOKENS, FEATURE_DIM), mosaic.NARROW_SWIZZLE),
        plgpu.SMEM((2, CHUNK_TOKENS), jnp.float32),
        *_barriers(arrivals=6 + len(packed)),
    ]
    rows = batch, parts.heads, chunks * CHUNK_TOKENS
    out_type = [_per_part(q, parts), jax.ShapeDtypeStruct(rows, jnp.float32)]
    return _kernel(body, "taylor_dq", batch * parts.heads * pieces, out_type, scratch)(
        q, k, v, o, do, z, *packed, *given
    )


@functools.partial(jax.jit, static_argnames="pieces")
def key_value_gradients(q, k, v, do, z, gz, initial=None, *, documents=None, pieces: int):
    """Return dk (B, T, parts, 16), which heads are the sums of, and dv (B, T, H, V) in bf16.

    `initial` is the sums over the tokens after each piece, as `sums(q, do, z, gz)` returns them.
    `documents` counts tokens from the end: where each token's document begins when time is reversed.
    """
    batch, time, *_ = v.shape
    parts, chunks = Parts.of(v), pl.cdiv(time, CHUNK_TOKENS)
    dtype = v.dtype
    given = () if initial is None else (initial,)
    packed = () if documents is None else (documents,)

    def body(*refs):
        count_sources = 6 + len(packed)
        sources, initial, (dk_ref, dv_ref), tiles, refs = groups(refs, count_sources, len(given), 2, count_sources)
        phi_tile, sums_tile, state_tile, form_tile, unit_tile, dk_tile, dv_tile, filled, ready, free, started = refs
        (q_tile, k_tile, v_tile, do_tile, z_tile, gz_tile), packed_tiles = groups(tiles, 6)
        docs = Documents.of(packed_tiles)
        group = lax.axis_index("warpgroup")
        block = lax.axis_index("block")
        row, head, begin, count = place(block, parts.heads, chunks, pieces)
        last = begin + count - 1

        def first(n):
            return (chunks - 1 - last + n) * CHUNK_TOKENS

        def fetch(n):
            copy_chunk(parts, sources, tiles, filled, lax.rem(n, CHUNK_SLOTS), row, head, last - n)

        @pl.when(group == 0)
        def keep_state():
            publish = _publisher(state_tile, form_tile, ready)
            options = {"fetch": fetch, "count": count} | owned_by(docs, first)
            options["factors"] = row_factors(z_tile, gz_tile, docs)
            State(q_tile, do_tile, filled, phi_tile, sums_tile, **options).accumulate(
                block, *initial, publish=publish, free=free
            )

        @pl.when(group > 0)
        def write_gradients():
            mine = group - 1
            pl.when(mine == 0)(lambda: unit_tile.__setitem__(..., unit().astype(dtype)))
            plgpu.commit_smem()
            plgpu.barrier_arrive(started)
            plgpu.barrier_wait(started)
            causal = mosaic.iota(mosaic.PAIRS_SHAPE, 0) <= mosaic.iota(mosaic.PAIRS_SHAPE, 1)

            def step(i, _):
                n = 2 * i + mine
                slot = lax.rem(n, CHUNK_SLOTS)
                plgpu.barrier_wait(filled.at[slot])
                keys = k_tile.at[slot]

                def scores(s, dp):
                    mosaic.multiply(s, keys, q_tile.at[slot].T)
                    mosaic.multiply(dp, v_tile.at[slot], do_tile.at[slot].T)
                    x = mosaic.load(keys)
                    z, gz = (plgpu.load(tile.at[slot], layout=mosaic.COLUMN_LAYOUT) for tile in (z_tile, gz_tile))
                    factors, gz = (mosaic.down(row, mosaic.PAIRS_SHAPE) for row in (1.0 / z, gz))
                    return x, factors, gz, s[...], dp[...]

                x, factors, gz, s, dp = mosaic.products(scores, mosaic.PAIRS_SHAPE, mosaic.PAIRS_SHAPE)
                seen = causal
                if docs is not None:
                    beginnings = docs.begin(slot)
                    places = first(n) + (CHUNK_TOKENS - 1) - mosaic.iota(s.shape, 1)
                    seen &= mosaic.across(decoded(beginnings), s.shape) <= places
                    reads = jnp.where(beginnings < first(n), 1.0, 0.0)
                p = jnp.where(seen, factors * (1.0 + s * (SCALE + s * (0.5 * SCALE * SCALE))), 0.0).astype(dtype)
                ds = jnp.where(seen, (dp * factors + gz) * (1.0 + s * SCALE), 0.0).astype(dtype)
                plgpu.barrier_wait(ready.at[mine])

                def read_values(dv):
                    mosaic.multiply(dv, p, do_tile.at[slot])
                    phi = expand(x, query=True)
                    if docs is not None:
                        phi = phi * mosaic.across(reads.astype(dtype), phi.shape)
                    for e, width in ((0, 64), (64, 64), (128, 32)):
                        mosaic.multiply(dv, phi[:, e : e + width], state_tile.at[mine, :, pl.ds(e, width)].T)
                    return dv[...]

                dv = mosaic.products(read_values, (CHUNK_TOKENS, VALUE_DIM))
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                dv_tile.at[mine][...] = dv.astype(dtype)

                def read_keys(u, after, dk):
                    mosaic.multiply(u, v_tile.at[slot], state_tile.at[mine])
                    mosaic.multiply(after, keys, form_tile.at[mine, pl.ds(0, FEATURE_DIM)])
                    mosaic.multiply(after, unit_tile, form_tile.at[mine, pl.ds(FEATURE_DIM, FEATURE_DIM)])
                    mosaic.multiply(dk, ds, q_tile.at[slot])
                    return u[...], after[...], dk[...]

                u, after, dk = mosaic.products(
                    read_keys, (CHUNK_TOKENS, PACKED_DIM), *((CHUNK_TOKENS, FEATURE_DIM),) * 2
                )
                plgpu.barrier_arrive(free.at[mine])
                after = after + pull_back(x, u)
                if docs is not None:
                    after = after * mosaic.across(reads, after.shape)
                dk_tile.at[mine][...] = (SCALE * (dk + after)).astype(dtype)
                plgpu.commit_smem()
                tokens = pl.ds((last - n) * CHUNK_TOKENS, CHUNK_TOKENS)
                plgpu.copy_smem_to_gmem(dk_tile.at[mine], dk_ref.at[row, tokens, head])
                plgpu.copy_smem_to_gmem(dv_tile.at[mine], parts.of_tokens(dv_ref, row, tokens, head))

            lax.fori_loop(0, lax.div(count + 1 - mine, 2), step, None)
            plgpu.wait_smem_to_gmem(0)

    scratch = [
        *_slots(parts, FEATURE_DIM, FEATURE_DIM, VALUE_DIM, VALUE_DIM),
        *(_per_token() for _ in ("z", "gz")),
        *(Documents.scratch(CHUNK_SLOTS) for _ in packed),
        *State.scratch(parts.swizzle),
        *_published(parts),
        mosaic.swizzled((CHUNK_TOKENS, FEATURE_DIM), mosaic.NARROW_SWIZZLE),
        mosaic.swizzled((2, CHUNK_TOKENS, FEATURE_DIM), mosaic.NARROW_SWIZZLE),
        mosaic.swizzled((2, CHUNK_TOKENS, VALUE_DIM), parts.output_swizzle),
        *_barriers(arrivals=6 + len(packed)),
        plgpu.Barrier(num_arrivals=2),
    ]
    out_type = [_per_part(k, parts), jax.ShapeDtypeStruct(v.shape, dtype)]
    return _kernel(body, "taylor_dkv", batch * parts.heads * pieces, out_type, scratch)(
        q, k, v, do, z, gz, *packed, *given
    )


def _per_part(x: jax.Array, parts: Parts) -> jax.ShapeDtypeStruct:
    """Return the type of the gradients of queries or keys by parts."""
    batch, time, _, width = x.shape
    return jax.ShapeDtypeStruct((batch, time, parts.heads, width), x.dtype)


def _slots(parts: Parts, *widths: int) -> list:
    """Return slots for chunks of each width, operands of products."""
    return [
        mosaic.swizzled((CHUNK_SLOTS, CHUNK_TOKENS, w), mosaic.NARROW_SWIZZLE if w == FEATURE_DIM else parts.swizzle)
        for w in widths
    ]


def _per_token() -> plgpu.SMEM:
    """Return slots for one fp32 value per token."""
    return plgpu.SMEM((CHUNK_SLOTS, CHUNK_TOKENS), jnp.float32)


def _published(parts: Parts) -> list:
    """Return two turns of what the output warpgroups read: the state and the moments, in bf16."""
    return [
        mosaic.swizzled((2, VALUE_DIM, PACKED_DIM), parts.swizzle),
        mosaic.swizzled((2, *MOMENTS_SHAPE), mosaic.NARROW_SWIZZLE),
    ]


def _barriers(arrivals: int) -> list:
    """Return the barriers of filled slots, and of sums ready to be read and free to be written."""
    return [
        plgpu.Barrier(num_arrivals=arrivals, num_barriers=CHUNK_SLOTS),
        plgpu.Barrier(num_arrivals=1, num_barriers=2),
        plgpu.Barrier(num_arrivals=1, num_barriers=2),
    ]


def _publisher(state_tile, form_tile, ready):
    """Return the `publish` of both kernels: bf16 sums, the moments weighted for c (sum x + c sum x x^T y)."""
    weights = moment_weights(SCALE, 1.0)

    def publish(n, state, moments):
        turn = lax.rem(n, 2)
        state_tile.at[turn][...] = state.astype(state_tile.dtype)
        form_tile.at[turn][...] = (moments * weights).astype(form_tile.dtype)
        plgpu.commit_smem()
        plgpu.barrier_arrive(ready.at[turn])

    return publish


def _kernel(body, name: str, blocks: int, out_type: list, scratch: list):
    return plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=scratch,
        grid=(blocks,),
        grid_names=("block",),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        kernel_name=name,
    )
