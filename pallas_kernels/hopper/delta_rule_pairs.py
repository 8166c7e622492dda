"""What the tokens of a chunk are to each other in the delta rule on Hopper: P and T in the notation of `delta_rule.py`.

Each warpgroup takes chunk after chunk, and has the next one copied while it makes the inverse of one.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import inverses, mosaic
from pallas_kernels.hopper.chunk_turns import Turn, each_chunk
from pallas_kernels.hopper.delta_rule_walk import numbers_of
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

    def make(turn: Turn, tiles, scratch, targets):
        (q_tile, k_tile, c_tile, beta_tile), (x_tile, y_tile, x_strip, y_strip) = tiles, scratch
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
        plgpu.copy_smem_to_gmem(y_tile, targets[0].at[turn.row, turn.tokens, turn.head])
        own, others = inverses.places()
        M = jnp.where(own > others, mosaic.products(see, PAIRS_SHAPE) * weights, 0.0)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        turn.fetch_next()
        t = inverses.inverse_by_strips(M, x_tile, y_tile, x_strip, y_strip)
        mosaic.save(x_tile, t)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(x_tile, targets[1].at[turn.row, turn.tokens, turn.head])

    groups = 3 if k.shape[3] <= 128 else 2
    square = jax.ShapeDtypeStruct((*k.shape[:3], CHUNK_TOKENS), k.dtype)
    scratch = [mosaic.swizzled((groups, *PAIRS_SHAPE), mosaic.WIDE_SWIZZLE) for _ in range(2)]
    scratch += [inverses.strips(groups), inverses.strips(groups)]
    numbers = [(c, 1), (beta, 1)]
    return each_chunk(
        make, "delta_rule_pairs", [q, k], numbers, [square, square], scratch, groups=groups, blocks=blocks
    )
