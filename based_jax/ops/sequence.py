"""Operations whose tokens lie over `parallel.TIME_AXES`: each device computes a piece of every row.

It needs little of the pieces before its own, and that alone is exchanged: their state, or their last tokens. How an
operation does so is its cut, which stands beside its table of implementations and gets `run`, the operation on one
device, and the call of the whole rows:

- `States`, of recurrences: S' = A S + B over a piece. Every device computes A and B of its own, by their composition
  finds the state before it, and runs its piece from there. What writes into states is thus done twice.
- `Tails`, of convolutions: the last inputs before a piece are the state that it starts from.
- `windowed`, of attention to the last keys: those before a piece stand before its own.
- `by_heads`, of attention to all keys: each device has all tokens of a share of its heads for as long.
- `ops/softmax_ring.py`, of attention whose heads the devices cannot share: keys and values go round.

Documents go on over a cut where their ids do (`ops/segments.py`); a document's end hides what is before it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Shaped

from based_jax.dims import BT, SegmentIds, Unbroken
from based_jax.errors import UserError
from based_jax.ops import calls, segments, sharded
from based_jax.ops.dimensions import DIMENSIONS, TOKENS
from based_jax.ops.scan import expand

Run = Callable[..., Any]
"""Of a call on one device; `unbroken=False` says that padding may stand within its documents after all."""
Cut = Callable[[Run, Any], Any]
Ids = Int[Array, "B _"]


def pieces(call: Any) -> int:
    """Return over how many devices the tokens of a call lie, 1 of what is no call over time."""
    known = DIMENSIONS.get(type(call))
    return 1 if known is None else sharded.pieces_of_time(getattr(call, next(iter(known.arguments))).shape[1])


@dataclasses.dataclass(frozen=True)
class States:
    """The cut of a recurrence that returns outputs and a state.

    Attributes:
      empty: `(call) -> state` before a document's first token.
      piece: `(run, call) -> (transition, state)` of a piece from its call's state, None for the empty one.
      compose: of two such pairs that of both pieces.
    """

    empty: Callable[[Any], Any]
    piece: Callable[[Run, Any], tuple[Any, Any]]
    compose: Callable[[Any, Any], tuple[Any, Any]]

    def __call__(self, run: Run, call: Any) -> tuple[Any, Any]:
        """Run each piece from the state that those before leave."""
        return sharded.per_device(lambda part: self._on_device(run, part), call)

    def _on_device(self, run: Run, call: Any) -> tuple[Any, Any]:
        is_first, continues = sharded.place_in_time() == 0, _continues(call.segment_ids)
        start = empty = self.empty(call)
        if call.state is not None:
            start = _select(is_first, call.state, empty)
            call = call._replace(state=start)
        own = *self.piece(run, call), continues & _is_one_document(call.segment_ids)
        _, before, _ = sharded.before(self._joined, own)
        outputs, state = run(call._replace(state=_select(is_first, start, _select(continues, before, empty))))
        return outputs, sharded.from_last(state)

    def _joined(self, earlier: Any, later: Any) -> Any:
        """Return the transition and state of both pieces, and whether a state passes through them."""
        transition, state = self.compose(earlier[:2], later[:2])
        return transition, _select(later[2], state, later[1]), earlier[2] & later[2]


def summed(empty: Callable[[Any], Any]) -> States:
    """Return the cut of a recurrence that forgets nothing: S' = S + B."""

    def add(earlier: Any, later: Any) -> tuple[tuple, Any]:
        return (), earlier[1] + later[1]

    return States(empty, lambda run, call: ((), run(call)[1]), add)


def decayed(empty: Callable[[Any], Any], kept: Callable[[Any], Any]) -> States:
    """Return the cut of a recurrence whose states decay by element: S' = a S + B.

    `kept(call)` is a tree like the state, of what a piece leaves of each element.
    """

    def compose(earlier: Any, later: Any) -> tuple[Any, Any]:
        states = jax.tree.map(lambda a, old, new: a * old + new, later[0], earlier[1], later[1])
        return jax.tree.map(jnp.multiply, earlier[0], later[0]), states

    return States(empty, lambda run, call: (kept(call), run(call)[1]), compose)


def total(x: Shaped[Array, "B T ..."], segment_ids: BT | None) -> Shaped[Array, "B ..."]:
    """Return the sum over the real tokens of a piece, of their log-decays say."""
    return jnp.sum(x if segment_ids is None else _select(segment_ids != 0, x, jnp.zeros_like(x)), axis=1)


