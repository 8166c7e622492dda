"""Softmax attention to a sliding window on Hopper: the backward pass, in one kernel that reads q, k, v and do once.

A block walks the chunks of a piece of one head as the forward pass does, with two warpgroups. The first takes tiles of
queries and sees all of their keys at once, so that it needs nothing of the forward pass: it makes the softmax again,

    P_ij = softmax_j(c q_i.k_j) ,  dP_ij = do_i.v_j ,  delta_i = sum_j P_ij dP_ij ,  dS_ij = P_ij (dP_ij - delta_i)
    dq_i = c sum_j dS_ij k_j

and leaves delta and the softmax's logarithm in shared memory. The second follows, with tiles of keys against the
queries that see them: it makes the transposes P^T and dS^T, which multiply do and q from registers,

    dv_j = sum_i P_ij do_i ,  dk_j = c sum_i dS_ij q_i

A piece begins with the keys before it, and ends with the queries after it, whose dq another piece writes.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import mosaic
from pallas_kernels.hopper.mosaic import CHUNK_TOKENS
from pallas_kernels.hopper.window import (
    Band,
    copy_chunk,
    exponent,
    inverse,
    load_ids,
    place,
    reach,
    softmax,
    sum_rows,
)

LOGARITHM, MINUS_DELTA = 0, 1
"""The rows of what the first warpgroup leaves for the second: sums start from -delta, which saves registers."""


def number_of_slots(window: int, head_dim: int) -> int:
    """Return how many chunks fit in shared memory, at least those that a tile of keys or queries meets."""
    return reach(window) + 4 if head_dim == 64 else 3


@functools.partial(jax.jit, static_argnames=("window", "pieces"))
def gradients(q, k, v, do, ids=None, *, window: int, pieces: int):
    """Return dq, dk and dv, all arrays (B, T, H, K) in bf16, T >= 64.

    `ids` (B, T rounded up to 64) int32 are documents, 0 for padding, whose gradients are zero. Tokens past T are read
    as zeros and not written.
    """
    batch, time, heads, head_dim = q.shape
    chunks, far = pl.cdiv(time, CHUNK_TOKENS), reach(window)
    packed = () if ids is None else (ids, ids)
    slots, factor, scale = number_of_slots(window, head_dim), exponent(head_dim), 1.0 / math.sqrt(head_dim)

    def body(*refs):
        sources = refs[: 4 + len(packed)]
        dq_ref, dk_ref, dv_ref, *tiles = refs[len(sources) : -6]
        dq_tile, sums_tile, logarithm_tile, filled, passed, finished = refs[-6:]
        q_tile, k_tile, v_tile, do_tile, *id_tiles = tiles
        group = lax.axis_index("warpgroup")
        row, head, begin, count = place(lax.axis_index("block"), heads, chunks, pieces)
        total = count + 2 * far

        def fetch(m):
            chunk = jnp.clip(begin - far + m, 0, chunks - 1)
            copy_chunk(sources, tiles, filled, lax.rem(m, slots), row, head, chunk)

        def score(a, b, places):
            """Return the products of one tile of a with several of b."""

            def multiply(*accumulators):
                for s, slot in zip(accumulators, places, strict=True):
                    mosaic.multiply(s, a, b.at[slot].T)
                return tuple(s[...] for s in accumulators)

            return mosaic.products(multiply, *(mosaic.PAIRS_SHAPE,) * len(places))

        def weigh(places, *terms):
            """Return, for each of several terms, the sum of the products of tiles in registers with those of b."""

            def multiply(*sums):
                for total, (weights, b) in zip(sums, terms, strict=True):
                    for p, slot in zip(weights, places, strict=True):
                        mosaic.multiply(total, p, b.at[slot])
                return tuple(total[...] for total in sums)

            return mosaic.products(multiply, *((CHUNK_TOKENS, head_dim),) * len(terms))

        @pl.when(group == 0)
        def queries():
            for m in range(far):
                plgpu.barrier_wait(filled.at[m])

            def step(n, _):
                band, m = Band(window), n + far
                places = [lax.rem(m - d, slots) for d in range(far + 1)]
                mine = places[0]
                plgpu.barrier_wait(filled.at[mine])
                s = score(q_tile.at[mine], k_tile, places)
                documents = load_ids(id_tiles, places, band.overlaps) if packed else None
                seen = band.seen(-(begin + n) * CHUNK_TOKENS, documents)
                parts, extra, sums, top = softmax(band.fold(s), band.extra(s), seen, factor)
                inverted = inverse(sums)
                parts = [p * mosaic.across(inverted, p.shape) for p in parts]

                dp = score(do_tile.at[mine], v_tile, places)
                dparts, dextra = band.fold(dp), band.extra(dp)
                delta = sum_rows([p * dx for p, dx in zip(parts, dparts, strict=True)])
                if band.overlaps:
                    extra = extra * inverted
                    delta = delta + extra * dextra
                dparts = [p * (dx - mosaic.across(delta, p.shape)) for p, dx in zip(parts, dparts, strict=True)]
                dextra = extra * (dextra - delta) if band.overlaps else None
                [dq] = weigh(places, (band.unfold(dparts, dextra, q.dtype), k_tile))

                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                logarithm = top + jnp.log2(jnp.where(sums > 0, sums, 1.0))
                sums_tile.at[mine, LOGARITHM][...] = logarithm_tile.at[mine][...] = logarithm
                sums_tile.at[mine, MINUS_DELTA][...] = -delta
                dq_tile[...] = (dq * scale).astype(dq_tile.dtype)
                plgpu.commit_smem()
                plgpu.barrier_arrive(passed.at[mine])

                @pl.when(n < count)
                def write():
                    plgpu.copy_smem_to_gmem(
                        dq_tile, dq_ref.at[row, pl.ds((begin + n) * CHUNK_TOKENS, CHUNK_TOKENS), head]
                    )

            lax.fori_loop(0, count + far, step, None)
            plgpu.wait_smem_to_gmem(0)

        @pl.when(group == 1)
        def keys():
            for m in range(slots):
                pl.when(m < total)(functools.partial(fetch, jnp.int32(m)))

            def refill(m):
                """Fetch into the slot of chunk m, which nobody needs any more."""
                pl.when(m + slots < total)(lambda: fetch(m + slots))

            for m in range(2 * far):
                plgpu.barrier_wait(filled.at[m % slots])
                if m >= far:
                    plgpu.barrier_wait(passed.at[m % slots])
                    refill(jnp.int32(m - far))

            def step(n, _):
                band, m = Band(window, keys_first=True), n + far
                places = [lax.rem(m + d, slots) for d in range(far + 1)]
                mine, last = places[0], places[-1]
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                pl.when(n > 0)(lambda: refill(m - 1))
                plgpu.barrier_wait(filled.at[last])
                s = score(k_tile.at[mine], q_tile, places)
                plgpu.barrier_wait(passed.at[last])
                documents = load_ids(id_tiles, places, band.overlaps) if packed else None
                seen, extra_seen = band.seen((chunks - begin - n) * CHUNK_TOKENS - 1, documents)

                logarithms = band.fold([down(sums_tile.at[slot, LOGARITHM]) for slot in places])
                folded = zip(band.fold(s), logarithms, seen, strict=True)
                parts = [jnp.where(mask, jnp.exp2(x * factor - y), 0.0) for x, y, mask in folded]
                extra = None
                if band.overlaps:
                    logarithm = plgpu.load(logarithm_tile.at[last], layout=mosaic.ROW_LAYOUT)
                    extra = jnp.where(extra_seen, jnp.exp2(band.extra(s) * factor - logarithm), 0.0)

                def score_gradients(accumulators):
                    for dp, slot in zip(accumulators, places, strict=True):
                        mosaic.multiply(dp, v_tile.at[mine], do_tile.at[slot].T)

                dp = mosaic.accumulate(score_gradients, tuple(down(sums_tile.at[slot, MINUS_DELTA]) for slot in places))
                dparts = [p * dx for p, dx in zip(parts, band.fold(dp), strict=True)]
                dextra = extra * band.extra(dp) if band.overlaps else None

                weights = (band.unfold(x, y, q.dtype) for x, y in ((parts, extra), (dparts, dextra)))
                dv, dk = weigh(places, *zip(weights, (do_tile, q_tile), strict=True))
                # They leave through the slots of v and k, which nobody needs any more once every warp is here.
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                v_tile.at[mine][...] = dv.astype(v_tile.dtype)
                k_tile.at[mine][...] = (dk * scale).astype(k_tile.dtype)
                plgpu.commit_smem()
                tokens = pl.ds((begin + n) * CHUNK_TOKENS, CHUNK_TOKENS)
                plgpu.copy_smem_to_gmem(v_tile.at[mine], dv_ref.at[row, tokens, head])
                plgpu.copy_smem_to_gmem(k_tile.at[mine], dk_ref.at[row, tokens, head])

            lax.fori_loop(0, count, step, None)
            plgpu.wait_smem_to_gmem(0)

        plgpu.barrier_arrive(finished)
        plgpu.barrier_wait(finished)

    return plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct(q.shape, q.dtype)] * 3,
        scratch_types=[
            *(
                mosaic.swizzled((slots, CHUNK_TOKENS, head_dim), mosaic.widest_swizzle(head_dim))
                for _ in ("q", "k", "v", "do")
            ),
            *(plgpu.SMEM((slots, CHUNK_TOKENS), jnp.int32) for _ in packed),
            mosaic.swizzled((CHUNK_TOKENS, head_dim), mosaic.widest_swizzle(head_dim)),
            plgpu.SMEM((slots, 2, CHUNK_TOKENS), jnp.float32),
            plgpu.SMEM((slots, CHUNK_TOKENS), jnp.float32),
            plgpu.Barrier(num_arrivals=4 + len(packed), num_barriers=slots),
            plgpu.Barrier(num_arrivals=1, num_barriers=slots),
            plgpu.Barrier(num_arrivals=2),
        ],
        grid=(batch * heads * pieces,),
        grid_names=("block",),
        num_threads=2,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        kernel_name="window_backward",
    )(q, k, v, do, *packed)


def down(values) -> jax.Array:
    """Load one value per column and repeat it over the rows."""
    return mosaic.down(plgpu.load(values, layout=mosaic.COLUMN_LAYOUT), mosaic.PAIRS_SHAPE)
