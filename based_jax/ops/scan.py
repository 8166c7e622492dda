"""The ways through a sequence with a state: token by token, and chunk by chunk. Documents are kept apart here.

An operation gives the mathematics of one token or of one chunk. What it relies on, and must hold to:

- Its inputs are zeroed at padding, and zeros must change no state: it takes log-decays, not decays.
- A state belongs to one document. `Span` says which tokens of a chunk read it, write it, and see each other.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import einops
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Shaped

from based_jax.dims import BT, SegmentIds
from based_jax.ops import segments, sharded

BLOCK_TOKENS = 8


class Span(NamedTuple):
    """Where the documents of one chunk of C tokens begin and end, as masks.

    Attributes:
      visible: query t may see key s: same document, s <= t.
      reads: the token continues the document of the state before the chunk.
      writes: the token belongs to the document of the state after the chunk.
      keeps: both states belong to the same document.
      begins: the token is its document's first, so that what came before must be forgotten.
      fresh: the state before the chunk is known to be the empty one, and need not be read.
    """

    visible: Bool[Array, "B C C"]
    reads: Bool[Array, "B C"]
    writes: Bool[Array, "B C"]
    keeps: Bool[Array, "B"]
    begins: Bool[Array, "B C"]
    fresh: bool


def over_tokens(
    step: Callable, tokens: Any, empty: Any, state: Any | None, segment_ids: SegmentIds | None
) -> tuple[Any, Any]:
    """Run `step(token, state) -> (y, state)` over time.

    Args:
      step: one token, a tree like `tokens` of (B, ...) slices.
      tokens: tree of (B, T, ...) arrays: one array, or a call's `tokens`, by name.
      empty: tree of the state before a document's first token, batch first.
      state: the state to start from, of each row's first document; `empty` where None.
      segment_ids: numbers of documents (`ops/segments.py`); one document where None.

    Returns:
      (y, state): a tree of (B, T, ...), zero at padding, and the state after each row's last document.
    """
    ids = _ids(tokens, segment_ids)
    advance, start = _tokenwise(step, tokens, empty, state, ids)
    inputs = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (_without_padding(tokens, ids), ids))
    (state, _), y = jax.lax.scan(advance, start, inputs)
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), y), state


def over_blocks(step: Callable, tokens: Any, empty: Any, state: Any | None, segment_ids: BT | None) -> tuple[Any, Any]:
    """Run `step` over time as `over_tokens` does, by blocks of `BLOCK_TOKENS` steps that XLA can fuse.

    A state is written to memory once a block, and what its steps expand not at all: the backward pass makes it anew.
    """
    ids = _ids(tokens, segment_ids)
    advance, start = _tokenwise(step, tokens, empty, state, ids)
    inputs = _without_padding(tokens, ids), ids

    def block(carry, inputs):
        outputs = []
        for t in range(inputs[1].shape[1]):
            carry, y = advance(carry, jax.tree.map(lambda x, t=t: x[:, t], inputs))
            outputs.append(y)
        return carry, jax.tree.map(lambda *y: jnp.stack(y, axis=1), *outputs)

    if ids.shape[1] <= BLOCK_TOKENS:
        (state, _), y = block(start, inputs)
        return y, state
    blocks = jax.tree.map(lambda x: split_time(x, BLOCK_TOKENS), inputs)
    (state, _), y = jax.lax.scan(jax.checkpoint(block, prevent_cse=False), start, blocks)
    return jax.tree.map(lambda x: join_time(x)[:, : ids.shape[1]], y), state


def _tokenwise(step: Callable, tokens: Any, empty: Any, state: Any | None, ids: BT) -> tuple[Callable, Any]:
    """Return a scan's body that runs `step` on one token and its id, and what it starts from: a state and its id."""
    empty, state = _vary_alike(empty, tokens), _vary_alike(state, tokens)

    def advance(carry, inputs):
        (state, owner), (token, id) = carry, inputs
        padding = id == 0
        y, stepped = step(token, _select(id == owner, state, empty))
        state = _select(padding, state, stepped)
        return (state, jnp.where(padding, owner, id)), _select(padding, _zeros(y), y)

    return advance, (empty if state is None else state, segments.first_id(ids))


