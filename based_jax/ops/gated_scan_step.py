"""A token of Mamba between its products: raw steps, the selective scan, the skip and the gate (arXiv 2312.00752).

    h' = exp(dt A) h + dt u B        x = (C . h' + skip u) silu(z)        dt = softplus(raw + bias)

B and C are read where they lie behind others in a product, and so is z: to cut them out is a copy on a GPU.
"""

import functools

import jax.numpy as jnp
from jaxtyping import Array, Float

from based_jax.dims import BD
from based_jax.ops.arguments import checked
from based_jax.ops.calls import BDN, DN, Channels
from based_jax.ops.decays import finite
from based_jax.ops.decode_calls import GatedScanStepCall
from based_jax.ops.dispatch import Implementation, dispatch
from based_jax.ops.gated_norm import gated_skip
from based_jax.ops.hopper import selective_scan_step as hopper_selective_scan_step
from based_jax.ops.selective_scan import selective_scan_step


@checked
def gated_scan_step(
    u: BD,
    raw: BD,
    A: DN,
    selected: Float[Array, "B behind"],
    joint: Float[Array, "B joint"],
    state: BDN,
    *,
    bias: Channels,
    skip: Channels,
    impl: str = "auto",
) -> tuple[BD, BDN]:
    """Return one token's x in u's dtype, and the state (B, D, N) after it.

    Args:
      u: behind the convolution.
      raw: steps before their bias and softplus.
      A: below 0.
      selected: whose last 2 N channels are B and C.
      joint: whose last D channels are z.
      bias: of the steps.
      skip: of u.
      impl: "xla_steps" (by the operations of the scan and of the gate), "oracle" (by their oracles), "hopper_states"
        (a Mosaic GPU kernel, which writes the states where they lie; D a multiple of 128; N 8, 16 or 32) or "auto".

    Raises:
      UserError: `impl` is unknown or cannot run this call.
    """
    call = GatedScanStepCall(u, raw, finite(A), selected, joint, state, bias, skip)
    return dispatch("gated_scan_step", IMPLEMENTATIONS, impl, call)


def _parts(call: GatedScanStepCall, impl: str) -> tuple[BD, BDN]:
    channels, states = call.A.shape
    B, C = jnp.split(call.selected[:, -2 * states :], 2, axis=1)
    y, state = selective_scan_step(call.u, call.raw, call.A, B, C, call.state, bias=call.bias, impl=impl)
    return gated_skip(y, call.u, call.joint[:, -channels:], call.skip), state


IMPLEMENTATIONS = {
    "hopper_states": Implementation(
        hopper_selective_scan_step.compute_gated,
        hopper_selective_scan_step.supports_gated,
        platform="cuda",
        slower=hopper_selective_scan_step.slower,
    ),
    "xla_steps": Implementation(functools.partial(_parts, impl="auto")),
    "oracle": Implementation(functools.partial(_parts, impl="oracle")),
}
