"""Packed documents: what `segment_ids` means to every operation.

Documents stand one after another in a row; the tokens of one carry the same positive id. Id 0 is padding: it is seen
by nobody, writes to no state, and its output is zero. A state that is handed in belongs to the first document of the
row, a state that is handed out to the last one. Padding stands before, between or after documents, never inside one:
whether the tokens behind such a hole still see those before it differs from mixer to mixer.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from based_jax.ops.calls import MatrixStateCall

FORGET_LOG_DECAY = -1e30
"""Log-decay with which a document's first token leaves nothing of the documents before, in kernels that know none."""


def first_id(segment_ids: Int[Array, "B T"]) -> Int[Array, "B"]:
    """Return the id of each row's first document, 0 where the row is all padding."""
    first = jnp.argmax(segment_ids != 0, axis=1)
    return jnp.take_along_axis(segment_ids, first[:, None], axis=1)[:, 0]


def last_id(segment_ids: Int[Array, "B T"]) -> Int[Array, "B"]:
    """Return the id of each row's last document, 0 where the row is all padding."""
    return first_id(segment_ids[:, ::-1])


def begins_later(segment_ids: Int[Array, "B T"]) -> Bool[Array, "B T"]:
    """Return which tokens are their document's first, but for each row's first document."""
    later = (segment_ids != 0) & (segment_ids != first_id(segment_ids)[:, None])
    return later & (jnp.diff(segment_ids, axis=1, prepend=0) != 0)


def positions(
    segment_ids: Int[Array, "B T"] | None, before: Int[Array, "#B"], length: int
) -> tuple[Int[Array, "#B T"], Int[Array, "#B"]]:
    """Return the place in its document of each of `length` tokens, and how many the last document has had after them.

    `before` counts the tokens that each row's first document has had already, one number where that is the same for
    all. Padding's place means nothing.
    """
    if segment_ids is None:
        return before[:, None] + jnp.arange(length)[None], before + length
    time = jnp.arange(segment_ids.shape[1])[None]
    begins = jnp.diff(segment_ids, axis=1, prepend=-1) != 0
    start = jax.lax.cummax(jnp.where(begins, time, 0), axis=1)
    first = (segment_ids == first_id(segment_ids)[:, None]) & (segment_ids != 0)
    place = time - start + jnp.where(first, before[:, None], 0)
    last = (segment_ids == last_id(segment_ids)[:, None]) & (segment_ids != 0)
    after = jnp.max(jnp.where(last, place + 1, 0), axis=1)
    return place, jnp.where(last.any(axis=1), after, before)


def same_document(query_ids: Int[Array, "*B T"], key_ids: Int[Array, "*B S"]) -> Bool[Array, "*B T S"]:
    """Return whether query t and key s stand in the same document."""
    return (query_ids[..., :, None] == key_ids[..., None, :]) & (key_ids != 0)[..., None, :]


def separated(call: MatrixStateCall) -> tuple[MatrixStateCall, Bool[Array, "B T 1 1"] | None]:
    """Return a call where padding changes nothing and documents forget the ones before, and which tokens are padding.

    The second is None where there are no documents.
    """
    if call.segment_ids is None:
        return call, None
    padding, begins = (x[..., None, None] for x in (call.segment_ids == 0, begins_later(call.segment_ids)))
    tokens = call.q, call.k, call.v, call.log_decay, call.a, call.b
    q, k, v, log_decay, a, b = jax.tree.map(lambda x: jnp.where(padding, 0, x), tokens)
    log_decay = jnp.where(begins, FORGET_LOG_DECAY, log_decay)
    a = None if a is None else jnp.where(begins, 0, a)
    return call._replace(q=q, k=k, v=v, log_decay=log_decay, a=a, b=b), padding