def over_chunks(
    chunk: Callable, tokens: Any, empty: Any, state: Any | None, segment_ids: SegmentIds | None, length: int
) -> tuple[Any, Any]:
    """Run `chunk(tokens, state, span) -> (y, state)` over pieces of `length` tokens, the last one filled up.

    Each chunk is rematerialised in the backward pass from its inputs and the state before it, so what it expands
    exists for one chunk at a time: on a GPU that is faster, too, than to keep it. `keeps` is the chunk's to honour: a
    state that is not kept does not count.

    Args, returns: as `over_tokens`.
    """
    ids = _ids(tokens, segment_ids)
    T, fresh = ids.shape[1], state is None
    empty, state = _vary_alike(empty, tokens), _vary_alike(state, tokens)
    carry = (empty if state is None else state, segments.first_id(ids))
    tokens = _without_padding(tokens, ids)
    if length >= T:
        (state, _), y = _chunk(chunk, carry, (tokens, ids), fresh)
        return y, state

    inputs = jax.tree.map(lambda x: split_time(x, length), (tokens, ids))
    body = jax.checkpoint(lambda carry, inputs: _chunk(chunk, carry, inputs, fresh=False), prevent_cse=False)
    (state, _), y = jax.lax.scan(body, carry, inputs)
    return jax.tree.map(lambda x: join_time(x)[:, :T], y), state


def _chunk(chunk: Callable, carry: Any, inputs: Any, fresh: bool):
    (state, owner), (tokens, ids) = carry, inputs
    present = ids != 0
    last = jnp.where(present.any(axis=1), segments.last_id(ids), owner)
    reads = (ids == owner[:, None]) & present
    visible = segments.same_document(ids, ids) & jnp.tri(ids.shape[1], dtype=bool)[None]
    span = Span(
        visible=visible,
        reads=reads,
        writes=(ids == last[:, None]) & present,
        keeps=last == owner,
        begins=present & ~reads & (jnp.sum(visible, axis=2) == 1),
        fresh=fresh,
    )
    y, state = chunk(tokens, state, span)
    return (state, last), _select(~present, _zeros(y), y)


def split_time(x: Shaped[Array, "B T ..."], length: int) -> Shaped[Array, "N B C ..."]:
    """Cut time into pieces of `length`, the last one padded with zeros (id 0, so it is inert)."""
    x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % length)] + [(0, 0)] * (x.ndim - 2))
    return einops.rearrange(x, "B (N C) ... -> N B C ...", C=length)


def join_time(x: Shaped[Array, "N B C ..."]) -> Shaped[Array, "B T ..."]:
    """Put pieces of time together again."""
    return einops.rearrange(x, "N B C ... -> B (N C) ...")


def expand(mask: Array, ndim: int) -> Array:
    """Append axes of size 1 up to `ndim`, so that a mask over leading axes selects whole slices."""
    return mask.reshape(*mask.shape, *(1,) * (ndim - mask.ndim))


def _vary_alike(state: Any, tokens: Any) -> Any:
    """Return a state that varies over the devices of `jax.shard_map` as the tokens do: what a scan carries must."""
    leaves, tree = jax.tree.flatten(state)
    return jax.tree.unflatten(tree, sharded.vary_alike(*leaves, like=jax.tree.leaves(tokens)))


def _select(mask: Array, yes: Any, no: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(expand(mask, a.ndim), a, b), yes, no)


def _without_padding(tokens: Any, ids: BT) -> Any:
    return _select(ids != 0, tokens, _zeros(tokens))


def _zeros(tree: Any) -> Any:
    return jax.tree.map(jnp.zeros_like, tree)


def _ids(tokens: Any, segment_ids: SegmentIds | None) -> BT:
    """Return ids; those of one document are the same for all rows, which makes every mask small."""
    if segment_ids is None:
        return jnp.ones((1, jax.tree.leaves(tokens)[0].shape[1]), jnp.int32)
    return segments.ids_of(segment_ids)
