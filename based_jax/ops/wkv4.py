"""RWKV-4's weighted average of values, an attention-free softmax over time (arXiv 2305.13048, equation 16).

    wkv_t = (sum_{i<t} e^{(t-1-i) d + k_i} v_i + e^{u + k_t} v_t) / (the same sums without values)

Each channel has a log-decay d < 0 and a bonus u. The state holds numerator and denominator divided by e^max, and max,
so that no exponent is above 0.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from based_jax.dims import BD, BTD, SegmentIds
from based_jax.ops import scan, sequence
from based_jax.ops.arguments import checked
from based_jax.ops.calls import Channels, Wkv4Call, WkvState
from based_jax.ops.decays import finite
from based_jax.ops.dispatch import Implementation, dispatch
from based_jax.ops.hopper import wkv4 as hopper_wkv4


def initial_state(batch: int, channels: int) -> WkvState:
    """Return the state before the first token."""
    return WkvState.empty(batch, channels)


@checked
def wkv4(
    k: BTD,
    v: BTD,
    log_decay: Channels,
    bonus: Channels,
    *,
    state: WkvState | None = None,
    segment_ids: SegmentIds | None = None,
    impl: str = "auto",
) -> tuple[BTD, tuple[BD, BD, BD]]:
    """Average values v by the weights of keys k, both (B, T, D).

    Args:
      state: state to start from; it belongs to each row's first document.
      segment_ids: ids of packed documents, 0 for padding (see `ops/segments.py`).
      impl: "xla_steps" (token by token), "oracle" (the same), "xla_chunks" (8 tokens at a time), "hopper_steps" (Mosaic
        GPU kernels; of the state after the last token, its maximum has no gradient) or "auto".

    Returns:
      wkv in v's dtype, and the state after the last token, a `WkvState`, fp32.

    Raises:
      UserError: `impl` is unknown or cannot run this call.
    """
    call = Wkv4Call(k, v, finite(log_decay), bonus, state, segment_ids)
    return dispatch("wkv4", IMPLEMENTATIONS, impl, call, CUT)


@checked
@jax.named_scope("wkv4_step")
def wkv4_step(k: BD, v: BD, log_decay: Channels, bonus: Channels, state: WkvState) -> tuple[BD, WkvState]:
    """Return one token's average and the state after it."""
    k32, v32 = k.astype(jnp.float32), v.astype(jnp.float32)
    wkv = _read(k32, v32, bonus, state)
    return wkv.astype(v.dtype), state.then(log_decay[None], WkvState(v32, jnp.ones_like(k32), k32))


def _scanned(call: Wkv4Call, *, over: Callable) -> tuple[BTD, WkvState]:
    def step(token, state):
        return wkv4_step(token.k, token.v, call.log_decay, call.bonus, state)

    return over(step, call.tokens, _empty(call), call.state, call.segment_ids)


def _in_kernels(call: Wkv4Call) -> tuple[BTD, WkvState]:
    return hopper_wkv4.compute(call if call.state is not None else call._replace(state=_empty(call)))


def _empty(call: Wkv4Call) -> WkvState:
    batch, _, channels = call.k.shape
    return initial_state(batch, channels)


def _read(k, v, bonus: Channels, state: WkvState):
    """Return the average of the state and the token itself."""
    own = bonus.reshape((1,) * (k.ndim - 1) + (-1,)) + k
    top = jnp.maximum(state.max, own)
    past, now = jnp.exp(state.max - top), jnp.exp(own - top)
    return (past * state.num + now * v) / (past * state.den + now)


def _compose(first, second):
    """Return the sums over both spans, the first one decayed by the second."""
    (d1, s1), (d2, s2) = first, second
    return d1 + d2, s1.then(d2, s2)


def _piece(run: sequence.Run, call: Wkv4Call) -> tuple[BD, WkvState]:
    """Return the log-decay of a state over the tokens of a call, and the state after them."""
    tokens = sequence.total(jnp.ones_like(call.k, jnp.float32), call.segment_ids)
    return call.log_decay[None] * tokens, run(call)[1]


CUT = sequence.States(_empty, _piece, _compose)

IMPLEMENTATIONS = {
    "hopper_steps": Implementation(_in_kernels, hopper_wkv4.supports, platform="cuda"),
    "xla_chunks": Implementation(functools.partial(_scanned, over=scan.over_blocks)),
    "xla_steps": Implementation(functools.partial(_scanned, over=scan.over_tokens)),
    "oracle": Implementation(functools.partial(_scanned, over=scan.over_tokens)),
}