@dataclasses.dataclass(frozen=True)
class Tails:
    """The cut of a convolution, whose state is its last inputs.

    With a state before the first token, as a prefill has, the call is not cut.

    Attributes:
      width: `(call) -> tokens` of the state.
      inputs: `(call) -> (B, T, D)`, what the state is made of.
    """

    width: Callable[[Any], int]
    inputs: Callable[[Any], Array]

    def __call__(self, run: Run, call: Any) -> Any:
        """Run each piece from the inputs before it."""
        if call.state is not None:
            return run(call)
        return sharded.per_device(lambda part: self._on_device(run, part), call)

    def _on_device(self, run: Run, call: Any) -> Any:
        return run(call._replace(state=inputs_before(self.inputs(call), call.segment_ids, self.width(call))))


def windowed(run: Run, call: calls.AttentionCall) -> Array:
    """Run each piece with the keys and values that its windows reach before it.

    Raises:
      UserError: there are sinks, which stand in pieces before.
    """
    if call.sinks:
        raise UserError(
            f"Mesh axis 'sequence' has {pieces(call)} devices; for windows with sinks, and {call.sinks} are asked for,"
            " it has 1."
        )
    most = call.q.shape[1] - call.q.shape[1] // pieces(call)
    width = min(call.window - 1, most)

    def on_device(part: calls.AttentionCall) -> Array:
        (k, v), ids = _before((part.k, part.v), part.segment_ids, width)
        own = jnp.ones(part.q.shape[:2], ids.dtype) if part.segment_ids is None else part.segment_ids
        q = jnp.pad(part.q, [(0, 0), (width, 0), (0, 0), (0, 0)])
        k, v, ids = (jnp.concatenate(both, axis=1) for both in ((k, part.k), (v, part.v), (ids, own)))
        return run(part._replace(q=q, k=k, v=v, segment_ids=ids))[:, width:]

    return sharded.per_device(on_device if width else run, call)


def by_heads(run: Run, call: calls.AttentionCall) -> Array:
    """Run all tokens of a share of each device's heads there (DeepSpeed Ulysses, arXiv 2309.14509).

    What is exchanged for it, q, k, v and the outputs, does not grow with the devices, each of which has as many pairs.
    """

    def on_device(part: calls.AttentionCall) -> Array:
        q, k, v = map(sharded.heads_for_time, (part.q, part.k, part.v))
        ids = None if part.segment_ids is None else sharded.all_of_time(part.segment_ids)
        return sharded.time_for_heads(run(part._replace(q=q, k=k, v=v, segment_ids=ids), unbroken=False))

    # All that is given differs by device, and a library's kernel does not say that its results do.
    return sharded.per_device(on_device, call, check_vma=False)


def inputs_before(x: Shaped[Array, "B T D"], segment_ids: BT | None, width: int) -> Shaped[Array, "B {width} D"]:
    """Return the last tokens before a piece, zero but for those of its first document; of padding the latest one's."""
    [tokens], ids = _before((x,), segment_ids, width)
    if segment_ids is None:
        return tokens
    first = segments.first_id(segment_ids)
    owner = jnp.where(first == 0, ids[:, -1], first)
    numbers = segments.numbered(jnp.concatenate([ids, owner[:, None]], axis=1))
    kept = (numbers[:, :-1] == numbers[:, -1:]) & (ids != 0)
    return jnp.where(expand(kept, tokens.ndim), tokens, 0)


def positions(
    segment_ids: SegmentIds | None, before: Int[Array, "#B"], length: int
) -> tuple[Int[Array, "#B T"], Int[Array, "#B"]]:
    """Return `segments.positions`; where tokens lie over devices, each counts those of its piece."""

    if segment_ids is None:
        return segments.positions(None, before, length)

    def run(call: calls.PositionsCall) -> tuple[Array, Array]:
        state = _no_tokens(call) if call.state is None else call.state
        return segments.positions(segments.known_alike(call.segment_ids, segment_ids), state, length)

    ids = segments.ids_of(segment_ids)
    call = calls.PositionsCall(ids, jnp.broadcast_to(before, ids.shape[:1]))
    return run(call) if pieces(call) == 1 else summed(_no_tokens)(run, call)


def _no_tokens(call: calls.PositionsCall) -> Int[Array, "B"]:
    return jnp.zeros(call.segment_ids.shape[:1], jnp.int32)


def compacted(x: Shaped[Array, "B T ..."], segment_ids: BT) -> tuple[Shaped[Array, "B T ..."], Unbroken]:
    """Return tokens, and their ids, in an order in which each device's padding stands behind its documents."""

    def on_device(x: Array, segment_ids: BT) -> tuple[Array, BT]:
        order = segments.Order.of(segment_ids)
        return order.moved(x), order.moved(segment_ids)

    x, ids = sharded.per_shard(on_device, (x, segment_ids), (TOKENS, TOKENS), (TOKENS, TOKENS))
    return x, Unbroken(ids)


