"""What the tokens of a chunk are to each other in the delta rule on Hopper: P and T in the notation of `delta_rule.py`.

Each warpgroup takes chunk after chunk, and has the next one copied while it makes the inverse of one.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import inverses, mosaic
from pallas_kernels.hopper.delta_rule import numbers_of
from pallas_kernels.hopper.mosaic import CHUNK_TOKENS, PAIRS_SHAPE

HIDDEN_EXPONENT = -1e30
"""Of a pair of tokens that do not meet: its exponential is 0."""


def pairs(q, k, c, beta, *, scale: float, blocks: int) -> list[jax.Array]:
    """Return P and T of every chunk, (B, T, H, 64) like k, rows where their tokens are.

    Args:
      q, k: (B, T, H, K), K a multiple of 64 up to 256, T one of 64.
      c, beta: sums of log-decays from the beginning of the chunk on, and rates, (B, H, T) fp32.
      blocks: that run at the same time. Each warpgroup of theirs takes chunk after chunk.
    """
    batch, time, heads, keys = k.shape
    chunks, groups = time // CHUNK_TOKENS, 3 if keys <= 128 else 2
    total = batch * chunks * heads
    blocks = min(blocks, pl.cdiv(total, groups))

    def body(*refs):
        sources, targets, tiles, (x_tiles, y_tiles, filled, finished) = refs[:4], refs[4:6], refs[6:10], refs[10:]
        group = lax.axis_index("warpgroup")
        q_tile, k_tile, c_tile, beta_tile = (tile.at[group] for tile in tiles)
        x_tile, y_tile, arrival = x_tiles.at[group], y_tiles.at[group], filled.at[group]
        first = lax.axis_index("block") * groups + group

        def place(n):
            number = first + n * (blocks * groups)
            tokens = pl.ds(lax.rem(lax.div(number, heads), chunks) * CHUNK_TOKENS, CHUNK_TOKENS)
            return lax.div(number, heads * chunks), tokens, lax.rem(number, heads)

        def fetch(n):
            row, tokens, head = place(n)
            for source, tile in zip(sources, (q_tile, k_tile, c_tile, beta_tile), strict=True):
                part = source.at[row, tokens, head] if len(source.shape) == 4 else source.at[row, head, tokens]
                plgpu.copy_gmem_to_smem(part, tile, arrival)

        def step(n, _):
            row, tokens, head = place(n)
            plgpu.barrier_wait(arrival)
            c = plgpu.load(c_tile, layout=mosaic.ROW_LAYOUT)

            def ask(asked):
                mosaic.multiply(asked, q_tile, k_tile.T)
                own, others = inverses.places()
                passed = jnp.where(own >= others, mosaic.across(c, PAIRS_SHAPE) - numbers_of(c_tile), HIDDEN_EXPONENT)
                return jnp.exp(passed) * numbers_of(beta_tile), asked[...]

            def see(seen):
                mosaic.multiply(seen, k_tile, k_tile.T)
                return seen[...]

            weights, asked = mosaic.products(ask, PAIRS_SHAPE)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            mosaic.save(y_tile, asked * (scale * weights))
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(y_tile, targets[0].at[row, tokens, head])
            own, others = inverses.places()
            M = jnp.where(own > others, mosaic.products(see, PAIRS_SHAPE) * weights, 0.0)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            pl.when(n + 1 < count)(lambda: fetch(n + 1))
            t = inverses.inverse(M, x_tile, y_tile)
            mosaic.save(x_tile, t)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(x_tile, targets[1].at[row, tokens, head])

        count = lax.div(total - first + (blocks * groups - 1), blocks * groups)
        pl.when(count > 0)(lambda: fetch(0))
        lax.fori_loop(0, count, step, None)
        plgpu.wait_smem_to_gmem(0)
        plgpu.barrier_arrive(finished)
        plgpu.barrier_wait(finished)

    square = jax.ShapeDtypeStruct((batch, time, heads, CHUNK_TOKENS), k.dtype)
    return plgpu.kernel(
        body,
        out_type=[square, square],
        scratch_types=[
            *(mosaic.swizzled((groups, CHUNK_TOKENS, keys), mosaic.WIDE_SWIZZLE) for _ in range(2)),
            *(plgpu.SMEM((groups, CHUNK_TOKENS), jnp.float32) for _ in range(2)),
            *(mosaic.swizzled((groups, *PAIRS_SHAPE), mosaic.WIDE_SWIZZLE) for _ in range(2)),
            plgpu.Barrier(num_arrivals=4, num_barriers=groups),
            plgpu.Barrier(num_arrivals=groups),
        ],
        grid=(blocks,),
        grid_names=("block",),
        num_threads=groups,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        kernel_name="delta_rule_pairs",
    )(q, k, c, beta)
