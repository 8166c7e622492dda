"""The embedding of tokens: each one's row of a table.

Under a mesh the table lies in parts of its width and of its vocabulary. Devices do not gather it: each looks the tokens
of all up in its own part, and they exchange what was found. The gradient is summed where it lies, a part of the table.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Integer

from based_jax.ops import sharded

Ids = Integer[Array, "B *T"]
Table = Float[Array, "V D"]
Embedded = Float[Array, "B *T D"]


@jax.named_scope("lookup")
def lookup(table: Table, ids: Ids) -> Embedded:
    """Return the rows of a table (V, D) at ids (B, T) or (B,) from 0 on, of NaN where an id is V or more."""
    tokens = ("batch", "time")[: ids.ndim]
    width, vocab = sharded.axes_of("embed", table.shape[1]), sharded.axes_of("vocab", table.shape[0])
    rows = sharded.axes_of("batch", ids.shape[0])
    exchanged = width if set(width) <= set(rows) else ()

    def on_device(table: Array, ids: Array) -> Array:
        ids = lax.all_gather(ids, exchanged, tiled=True) if exchanged else ids
        x = _of_part(table, ids, vocab)
        return lax.all_to_all(x, exchanged, 0, x.ndim - 1, tiled=True) if exchanged else x

    of_table = ("vocab", "embed") if exchanged else ("vocab",)
    return sharded.per_shard(on_device, (table, ids), (of_table, tokens), (tokens,))


def _of_part(table: Table, ids: Ids, vocab: tuple[str, ...]) -> Embedded:
    """Return the rows of a table of which each device along some axes has a part."""
    if not vocab:
        return jnp.take(table, ids, axis=0)
    count = table.shape[0]
    own = ids - lax.axis_index(vocab) * count
    inside = (own >= 0) & (own < count)
    found = jnp.where(inside[..., None], jnp.take(table, jnp.where(inside, own, 0), axis=0), 0)
    known = ids < count * lax.axis_size(vocab)
    return jnp.where(known[..., None], lax.psum(found, vocab), jnp.nan)