def restored(x: Shaped[Array, "B T ..."], segment_ids: BT) -> Shaped[Array, "B T ..."]:
    """Return what is of `compacted` tokens in the order that they had with these ids."""

    def on_device(x: Array, segment_ids: BT) -> Array:
        return segments.Order.of(segment_ids).moved_back(x)

    return sharded.per_shard(on_device, (x, segment_ids), (TOKENS, TOKENS), (TOKENS,))


def numbered(segment_ids: SegmentIds) -> BT:
    """Return `segments.numbered`; where tokens lie over devices, each numbers those of its piece."""
    if pieces(calls.PositionsCall(segments.ids_of(segment_ids))) == 1:
        return segments.numbered(segment_ids)
    return sharded.per_shard(numbers_over_pieces, (segment_ids,), (TOKENS,), (TOKENS,))


def numbers_over_pieces(segment_ids: SegmentIds) -> BT:
    """Return `segments.numbered` of whole rows for the piece of them that a device has."""

    def join(earlier: Any, later: Any) -> Any:
        """Return of two pieces the first and the last id, and the number of documents."""
        (first, last, count), (next_first, next_last, more) = earlier, later
        goes_on = (last == next_first) & (last != 0)
        ends = jnp.where(first == 0, next_first, first), jnp.where(next_last == 0, last, next_last)
        return *ends, count + more - goes_on

    numbers = segments.numbered(segment_ids)
    first, last = segments.first_id(segment_ids), segments.last_id(segment_ids)
    _, latest, count = sharded.before(join, (first, last, numbers.max(axis=1)))
    earlier = count - ((latest == first) & (first != 0))
    return jnp.where(numbers == 0, 0, numbers + earlier[:, None])


def _before(tokens: Any, segment_ids: BT | None, width: int) -> tuple[Any, Ids]:
    """Return the last real tokens before a piece and their ids, zeros in front where there are fewer."""
    own = _latest(tokens, segment_ids, width)
    if segment_ids is None and width <= jax.tree.leaves(tokens)[0].shape[1]:
        return sharded.from_before(own, 1)

    def join(earlier: Any, later: Any) -> tuple[Any, Ids]:
        tokens, ids = jax.tree.map(lambda *both: jnp.concatenate(both, axis=1), earlier, later)
        return _latest(tokens, ids, width)

    return sharded.before(join, own)


def _latest(tokens: Any, ids: Ids | None, width: int) -> tuple[Any, Ids]:
    """Return the last real tokens of rows and their ids, zeros in front where there are fewer; all are without ids."""
    rows, length = jax.tree.leaves(tokens)[0].shape[:2]
    if ids is None:
        last = jax.tree.map(lambda x: _filled(x[:, -width:], width), tokens)
        return last, _filled(jnp.ones((rows, min(length, width)), jnp.int32), width)
    places = jnp.sort(jnp.where(ids != 0, jnp.arange(length)[None], -1), axis=1)[:, -width:]
    places = _filled(places, width, -1)

    def taken(x: Array) -> Array:
        there = expand(places, x.ndim)
        return jnp.where(there < 0, 0, jnp.take_along_axis(x, jnp.maximum(there, 0), axis=1))

    return jax.tree.map(taken, tokens), taken(ids)


def _filled(x: Shaped[Array, "B _ ..."], width: int, value: int = 0) -> Shaped[Array, "B {width} ..."]:
    """Return tokens behind others of a value, so many together."""
    return jnp.pad(x, [(0, 0), (width - x.shape[1], 0), *((0, 0),) * (x.ndim - 2)], constant_values=value)


def _continues(segment_ids: BT | None) -> Bool[Array, "#B"]:
    """Return whether a piece's first document is one with the last before it; padding goes on with any."""
    if segment_ids is None:
        return jnp.ones(1, bool)
    latest = sharded.before(lambda earlier, later: jnp.where(later == 0, earlier, later), segments.last_id(segment_ids))
    first = segments.first_id(segment_ids)
    return (first == latest) | (first == 0) | (latest == 0)


def _is_one_document(segment_ids: BT | None) -> Bool[Array, "#B"]:
    """Return whether no document begins within a piece behind another one."""
    if segment_ids is None:
        return jnp.ones(1, bool)
    return ~segments.begins_later(segments.numbered(segment_ids)).any(axis=1)


def _select(mask: Bool[Array, "..."], yes: Any, no: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(expand(mask, a.ndim), a, b), yes, no)
