"""Token shift: the token before each one, which RWKV mixes with it (arXiv 2305.13048, section 3.1.1)."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from based_jax.dims import BD, BTD, SegmentIds, Unbroken
from based_jax.ops import segments, sequence
from based_jax.ops.arguments import checked
from based_jax.ops.calls import TokenShiftCall


@checked
@jax.named_scope("token_shift")
def token_shift(x: BTD, *, state: BD | None = None, segment_ids: SegmentIds | None = None) -> tuple[BTD, BD]:
    """Return for each token of x (B, T, D) the one before it in its document, zero for a document's first.

    Args:
      state: last token before x, of each row's first document.
      segment_ids: ids of packed documents, 0 for padding (see `ops/segments.py`).

    Returns:
      These (B, T, D), and the last token (B, D) of each row's last document.
    """
    ids = None if segment_ids is None else segments.ids_of(segment_ids)
    call, shifted = TokenShiftCall(x, state, ids), functools.partial(_shifted, isinstance(segment_ids, Unbroken))
    return shifted(call) if sequence.pieces(call) == 1 else CUT(shifted, call)


def _shifted(unbroken: bool, call: TokenShiftCall) -> tuple[BTD, BD]:
    x, segment_ids = call.x, call.segment_ids
    before = _empty(call) if call.state is None else call.state.astype(x.dtype)
    if segment_ids is None:
        return jnp.concatenate([before[:, None], x[:, :-1]], axis=1), x[:, -1]
    numbers = segments.numbered(Unbroken(segment_ids) if unbroken else segment_ids)
    present = numbers != 0
    shifted = segments.token_before(x, numbers, unbroken)
    first = present & (jnp.cumsum(present, axis=1) == 1)
    shifted = jnp.where(first[..., None], before[:, None], shifted)
    last = x.shape[1] - 1 - jnp.argmax(present[:, ::-1], axis=1)
    newest = jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]
    return shifted, jnp.where(present.any(axis=1)[:, None], newest, before)


def _empty(call: TokenShiftCall) -> BD:
    return jnp.zeros_like(call.x[:, 0])


def _piece(run: sequence.Run, call: TokenShiftCall) -> tuple[Bool[Array, "#B 1"], BD]:
    """Return whether a call has no token but padding, and its last one."""
    no_token = jnp.zeros(1, bool) if call.segment_ids is None else (call.segment_ids == 0).all(axis=1)
    return no_token[:, None], run(call)[1]


def _compose(earlier, later):
    """Return the same of two pieces."""
    return earlier[0] & later[0], jnp.where(later[0], earlier[1], later[1])


CUT = sequence.States(_empty, _piece, _compose)
