"""States of documents add: a long context is read in pieces at the same time, and their states are summed.

A linear layer's state is a sum over its tokens, phi(k_j) [v_j, 1]^T, so that the sum of the pieces' states is the state
of them all, exactly, for the keys and values that the pieces have. These are the same as in one reading in the first
linear layer alone, and there behind the first tokens of a piece, which short convolutions and windows before it see
without those to the left, unless each piece begins with an overlap of them. Deeper layers' are not: no piece has seen
another, which is the meaning of it (documents encoded in parallel, arXiv 2402.16617), and the difference to one reading
is measured (`experiments/state_addition`).

Convolutions and windows keep what they have of the last piece. Positions: Taylor states have none. Rotary's scores
depend on distances alone, and a window's places are those in the last piece, from its own first token on, for what it
holds as for what follows. Maps that know their place (cosformer) count from the beginning of the context.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from based_jax.dims import BHEV
from based_jax.errors import UserError
from based_jax.generate.decoder import Caches, Decoder
from based_jax.generate.prefill import prefill
from based_jax.generate.state import State
from based_jax.generate.state_layout import StateLayout
from based_jax.nn.cache import Cache
from based_jax.ops.taylor_decode import holding, total


class Addable(NamedTuple):
    """How a mixer's states add.

    Attributes:
      sums: returns the sums that a state holds.
      with_sums: returns a state with other sums.
      beginning: returns a state before the first token of a piece that begins at a place of the context.
    """

    sums: Callable[[Any], BHEV]
    with_sums: Callable[[Any, BHEV], Any]
    beginning: Callable[[Any, Int[Array, "B"]], Any]


ADDABLE = {
    "taylor": Addable(total, lambda state, sums: holding(sums, state), lambda state, _: state),
    "linear": Addable(
        lambda state: state[0], lambda state, sums: (sums, state[1]), lambda state, place: (state[0], place)
    ),
}
OF_RECENT_TOKENS = ("base_conv", "conv", "window")
"""Mixers whose states are of the newest tokens: that of the last piece is kept."""


def add(decoder: Decoder, states: Sequence[State]) -> State:
    """Return the state of documents of which none has seen another, from that of each; what follows follows the last.

    Raises:
      UserError: there is no state, one is of another model, or the model has layers whose states do not add.
    """
    check_adds(decoder)
    if not states:
        raise UserError("There is no state to add; give at least one.")
    layout = StateLayout(decoder)
    each = [layout.fork(state, 1) for state in states]
    caches = jax.tree.map(lambda *rows: jnp.concatenate(rows), *each)
    added = _with_sums(layout.kinds, caches, _summed(layout.kinds, caches))
    return layout.take(added, sum(state.length for state in states))


def prefill_in_pieces(decoder: Decoder, ids: Sequence[int] | np.ndarray, pieces: int, *, overlap: int = 0) -> State:
    """Return the sum of the states of the pieces of a context, which are read at the same time, as rows of a batch.

    Args:
      decoder: the model.
      ids: the context (T).
      pieces: how many, of equal lengths but for one token.
      overlap: tokens before each piece that it sees, and that its state leaves out: at least as many as the layers
        before the first linear one see to the left makes that layer's state exact.

    Raises:
      UserError: a number is out of range, or the model has layers whose states do not add.
    """
    check_adds(decoder)
    ids = np.asarray(ids, np.int32)
    if not 1 <= pieces <= len(ids):
        raise UserError(f"pieces is {pieces}; a context of {len(ids)} tokens has 1 to {len(ids)}.")
    if overlap < 0:
        raise UserError(f"overlap is {overlap}; it is at least 0.")
    parts = np.array_split(ids, pieces)
    begins = np.cumsum([0, *map(len, parts[:-1])])
    seen = [ids[max(0, begin - overlap) : begin] for begin in begins]
    layout = StateLayout(decoder)
    caches = _begun(layout.kinds, decoder.init_cache(pieces, 1), begins - [len(tokens) for tokens in seen])
    caches = prefill(decoder, caches, seen) if overlap else caches
    before = _summed(layout.kinds, caches)
    caches = prefill(decoder, caches, parts)
    sums = jax.tree.map(jnp.subtract, _summed(layout.kinds, caches), before)
    return layout.take(_with_sums(layout.kinds, caches, sums), len(ids))


def check_adds(decoder: Decoder) -> None:
    """Raise UserError for a model with a layer whose states do not add."""
    for layer, (kind, _) in enumerate(decoder.config.layers):
        if kind not in ADDABLE and kind not in OF_RECENT_TOKENS:
            raise UserError(
                f"layers[{layer}] is '{kind}', whose states do not add; those of {', '.join(ADDABLE)} do, and of"
                f" {', '.join(OF_RECENT_TOKENS)} that of the last piece is kept."
            )


@functools.partial(jax.jit, static_argnums=0)
def _begun(kinds: tuple[str, ...], caches: Caches, places: Int[Array, "B"]) -> Caches:
    """Return the caches of pieces that begin at these places."""

    def begun(kind: str, cache: Cache) -> Cache:
        return cache._replace(state=ADDABLE[kind].beginning(cache.state, places)) if kind in ADDABLE else cache

    return tuple((begun(kind, cache),) for kind, (cache,) in zip(kinds, caches, strict=True))


@functools.partial(jax.jit, static_argnums=0)
def _summed(kinds: tuple[str, ...], caches: Caches) -> list[BHEV]:
    """Return the sum over all rows of each layer that adds, as that of one row."""
    pairs = zip(kinds, caches, strict=True)
    return [ADDABLE[kind].sums(cache.state).sum(0, keepdims=True) for kind, (cache,) in pairs if kind in ADDABLE]


@functools.partial(jax.jit, static_argnums=0)
def _with_sums(kinds: tuple[str, ...], caches: Caches, sums: list[BHEV]) -> Caches:
    """Return the last row of caches, with these sums in the layers that add."""
    rest = iter(sums)

    def added(kind: str, cache: Cache) -> Cache:
        last = jax.tree.map(lambda x: x[-1:], cache)
        return last._replace(state=ADDABLE[kind].with_sums(last.state, next(rest))) if kind in ADDABLE else last

    return tuple((added(kind, cache),) for kind, (cache,) in zip(kinds, caches, strict=True))
