"""A token of attention over a ring of its last keys: it turns, takes its place, and reads what is there.

    k', q' = turn(k, a), turn(q, a)        slot = length mod S        o = softmax over the last S keys, k' among them

A turn by angles a is (x_1 cos a - x_2 sin a, x_2 cos a + x_1 sin a) of the halves of the channels, rotary of all.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from based_jax.dims import BHV, BSGK, BSGV
from based_jax.errors import UserError
from based_jax.ops.arguments import checked
from based_jax.ops.decode_calls import RingStepCall
from based_jax.ops.dispatch import Implementation, dispatch
from based_jax.ops.hopper import attention_step as hopper_attention_step
from based_jax.ops.softmax_step import attention_step


@checked
def ring_step(
    heads: Float[Array, "B joint K"],
    k: BSGK,
    v: BSGV,
    length: Int[Array, "B"],
    angles: Float[Array, "B half"],
    *,
    impl: str = "auto",
) -> tuple[BHV, BSGK, BSGV]:
    """Return what a token reads, and the ring with it.

    Args:
      heads: its queries, keys and values (B, H + 2 G, K) beside each other, for a ring of G keys and values.
      k, v: the ring (B, S, G, K).
      length: of the tokens before.
      angles: (B, K / 2).
      impl: "xla_parts" (operations of its own, and `attention_step`), "hopper_rings" (a Mosaic GPU kernel; bf16, H and
        K multiples of 16, G = H, on one device; without a gradient) or "auto".

    Raises:
      UserError: there are no queries, the angles are not half of the channels, or `impl` is unknown or cannot run this.
    """
    groups, channels = k.shape[2:]
    if heads.shape[1] <= 2 * groups or heads.shape[2] != channels or 2 * angles.shape[1] != channels:
        raise UserError(
            f"ring_step: heads are {heads.shape[1:]} and angles {angles.shape[1]} for {groups} keys of {channels}."
        )
    return dispatch("ring_step", IMPLEMENTATIONS, impl, RingStepCall(heads, k, v, length, angles))


def _parts(call: RingStepCall) -> tuple[BHV, BSGK, BSGV]:
    slots, groups = call.k.shape[1:3]
    q, k, v = jnp.split(call.heads, [call.heads.shape[1] - 2 * groups, call.heads.shape[1] - groups], axis=1)
    q, k = _turned(q, call.angles), _turned(k, call.angles)
    keys, values = (_placed(ring, x, call.length % slots) for ring, x in ((call.k, k), (call.v, v)))
    return attention_step(q, keys, values, jnp.minimum(call.length + 1, slots)), keys, values


def _turned(x: Float[Array, "B H K"], angles: Float[Array, "B half"]) -> Float[Array, "B H K"]:
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=2)
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=2).astype(x.dtype)


def _placed(ring: Float[Array, "B S G K"], x: Float[Array, "B G K"], slot: Int[Array, "B"]) -> Float[Array, "B S G K"]:
    """Write a token of each row to its slot; batched over rows, so that under a mesh each device writes its own."""
    write: Any = jax.vmap(lambda ring, x, slot: ring.at[slot].set(x.astype(ring.dtype)))
    return write(ring, x, slot)


IMPLEMENTATIONS = {
    "hopper_rings": Implementation(
        hopper_attention_step.compute_ring,
        hopper_attention_step.supports_ring,
        platform="cuda",
        slower=hopper_attention_step.slower_ring,
    ),
    "xla_parts": Implementation(_parts),
}
