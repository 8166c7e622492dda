"""The matrix recurrence token by token on Hopper: the backward pass (see `recurrence.py`).

`reverse` walks from the last token to the first with G = dL/dS in registers, `again` from the first to the last with S:

    reverse:  G_t += q_t do_t^T        dv_t = G_t^T k_t    du_t = G_t^T b_t    dk_t = G_t v_t    db_t = G_t u_t
              G_{t-1} = diag(w_t) G_t + a_t du_t^T
    again:    da_t = S_{t-1} du_t      dq_t = S_t do_t

The gradient of log w_t would need both at once, sum_v G_t w_t S_{t-1}. But to scale a row of all states from t on by
1 + e is to scale q from t on, a from t + 1 on and the last state by 1 + e, and k and b from t on by 1 - e:

    dlog w_t = sum_{s >= t} (q_s dq_s - k_s dk_s - b_s db_s) + sum_{s > t} a_s da_s + sum_v S_T dS_T
             = sum_v S_0 dS_0 - sum_{s < t} (q_s dq_s - k_s dk_s - b_s db_s) - sum_{s <= t} a_s da_s

since the first line is sum_v S_0 dS_0 for a scale of all states. `again` takes the sums of the second line as it walks.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import split
from pallas_kernels.hopper import stream
from pallas_kernels.hopper.mosaic import WARP_LANES, WARPS, await_warp, like, load_global, load_shared, save
from pallas_kernels.hopper.recurrence import RING_SLOTS, TILE_TOKENS, Plan, more_than_one, save_columns


def backward(q, k, v, w, state, do, dlast, *ab_and_u, scale: float):
    """Return dq, dk, dv, dlog w (fp32), the gradient of the state before the first token and, with a and b, da and db.

    Args:
      do: (B, T, H, V), like v.
      dlast: the gradient of the state after the last token, (B, H, K, V) fp32.
      ab_and_u: a, b, and what `forward` returns with `with_reads`; or nothing.
      q, k, v, w, state: as of `forward`.
    """
    dk, dv, e, dstate, *du_and_db = reverse(q, k, v, w, do, dlast, *ab_and_u, scale=scale)
    start = jnp.einsum("BHKV,BHKV->BHK", state, dstate)
    dq, dw, *da = again(q, k, v, w, do, e, state, start, *ab_and_u, *du_and_db[:1], scale=scale)
    return [dq, dk, dv, dw, dstate, *da, *du_and_db[1:]]


@functools.partial(jax.jit, static_argnames="scale")
def reverse(q, k, v, w, do, dlast, *rest, scale: float):
    """Return dk, dv, k dk + b db (fp32), the gradient of the state before the first token and, with a and b, du, db."""
    plan = Plan.of(k, v)
    sources = [q, do, k, v, w, *rest]
    dlast = plan.by_block(dlast)

    def body(*refs):
        source_refs, (dlast_ref, *results), refs = split(refs, len(sources), 5 + len(rest[1:]))
        dk_ref, dv_ref, e_ref, dstate_ref, *rest_refs = results
        tiles, [filled, partial] = split(refs, len(sources))
        q_tile, do_tile, k_tile, v_tile, w_tile, *rest_tiles = tiles
        at = plan.here()

        def fetch(n, slot):
            plan.copy_in(at, source_refs, tiles, filled, plan.tiles - 1 - n, slot)

        ring = stream.Ring(plan.tiles, RING_SLOTS, filled, fetch)

        def token(slot, back, G):
            i = TILE_TOKENS - 1 - back
            k, v = plan.rows(k_tile, slot, i), plan.columns(v_tile, slot, i)
            G = G + plan.rows(q_tile, slot, i) * (scale * plan.columns(do_tile, slot, i))
            save(partial.at[0, :, :, i], (G * v).sum(axis=2))
            dv = (G * k).sum(axis=3)
            after = plan.rows(w_tile, slot, i) * G
            if rest_tiles:
                a_tile, b_tile, u_tile = rest_tiles
                save(partial.at[1, :, :, i], (G * plan.columns(u_tile, slot, i)).sum(axis=2))
                du = (G * plan.rows(b_tile, slot, i)).sum(axis=3)
                after = after + plan.rows(a_tile, slot, i) * plan.along(du)
            await_warp()
            save_columns(v_tile.at[slot, :, i], dv)
            if rest_tiles:
                save_columns(u_tile.at[slot, :, i], du)
            return after

        def total(slot, i, carry):
            here = slot, slice(None), i
            dk = sum_strips(partial.at[0, :, :, i], plan)
            e = load_channels(k_tile.at[here], plan) * dk
            save(k_tile.at[here], dk)
            if rest_tiles:
                _, b_tile, _ = rest_tiles
                db = sum_strips(partial.at[1, :, :, i], plan)
                e = e + load_channels(b_tile.at[here], plan) * db
                save(b_tile.at[here], db)
            save(w_tile.at[here], e)
            return carry

        def step(n, slot, G):
            G = lax.fori_loop(0, TILE_TOKENS, functools.partial(token, slot), G)
            plgpu.commit_smem()
            lax.fori_loop(0, TILE_TOKENS, functools.partial(total, slot), 0)
            return G

        def put(n, slot):
            out = [k_tile, v_tile, w_tile, *reversed(rest_tiles[1:])]
            plan.copy_out(at, out, [dk_ref, dv_ref, e_ref, *rest_refs], plan.tiles - 1 - n, slot)

        block = lax.axis_index("block")
        G = ring.walk(step, put, load_global(dlast_ref.at[block], plan.layout))
        dstate_ref[block] = G

    out_type = [like(k), like(v), like(w), like(dlast), *map(like, reversed(rest[1:]))]
    scratch = [*plan.tiles_of(sources), plan.barrier(sources), partials(plan, 2 if rest else 1)]
    kernel = stream.kernel(body, "recurrence_reverse", plan.blocks, out_type, scratch)
    dk, dv, e, dstate, *du_and_db = kernel(*sources, dlast)
    return [dk, dv, e, plan.by_head(dstate), *du_and_db]


@functools.partial(jax.jit, static_argnames="scale")
def again(q, k, v, w, do, e, state, start, *rest, scale: float):
    """Return dq, dlog w (fp32) and, with a and b, da (fp32).

    Args:
      e: k dk + b db.
      start: sum_v S_0 dS_0, (B, H, K) fp32.
      rest: a, b, u and du, or nothing.
    """
    plan = Plan.of(k, v)
    sources = [q, do, k, v, w, e, *rest]
    state, start = plan.by_block(state), start.reshape(plan.blocks, plan.heads, -1)

    def body(*refs):
        source_refs, (state_ref, start_ref, *results), refs = split(refs, len(sources), 4 + len(rest[:1]))
        tiles, [filled, partial] = split(refs, len(sources))
        q_tile, do_tile, k_tile, v_tile, w_tile, e_tile, *rest_tiles = tiles
        at = plan.here()

        def fetch(n, slot):
            plan.copy_in(at, source_refs, tiles, filled, n, slot)

        ring = stream.Ring(plan.tiles, RING_SLOTS, filled, fetch)

        def token(slot, i, S):
            after = plan.rows(w_tile, slot, i) * S + plan.rows(k_tile, slot, i) * plan.columns(v_tile, slot, i)
            if rest_tiles:
                _, b_tile, u_tile, du_tile = rest_tiles
                save(partial.at[1, :, :, i], (S * plan.columns(du_tile, slot, i)).sum(axis=2))
                after = after + plan.rows(b_tile, slot, i) * plan.columns(u_tile, slot, i)
            save(partial.at[0, :, :, i], (after * (scale * plan.columns(do_tile, slot, i))).sum(axis=2))
            return after

        def total(slot, i, sums):
            here = slot, slice(None), i
            dq = sum_strips(partial.at[0, :, :, i], plan)
            if rest_tiles:
                a_tile = rest_tiles[0]
                da = sum_strips(partial.at[1, :, :, i], plan)
                sums = sums - load_channels(a_tile.at[here], plan) * da
                save(a_tile.at[here], da)
            save(w_tile.at[here], sums)
            sums = sums - load_channels(q_tile.at[here], plan) * dq + load_channels(e_tile.at[here], plan)
            save(q_tile.at[here], dq)
            return sums

        def step(n, slot, carry):
            S, sums = carry
            S = lax.fori_loop(0, TILE_TOKENS, functools.partial(token, slot), S)
            plgpu.commit_smem()
            return S, lax.fori_loop(0, TILE_TOKENS, functools.partial(total, slot), sums)

        def put(n, slot):
            plan.copy_out(at, [q_tile, w_tile, *rest_tiles[:1]], results, n, slot)

        block = lax.axis_index("block")
        sums = load_global(start_ref.at[block], channels(plan))
        ring.walk(step, put, (load_global(state_ref.at[block], plan.layout), sums))

    out_type = [like(q), like(w), *map(like, rest[:1])]
    scratch = [*plan.tiles_of(sources), plan.barrier(sources), partials(plan, 2 if rest else 1)]
    return stream.kernel(body, "recurrence_again", plan.blocks, out_type, scratch)(*sources, state, start)


def partials(plan: Plan, number: int):
    """Return shared memory for so many vectors of each token, a row of each strip's columns."""
    return plgpu.SMEM((number, plan.heads, plan.strips, TILE_TOKENS, plan.shape[2]), jnp.float32)


def channels(plan: Plan):
    """Return the layout in which each of a block's lanes has one, two or four of its (heads, K) rows."""
    heads, rows = plan.heads, plan.shape[2]
    each = heads * rows // (WARPS * WARP_LANES)
    parts = [(WARP_LANES * each,)] if plan.strips > 1 else []
    tiling = plgpu.Tiling(((heads, rows), *parts, (each,)))
    warps = {-3 - len(parts): heads, -3: plan.strips} if parts else {-3: heads}
    return plgpu.Layout.TILED(tiling, warp_dims=more_than_one(warps), lane_dims=(-2,), vector_dim=-1)


def load_channels(ref, plan: Plan) -> jax.Array:
    """Load (heads, K) from shared memory in fp32, by `channels`."""
    return load_shared(ref, channels(plan))


def sum_strips(ref, plan: Plan) -> jax.Array:
    """Return the sum of (heads, strips, K) over the strips."""
    return functools.reduce(jnp.add, (load_channels(ref.at[:, s], plan) for s in range(plan.strips)))
