"""A token of a delta rule on queries and keys of length 1, between a layer's products (arXiv 2406.06484, 2412.06464).

    k = unit(key)        S' = diag(w) S + beta k (v - (diag(w) S)^T k)^T        o = scale S'^T unit(query)

Queries, keys and values are read where they lie behind each other in a product: to cut them out is a copy on a GPU.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from based_jax.dims import BHKV, BHV
from based_jax.ops.arguments import checked
from based_jax.ops.decode_calls import BH, UnitDeltaStepCall
from based_jax.ops.delta_rule import delta_rule_step
from based_jax.ops.dispatch import Implementation, dispatch
from based_jax.ops.hopper import matrix_state_step as hopper_matrix_state_step


def unit(x: Float[Array, "*T H K"]) -> Float[Array, "*T H K"]:
    """Return x / sqrt(|x|^2 + 1e-6), queries and keys of the delta rule."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-6)


@checked
def unit_delta_step(
    joint: Float[Array, "B joint"],
    log_decay: Float[Array, "B H #K"],
    beta: BH,
    state: BHKV,
    *,
    scale: float | None = None,
    impl: str = "auto",
) -> tuple[BHV, BHKV]:
    """Return one token's output in joint's dtype, and the state after it.

    Args:
      joint: queries of all heads, then keys, then values, H (2 K + V) channels.
      log_decay: at most 0; (B, H, K), or (B, H, 1) for one decay a head.
      beta: the rates.
      state: (B, H, K, V), fp32.
      scale: of the output; 1 / sqrt(K) where None.
      impl: "xla_steps" (`unit`, and `delta_rule_step`), "oracle" (likewise, by its oracle), "hopper_states" (a Mosaic
        GPU kernel, which writes the states where they lie; K a multiple of 16 up to 256, V of 32, on one device) or
        "auto".

    Raises:
      UserError: `impl` is unknown or cannot run this call.
    """
    scale = state.shape[2] ** -0.5 if scale is None else scale
    call = UnitDeltaStepCall(joint, log_decay, beta, state, scale)
    return dispatch("unit_delta_step", IMPLEMENTATIONS, impl, call)


def _parts(call: UnitDeltaStepCall, impl: str) -> tuple[BHV, BHKV]:
    B, H, K, _ = call.state.shape
    q, k, v = (x.reshape(B, H, -1) for x in jnp.split(call.joint, [H * K, 2 * H * K], axis=1))
    return delta_rule_step(unit(q), unit(k), v, call.log_decay, call.beta, call.state, scale=call.scale, impl=impl)


IMPLEMENTATIONS = {
    "hopper_states": Implementation(
        hopper_matrix_state_step.compute_unit,
        hopper_matrix_state_step.supports_unit,
        platform="cuda",
        slower=hopper_matrix_state_step.slower_unit,
    ),
    "xla_steps": Implementation(functools.partial(_parts, impl="auto")),
    "oracle": Implementation(functools.partial(_parts, impl="oracle")),
}
