"""RWKV-4's average of values on Hopper: the backward pass (see `wkv4.py`).

Tiles are walked from the last to the first. The forward pass has saved the state before each: from it those before the
tile's tokens are computed again. With z_t the sum of weights, g_t = dy_t / z_t, and the gradients A, B of e^m a, e^m b
after a token, kept over e^top as the state is:

    dv_t = e^k_t A + e^{u + k_t} g_t        dk_t = e^k_t (v_t A + B) + du_t        du_t = e^{u + k_t} g_t (v_t - y_t)
    A <- e^d A + g_t        B <- e^d B - g_t y_t        dd_t = e^{m_t + d} (a_t A + b_t B)

No exponent is above 0 but for rounding, since z_t is at least each of its weights. That m is the larger of two is no
matter of gradients: it scales a and b, and both it and they are read as e^m a and e^m b.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import split
from pallas_kernels.hopper import stream, strips
from pallas_kernels.hopper.mosaic import WARPS, like, save
from pallas_kernels.hopper.wkv4 import TILE_TOKENS, Rates, Read, State, load_channels, load_tokens, shares

RING_SLOTS = 4


@jax.jit
def backward(k, v, decay, bonus, starts, dy, dlast, marks=None):
    """Return dk, dv, and by rows (B, 5, D) the gradients of decay, bonus, and of a, b and m before the first token.

    Args:
      starts: the states before every tile, as `forward` returns them.
      dy: (B, T, D), like v.
      dlast: the gradients (B, 3, D) fp32 of a and b after the last token, and in place of that of m, -m.
      k, v, decay, bonus, marks: as of `forward`.
    """
    plan = strips.Plan.of(k, TILE_TOKENS)
    sources = [*map(strips.by_warps, (k, v, dy)), *([] if marks is None else [marks])]
    channels = [strips.by_warps(x) for x in (decay, bonus)]

    def body(*refs):
        source_refs, given, results, tiles, [start_tile, filled] = split(refs, len(sources), 4, 3, len(sources))
        k_tile, v_tile, dy_tile, *mark_tiles = tiles
        decay_ref, bonus_ref, starts_ref, dlast_ref = given
        dk_ref, dv_ref, sums_ref = results
        at = plan.here()

        def fetch(n, slot):
            tile = plan.tiles - 1 - n
            strips.copy_tokens(at, source_refs, tiles, filled, tile, slot)
            start = starts_ref.at[at.row, tile, pl.ds(0, 3), at.strip]
            plgpu.copy_gmem_to_smem(start, start_tile.at[slot], filled.at[slot])

        ring = stream.Ring(plan.tiles, RING_SLOTS, filled, fetch)
        rates = Rates.load(decay_ref, bonus_ref, at)

        def step(n, slot, carry):
            after, ddecay, dbonus = carry
            tokens = load_tokens(slot, k_tile, v_tile, mark_tiles)
            dy = [load_channels(dy_tile.at[slot, i]) for i in range(TILE_TOKENS)]
            start = State(*(load_channels(start_tile.at[slot, i]) for i in range(3)))
            before = states(tokens, start, rates)
            gradients = []
            for token, state, dy_token in reversed(list(zip(tokens, before, dy, strict=True))):
                read = Read.of(token, state, rates)
                g = token.shown(dy_token) * read.inverse
                own = read.own * g
                weight = jnp.exp(token.k + after.top)
                du = own * (token.v - read.y)
                gradients.append((weight * (token.v * after.num + after.den) + du, weight * after.num + own))
                decayed = after.top + token.passes(rates)
                change = jnp.exp(state.top + decayed) * (state.num * after.num + state.den * after.den)
                ddecay, dbonus = ddecay + token.shown(change), dbonus + du
                past, now = shares(decayed, -read.top)
                after = State(
                    past * after.num + now * g,
                    past * after.den - now * (g * read.y),
                    jnp.maximum(decayed, -read.top) + token.forgets,
                )
            for i, (dk, dv) in enumerate(reversed(gradients)):
                save(k_tile.at[slot, i], dk)
                save(v_tile.at[slot, i], dv)
            return after, ddecay, dbonus

        def put(n, slot):
            strips.copy_results(at, [k_tile, v_tile], [dk_ref, dv_ref], plan.tiles - 1 - n, slot)

        after = State.load(dlast_ref.at[at.row], at)
        after, ddecay, dbonus = ring.walk(step, put, (after, jnp.zeros_like(rates.decay), jnp.zeros_like(rates.decay)))
        sums = sums_ref.at[at.row]
        after.save(sums, at)
        save(sums.at[3, at.strip], ddecay)
        save(sums.at[4, at.strip], dbonus)

    out_type = [*map(like, sources[:2]), strips.per_strip(plan, 5)]
    scratch = plan.scratch(sources, RING_SLOTS, (3, WARPS, strips.WARP_CHANNELS))
    kernel = stream.kernel(body, "wkv4_backward", plan.blocks, out_type, scratch)
    dk, dv, sums = kernel(*sources, *channels, starts, dlast.reshape(*dlast.shape[:2], *channels[0].shape))
    return [dk.reshape(k.shape), dv.reshape(v.shape), sums.reshape(*sums.shape[:2], -1)]


def states(tokens, state: State, rates: Rates) -> list[State]:
    """Return the state that each token reads, from the one before them."""
    found = []
    for token in tokens:
        found.append(token.entered(state))
        state = token.left(found[-1], rates)
    return found
