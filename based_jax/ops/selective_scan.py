"""Mamba's selective scan: a diagonal state space whose step, input and output depend on the token (arXiv 2312.00752).

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t          y_t = C_t . h_t          (equations 2 and 4, algorithm 2)

Each of D channels has N states of its own. The state is (B, D, N) fp32. What the paper's kernel keeps on chip,
exp(dt A) and h for every token, XLA fuses here for some tokens at a time, in the backward pass too.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from based_jax.dims import BD, BTD, SegmentIds
from based_jax.ops import scan, sequence
from based_jax.ops.arguments import checked
from based_jax.ops.calls import BDN, BTN, DN, Channels, SelectiveScanCall
from based_jax.ops.decays import finite
from based_jax.ops.decode_calls import BN, SelectiveScanStepCall
from based_jax.ops.dispatch import Implementation, dispatch
from based_jax.ops.hopper import selective_scan as hopper_selective_scan
from based_jax.ops.hopper import selective_scan_step as hopper_selective_scan_step


def initial_state(batch: int, channels: int, state_dim: int) -> BDN:
    """Return the state before the first token."""
    return jnp.zeros((batch, channels, state_dim), jnp.float32)


@jax.custom_vjp
def step_sizes(raw: Float[Array, "*T D"], bias: Channels) -> Float[Array, "*T D"]:
    """Return the fp32 steps softplus(raw + bias) of channels.

    The gradient of `raw` has its dtype; that of `bias` is the sum of it over the tokens, taken apart: left to itself
    XLA sums column by column where it computes the other, which takes twice as long.
    Source: state-spaces/mamba:mamba_ssm/ops/selective_scan_interface.py (`delta_bias`, `delta_softplus`).
    """
    return jax.nn.softplus(_biased(raw, bias))


def _biased(raw, bias):
    return raw.astype(jnp.float32) + bias.astype(jnp.float32).reshape((1,) * (raw.ndim - 1) + (-1,))


def _step_sizes_fwd(raw, bias):
    return step_sizes(raw, bias), (raw, bias)


def _step_sizes_bwd(saved, grad):
    raw, bias = saved
    draw = jax.lax.optimization_barrier((grad * jax.nn.sigmoid(_biased(raw, bias))).astype(raw.dtype))
    return draw, draw.astype(jnp.float32).sum(axis=tuple(range(raw.ndim - 1))).astype(bias.dtype)


step_sizes.defvjp(_step_sizes_fwd, _step_sizes_bwd)


@checked
def selective_scan(
    u: BTD,
    dt: BTD,
    A: DN,
    B: BTN,
    C: BTN,
    *,
    bias: Channels | None = None,
    state: BDN | None = None,
    segment_ids: SegmentIds | None = None,
    impl: str = "auto",
) -> tuple[BTD, BDN]:
    """Scan u (B, T, D) with steps dt >= 0 (B, T, D), A < 0 (D, N), and B, C (B, T, N).

    Args:
      bias: of raw steps (D), which dt are where it is given: the steps are `step_sizes(dt, bias)`.
      state: state to start from; it belongs to each row's first document.
      segment_ids: ids of packed documents, 0 for padding (see `ops/segments.py`).
      impl: "xla_steps" (token by token), "oracle" (the same), "xla_chunks" (8 tokens at a time), "hopper_steps"
        (Mosaic GPU kernels; D a multiple of 64; N 8, 16, 24 or 32) or "auto".

    Returns:
      y in u's dtype, and the state (B, D, N) after the last token, fp32.

    Raises:
      UserError: `impl` is unknown or cannot run this call.
    """
    call = SelectiveScanCall(u, dt, finite(A), B, C, state, segment_ids, bias)
    return dispatch("selective_scan", IMPLEMENTATIONS, impl, call, CUT)


@checked
def selective_scan_step(
    u: BD, dt: BD, A: DN, B: BN, C: BN, state: BDN, *, bias: Channels | None = None, impl: str = "auto"
) -> tuple[BD, BDN]:
    """Return one token's output and the state after it; with a bias dt are raw steps, as of `selective_scan`.

    `impl` is "xla_steps", "oracle" (the same), "hopper_states" (a Mosaic GPU kernel, which writes the states where they
    lie; D a multiple of 128; N 8, 16 or 32) or "auto".
    """
    call = SelectiveScanStepCall(u, dt, finite(A), B, C, state, bias)
    return dispatch("selective_scan_step", STEP_IMPLEMENTATIONS, impl, call)


def _stepped(call: SelectiveScanStepCall) -> tuple[BD, BDN]:
    u, dt, B, C = (x.astype(jnp.float32) for x in (call.u, _steps(call), call.B, call.C))
    kept = jnp.exp(dt[..., None] * call.A[None])
    state = kept * call.state + (dt * u)[..., None] * B[:, None]
    return jnp.sum(state * C[:, None], axis=-1).astype(call.u.dtype), state


def _steps(call: SelectiveScanCall | SelectiveScanStepCall) -> Float[Array, "*T D"]:
    return call.dt if call.bias is None else step_sizes(call.dt, call.bias)


def _scanned(call: SelectiveScanCall, *, over: Callable) -> tuple[BTD, BDN]:
    call = call._replace(dt=_steps(call), bias=None)

    def step(token, state):
        return _stepped(SelectiveScanStepCall(token.u, token.dt, call.A, token.B, token.C, state))

    return over(step, call.tokens, _empty(call), call.state, call.segment_ids)


def _empty(call: SelectiveScanCall) -> BDN:
    return initial_state(call.u.shape[0], *call.A.shape)


def _kept(call: SelectiveScanCall) -> BDN:
    """Return what the tokens of a call leave of a state."""
    return jnp.exp(sequence.total(_steps(call).astype(jnp.float32), call.segment_ids)[..., None] * call.A[None])


CUT = sequence.decayed(_empty, _kept)

IMPLEMENTATIONS = {
    "hopper_steps": Implementation(hopper_selective_scan.compute, hopper_selective_scan.supports, platform="cuda"),
    "xla_chunks": Implementation(functools.partial(_scanned, over=scan.over_blocks)),
    "xla_steps": Implementation(functools.partial(_scanned, over=scan.over_tokens)),
    "oracle": Implementation(functools.partial(_scanned, over=scan.over_tokens)),
}

STEP_IMPLEMENTATIONS = {
    "hopper_states": Implementation(
        hopper_selective_scan_step.compute,
        hopper_selective_scan_step.supports,
        platform="cuda",
        slower=hopper_selective_scan_step.slower,
    ),
    "xla_steps": Implementation(_stepped),
    "oracle": Implementation(_stepped),
}
