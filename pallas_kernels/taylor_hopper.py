"""Taylor linear attention on Hopper: the forward pass and the sums of pieces of a sequence (see `ops/taylor.py`).

One block takes one head of one piece of a sequence, chunk by chunk of 64 tokens. Its first warpgroup keeps the state
in registers, S^T (V, 160) of packed features (`taylor_packing.py`), and publishes it in bf16 before it adds a chunk.
The two others take turns with the chunks: scores straight from q k^T inside the chunk, phi(q) S for what lies before.

The normaliser needs no features: sum_j p_ij over earlier tokens is the quadratic form of [q, 1] with the Gram matrix
of [k, 1], which is kept in fp32 and read as the sum of two bf16 matrices. z is fp32 throughout.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic
from pallas_kernels.mosaic import ROWS, TILE
from pallas_kernels.taylor_packing import FEATURE_DIM, PACKED_DIM, SCALE, expand

C = TILE
GRAM_DIM = 32
STAGES = 4


def forward(q, k, v, state, gram, *, pieces: int):
    """q, k (B, T, H, 16); v (B, T, H, 64); state (B H pieces, 64, 160); gram (B H pieces, 64, 32)."""
    batch, time, heads, value_dim = v.shape
    chunks = pl.cdiv(time, C)
    dtype = v.dtype

    def body(q_ref, k_ref, v_ref, state_ref, gram_ref, o_ref, z_ref, *scratch):
        (q_tile, k_tile, v_tile, phi_tile, keys_tile, ones_tile, state_tile, gram_tile, o_tile, z_tile, staged, staged_gram, filled, ready, free,
         loaded, started) = scratch
        group = lax.axis_index("warpgroup")
        block = lax.axis_index("block")
        piece = lax.rem(block, pieces)
        head = lax.rem(lax.div(block, pieces), heads)
        row = lax.div(block, pieces * heads)
        begin = lax.div(piece * chunks, pieces)
        count = lax.div((piece + 1) * chunks, pieces) - begin

        def fetch(n):
            slot = lax.rem(n, STAGES)
            tokens = pl.ds((begin + n) * C, C)
            for source, tile in ((k_ref, k_tile), (v_ref, v_tile), (q_ref, q_tile)):
                plgpu.copy_gmem_to_smem(source.at[row, tokens, head], tile.at[slot], filled.at[slot])

        @pl.when(group == 0)
        def _():
            keys_tile[...] = jnp.where(mosaic.iota((C, C), 1) == FEATURE_DIM, 1.0, 0.0).astype(dtype)
            for n in range(STAGES - 2):
                pl.when(n < count)(functools.partial(fetch, n))
            plgpu.copy_gmem_to_smem(state_ref.at[block], staged, loaded)
            plgpu.copy_gmem_to_smem(gram_ref.at[block], staged_gram, loaded)
            plgpu.barrier_wait(loaded)
            weights = _gram_weights()

            def step(n, carry):
                state, gram = carry
                slot, turn = lax.rem(n, STAGES), lax.rem(n, 2)
                pl.when(n >= 2)(lambda: plgpu.barrier_wait(free.at[turn]))
                pl.when(n + STAGES - 2 < count)(lambda: fetch(n + STAGES - 2))
                state_tile.at[turn][...] = state.astype(dtype)
                weighted = gram * weights
                high = weighted.astype(dtype)
                gram_tile.at[turn, 0][...] = high
                gram_tile.at[turn, 1][...] = (weighted - high.astype(jnp.float32)).astype(dtype)
                plgpu.commit_smem()
                plgpu.barrier_arrive(ready.at[turn])
                plgpu.barrier_wait(filled.at[slot])
                keys = mosaic.load(k_tile.at[slot])
                keys_tile.at[:, pl.ds(0, FEATURE_DIM)][...] = keys
                phi_tile[...] = expand(keys, query=False)
                plgpu.commit_smem()
                state = mosaic.product(state.shape, (v_tile.at[slot].T, phi_tile), initial=state)
                gram = mosaic.product(gram.shape, (keys_tile.T, keys_tile.at[:, pl.ds(0, GRAM_DIM)]), initial=gram)
                return state, gram

            lax.fori_loop(0, count, step, (mosaic.load(staged), mosaic.load(staged_gram)))

        @pl.when(group > 0)
        def _():
            mine = group - 1
            first = jnp.where(mosaic.iota((C, FEATURE_DIM), 1) == 0, 1.0, 0.0)
            pl.when(mine == 0)(lambda: ones_tile.__setitem__(..., first.astype(dtype)))
            plgpu.commit_smem()
            plgpu.barrier_arrive(started)
            plgpu.barrier_wait(started)
            causal = mosaic.iota((C, C), 0) >= mosaic.iota((C, C), 1)

            def step(i, _):
                n = 2 * i + mine
                slot = lax.rem(n, STAGES)
                plgpu.barrier_wait(filled.at[slot])
                queries = q_tile.at[slot]
                s = mosaic.product((C, C), (queries, k_tile.at[slot].T))
                p = jnp.where(causal, 1.0 + s * (SCALE + s * (0.5 * SCALE * SCALE)), 0.0)
                z = p.sum(axis=1)
                x = mosaic.load(queries)
                phi = expand(x, query=True)
                plgpu.barrier_wait(ready.at[mine])
                pairs = [
                    (tile, gram_tile.at[mine, part, pl.ds(start, FEATURE_DIM)])
                    for tile, start in ((queries, 0), (ones_tile, FEATURE_DIM))
                    for part in range(2)
                ]
                form = mosaic.product((C, GRAM_DIM), *pairs)
                z = z + (form[:, :FEATURE_DIM] * x.astype(jnp.float32)).sum(axis=1)
                z = z + (form[:, FEATURE_DIM:] * first).sum(axis=1)
                reads = [
                    (phi[:, e : e + w], state_tile.at[mine, :, pl.ds(e, w)].T) for e, w in ((0, 64), (64, 64), (128, 32))
                ]
                o = mosaic.product((C, value_dim), (p.astype(dtype), v_tile.at[slot]), *reads)
                plgpu.barrier_arrive(free.at[mine])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                o_tile.at[mine][...] = (o * mosaic.across(1.0 / z, o.shape)).astype(dtype)
                z_tile.at[mine][...] = z
                plgpu.commit_smem()
                tokens = pl.ds((begin + n) * C, C)
                plgpu.copy_smem_to_gmem(o_tile.at[mine], o_ref.at[row, tokens, head])
                plgpu.copy_smem_to_gmem(z_tile.at[mine], z_ref.at[row, head, tokens])

            lax.fori_loop(0, lax.div(count + 1 - mine, 2), step, None)
            plgpu.wait_smem_to_gmem(0)

    out_type = [
        jax.ShapeDtypeStruct(v.shape, dtype),
        jax.ShapeDtypeStruct((batch, heads, chunks * C), jnp.float32),
    ]
    scratch = [
        mosaic.swizzled((STAGES, C, FEATURE_DIM)),
        mosaic.swizzled((STAGES, C, FEATURE_DIM)),
        mosaic.swizzled((STAGES, C, value_dim)),
        mosaic.swizzled((C, PACKED_DIM)),
        mosaic.swizzled((C, C)),
        mosaic.swizzled((C, FEATURE_DIM)),
        mosaic.swizzled((2, value_dim, PACKED_DIM)),
        mosaic.swizzled((2, 2, C, GRAM_DIM)),
        mosaic.swizzled((2, C, value_dim)),
        plgpu.SMEM((2, C), jnp.float32),
        plgpu.SMEM((value_dim, PACKED_DIM), jnp.float32),
        plgpu.SMEM((C, GRAM_DIM), jnp.float32),
        plgpu.Barrier(num_arrivals=3, num_barriers=STAGES),
        plgpu.Barrier(num_arrivals=1, num_barriers=2),
        plgpu.Barrier(num_arrivals=1, num_barriers=2),
        plgpu.Barrier(num_arrivals=2),
        plgpu.Barrier(num_arrivals=2),
    ]
    return plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=scratch,
        grid=(batch * heads * pieces,),
        grid_names=("block",),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="taylor_forward",
    )(q, k, v, state, gram)


def _gram_weights():
    """Return the factors (64, 32) that turn the Gram matrix of [k, 1] into the form of p = 1 + s + s^2/2."""
    rows, columns = (mosaic.iota((C, GRAM_DIM), d) for d in range(2))
    product = jnp.where(columns < FEATURE_DIM, 0.5 * SCALE * SCALE, SCALE)
    last = jnp.where(columns < FEATURE_DIM, 0.0, 1.0)
    return jnp.where(rows < FEATURE_DIM, product, last)
