"""Packed documents: what `segment_ids` means to every operation.

A token's id is 0 where it is padding. Among the real tokens of a row a document is a longest run of equal ids: an id
that returns (1 2 1) begins a document of its own, and padding between two tokens of a document (1 0 1) does not end it.
Padding is inert wherever it stands: nobody sees it, it writes to no state, it takes no place between two tokens, and
its output is zero, so that a row means what it means without its padding.

What measures distances in places needs unbroken documents. A model moves the tokens that it reads, once, so that a
row's padding stands behind its documents (`sequence.compacted`), and hands on ids that say so (`dims.Unbroken`). With
other ids such an operation moves its own inputs, large arrays (`without_padding`), but for the Hopper kernels of
windows, of Taylor attention and of convolutions without a state: there a row with padding inside a document gets NaN
(`padding_within`).

A state that is handed in belongs to the first document of the row, whatever its id: who begins a document at the first
token hands in no state, or the empty one. A state that is handed out is that of the row's last document, or the one
that was handed in where all is padding.

Every operation numbers the documents of a row at its door (`numbered`). Implementations, and the functions below that
take `numbers`, get these: they rise along the row, and equal ones are of one document.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Shaped

from based_jax.dims import BT, SegmentIds, Unbroken
from based_jax.ops.calls import MatrixStateCall

FORGET_LOG_DECAY = -1e30
"""Log-decay with which a document's first token leaves nothing of the documents before, in kernels that know none."""


def ids_of(segment_ids: SegmentIds) -> BT:
    """Return the ids alone."""
    return segment_ids.ids if isinstance(segment_ids, Unbroken) else segment_ids


def known_alike(ids: BT, others: Int[Array, "_ _"] | Unbroken) -> SegmentIds:
    """Return ids of which is known what is of others, of as many tokens or not."""
    return Unbroken(ids) if isinstance(others, Unbroken) else ids


def numbered(segment_ids: SegmentIds) -> BT:
    """Return the number of each token's document in its row, from 1, and 0 at padding; numbers keep theirs."""
    ids = ids_of(segment_ids)
    id_before = _shifted(ids) if isinstance(segment_ids, Unbroken) else _real_id_before(ids)
    present = ids != 0
    return jnp.where(present, jnp.cumsum(present & (ids != id_before), axis=1), 0)


def _real_id_before(segment_ids: BT) -> BT:
    """Return the id of the latest real token before each one, 0 where there is none."""
    before = _real_before(segment_ids)
    return jnp.where(before < 0, 0, jnp.take_along_axis(segment_ids, jnp.maximum(before, 0), axis=1))


def _real_before(segment_ids: BT) -> BT:
    """Return where the latest real token before each one stands, -1 where there is none."""
    time = jnp.arange(segment_ids.shape[1])[None]
    latest = jax.lax.cummax(jnp.where(segment_ids != 0, time, -1), axis=1)
    return jnp.pad(latest[:, :-1], ((0, 0), (1, 0)), constant_values=-1)


def _shifted(x: Shaped[Array, "B T ..."]) -> Shaped[Array, "B T ..."]:
    """Return what stands one place before, zero before the first place."""
    return jnp.concatenate([jnp.zeros_like(x[:, :1]), x[:, :-1]], axis=1)


def first_id(segment_ids: SegmentIds) -> Int[Array, "B"]:
    """Return the id of each row's first document, 0 where the row is all padding."""
    ids = ids_of(segment_ids)
    first = jnp.argmax(ids != 0, axis=1)
    return jnp.take_along_axis(ids, first[:, None], axis=1)[:, 0]


def last_id(segment_ids: SegmentIds) -> Int[Array, "B"]:
    """Return the id of each row's last document, 0 where the row is all padding."""
    return first_id(ids_of(segment_ids)[:, ::-1])


def begins_later(numbers: BT) -> Bool[Array, "B T"]:
    """Return which tokens are their document's first, but for each row's first document."""
    before = jnp.pad(jax.lax.cummax(numbers, axis=1)[:, :-1], ((0, 0), (1, 0)))
    return numbers > jnp.maximum(before, 1)


def padding_within(numbers: BT) -> Bool[Array, "B 1"]:
    """Return which rows have padding between two tokens of a document."""
    before = jax.lax.cummax(numbers, axis=1)
    after = jax.lax.cummin(jnp.where(numbers == 0, jnp.iinfo(numbers.dtype).max, numbers), axis=1, reverse=True)
    return ((numbers == 0) & (before == after)).any(axis=1, keepdims=True)


