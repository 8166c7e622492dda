"""Token shift: the token before each one, which RWKV mixes with it (arXiv 2305.13048, section 3.1.1)."""

import jax
import jax.numpy as jnp

from based_jax.dims import BD, BT, BTD
from based_jax.ops import segments
from based_jax.ops.arguments import checked


@checked
@jax.named_scope("token_shift")
def token_shift(x: BTD, *, state: BD | None = None, segment_ids: BT | None = None) -> tuple[BTD, BD]:
    """Return for each token of x (B, T, D) the one before it in its document, zero for a document's first.

    Args:
      state: last token before x, of each row's first document.
      segment_ids: ids of packed documents, 0 for padding (see `ops/segments.py`).

    Returns:
      These (B, T, D), and the last token (B, D) of each row's last document.
    """
    before = jnp.zeros_like(x[:, 0]) if state is None else state.astype(x.dtype)
    if segment_ids is None:
        return jnp.concatenate([before[:, None], x[:, :-1]], axis=1), x[:, -1]
    numbers = segments.numbered(segment_ids)
    present = numbers != 0
    shifted = segments.token_before(x, numbers)
    first = present & (jnp.cumsum(present, axis=1) == 1)
    shifted = jnp.where(first[..., None], before[:, None], shifted)
    last = x.shape[1] - 1 - jnp.argmax(present[:, ::-1], axis=1)
    newest = jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]
    return shifted, jnp.where(present.any(axis=1)[:, None], newest, before)
