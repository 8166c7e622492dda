"""Softmax attention of a sequence's next tokens where a budget keeps the newest tokens, and a few of the first.

A query sees R tokens up to its own, of those that the cache has and of its chunk, and N keys that stand before them.
Both are read apart, o_i with the logarithm L_i of their weights' sum, and joined (`softmax_chunks.joined`).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from based_jax.dims import BSHK, BSHV, BTHK
from based_jax.ops import softmax_chunks
from based_jax.ops.softmax_chunks import LOWEST, KeyNumbers, QueryNumbers, Read, product

OwnKeys = Float[Array, "B T N H K"]
"""Keys of each query alone."""


def ring_attention(
    q: BTHK, k: BSHK, v: BSHV, query_numbers: QueryNumbers, key_numbers: KeyNumbers, *, root: float
) -> Read:
    """Return what T queries, the last of S = R + T tokens, read of the R tokens up to their own.

    Args:
      query_numbers, key_numbers: of documents (`ops/segments.py`), 0 for what nobody sees.
      root: what scores are divided by.
    """
    R = k.shape[1] - q.shape[1]
    return softmax_chunks.read(q, k, v, query_numbers, key_numbers, past=R, window=R, root=root)


def own_attention(q: BTHK, k: OwnKeys, v: OwnKeys, visible: Bool[Array, "B T N"], *, root: float) -> Read:
    """Return what queries read of N keys that each has of its own."""
    s = jnp.where(visible[:, :, None], product("BTHK,BTNHK->BTHN", q, k) / root, LOWEST)
    seen, logarithm = visible.any(axis=2)[..., None], jax.nn.logsumexp(s, axis=-1)
    p = jnp.where(visible[:, :, None], jnp.exp(s - logarithm[..., None]), 0.0)
    return product("BTHN,BTNHV->BTHV", p, v), jnp.swapaxes(jnp.where(seen, logarithm, LOWEST), 1, 2)