def positions(
    segment_ids: SegmentIds | None, before: Int[Array, "#B"], length: int
) -> tuple[Int[Array, "#B T"], Int[Array, "#B"]]:
    """Return the place in its document of each of `length` tokens, and how many the last document has had after them.

    `before` counts the tokens that each row's first document has had already, one number where that is the same for
    all. Padding's place means nothing.
    """
    if segment_ids is None:
        return before[:, None] + jnp.arange(length)[None], before + length
    numbers = numbered(segment_ids)
    present = numbers != 0
    count = jnp.cumsum(present, axis=1) - 1  # real tokens before each
    start = jax.lax.cummax(jnp.where(begins_later(numbers), count, 0), axis=1)
    place = count - start + jnp.where(numbers == 1, before[:, None], 0)
    last = present & (numbers == last_id(numbers)[:, None])
    after = jnp.max(jnp.where(last, place + 1, 0), axis=1).astype(before.dtype)
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


class Order(NamedTuple):
    """How tokens are moved so that a row's padding stands behind its documents.

    Attributes:
      places: the new place of each token (B, T).
      tokens: the token that each new place takes (B, T).
    """

    places: BT
    tokens: BT

    @classmethod
    def of(cls, segment_ids: BT) -> "Order":
        """Return that of rows with these ids."""
        present = segment_ids != 0
        behind = present.sum(axis=1, keepdims=True) + jnp.cumsum(~present, axis=1)
        places = jnp.where(present, jnp.cumsum(present, axis=1), behind) - 1
        time = jnp.broadcast_to(jnp.arange(places.shape[1])[None], places.shape)
        return cls(places, jnp.put_along_axis(jnp.zeros_like(places), places, time, axis=1, inplace=False))

    def moved(self, x: Shaped[Array, "B T ..."]) -> Shaped[Array, "B T ..."]:
        """Return x in the new places."""
        return _taken(x, self.tokens, self.places)

    def moved_back(self, x: Shaped[Array, "B T ..."]) -> Shaped[Array, "B T ..."]:
        """Return x from the new places where it was."""
        return _taken(x, self.places, self.tokens)


def without_padding[Call: Any](compute: Callable[[Call], Any], *tokens: str) -> Callable[[Call], Any]:
    """Return `compute` on rows whose padding stands behind all documents, for what measures distances in places.

    `tokens` are the names of a call's arrays over time.
    """

    @functools.wraps(compute)
    def on_moved(call: Call) -> Any:
        if call.segment_ids is None:
            return compute(call)
        order = Order.of(call.segment_ids)
        arrays = {name: order.moved(getattr(call, name)) for name in (*tokens, "segment_ids")}
        y, *state = jax.tree.leaves(compute(call._replace(**arrays)))
        y = order.moved_back(y)
        return (y, *state) if state else y

    return on_moved


def token_before(x: Shaped[Array, "B T D"], numbers: BT, unbroken: bool = False) -> Shaped[Array, "B T D"]:
    """Return for each token the one before it in its document, zero where there is none, and at padding.

    Documents that are `unbroken` have it one place before.
    """
    if unbroken:
        return jnp.where(((numbers != 0) & (numbers == _shifted(numbers)))[..., None], _shifted(x), 0)
    before, last = _real_before(numbers), x.shape[1] - 1
    after = jnp.flip(last - _real_before(jnp.flip(numbers, 1)), 1)  # past the last one where there is none

    def same(other: BT) -> Bool[Array, "B T"]:
        neighbour = jnp.take_along_axis(numbers, jnp.clip(other, 0, last), axis=1)
        return (numbers != 0) & (numbers == neighbour) & (other >= 0) & (other <= last)

    return _taken(x, jnp.where(same(before), before, -1), jnp.where(same(after), after, -1))


@jax.custom_vjp
def _taken(x: Shaped[Array, "B T ..."], places: BT, inverse: BT) -> Shaped[Array, "B T ..."]:
    """Return x at other places, zero at those below 0.

    No place is taken twice, and `inverse` says which token has taken each, -1 for none: so that the gradient takes too,
    where JAX would scatter.
    """
    expanded = places.reshape(*places.shape, *(1,) * (x.ndim - 2))
    return jnp.where(expanded < 0, 0, jnp.take_along_axis(x, jnp.maximum(expanded, 0), axis=1))


_taken.defvjp(
    lambda x, places, inverse: (_taken(x, places, inverse), (places, inverse)),
    lambda saved, grad: (_taken(grad, saved[1], saved[0]), None, None),
)
