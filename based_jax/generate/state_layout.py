"""Where caches have what of one sequence: states are taken out of them, and go on in others."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from based_jax.errors import UserError
from based_jax.generate.decoder import Caches, Decoder
from based_jax.generate.prefill import prefill
from based_jax.generate.prompts import checked_ids
from based_jax.generate.state import State

TOKEN_BLOCK = 64
"""What grows with the sequence is kept for a multiple of so many tokens: few shapes are few programs."""


class RowShapes(NamedTuple):
    """The caches of one row, without the axis of the rows: their tree, and the shape and dtype of each leaf by name."""

    structure: Any
    arrays: dict[str, jax.ShapeDtypeStruct]


class StateLayout:
    """Takes states out of caches, and makes caches that go on from a state.

    A state has the same arrays whatever room its caches had, but for the blocks of `TOKEN_BLOCK` tokens.

    Args:
      decoder: the model, of which no parameter is read but for its fingerprint.
    """

    def __init__(self, decoder: Decoder):
        self.decoder = decoder
        self._row_shapes = functools.lru_cache(maxsize=8)(self._shapes)
        one, two = (self._row_shapes(max_len).arrays for max_len in (1, 2))
        self._token_axes = {name: _differing_axis(x.shape, two[name].shape) for name, x in one.items()}

    @property
    def kinds(self) -> tuple[str, ...]:
        """The mixer of each layer."""
        return tuple(kind for kind, _ in self.decoder.config.layers)

    def take(self, caches: Caches, length: int, *, row: int = 0) -> State:
        """Return the state of one row of caches, of any number of rows and with any room, that has read `length`."""
        grows = any(axis is not None for axis in self._token_axes.values())
        tokens = -(-length // TOKEN_BLOCK) * TOKEN_BLOCK if grows else 0  # one program where nothing does
        return State(
            _taken(tuple(self._token_axes.items()), tokens, caches, row), self.kinds, length, self.decoder.fingerprint
        )

    def fork(self, state: State, max_len: int, rows: int = 1) -> Caches:
        """Return caches of rows that go on from the state, each with a copy of its own and room for `max_len` tokens.

        Raises:
          UserError: the state is another model's, or has read more than there is room for.
        """
        self.check(state, max_len)
        structure, like = self._row_shapes(max_len)
        shapes = tuple(x.shape for x in like.values())
        return _forked(structure, shapes, rows, [state.arrays[name] for name in like])

    def put(self, caches: Caches, row: int, state: State) -> Caches:
        """Return caches of which one row goes on from a state, which has been checked; those given are used up."""
        return _put(caches, np.int32(row), dict(state.arrays))

    def check(self, state: State, max_len: int) -> None:
        """Raise UserError for a state of another model, or of more tokens than caches for `max_len` have room for."""
        if state.model != self.decoder.fingerprint:
            both = f"The state is of model {state.model}; this model is {self.decoder.fingerprint}"
            raise UserError(f"{both}, with its weights, dtype, flush and state_dtype.")
        expected = self._row_shapes(max_len).arrays
        for name in sorted(expected.keys() ^ state.arrays.keys()):
            raise UserError(f"'{name}' is not both in the state and in the model's caches, whose options differ.")
        for name, like in expected.items():
            if (state.arrays[name].shape, state.arrays[name].dtype) != (like.shape, like.dtype):
                self._check_array(name, state, like)

    def _check_array(self, name: str, state: State, like: jax.ShapeDtypeStruct) -> None:
        """Raise UserError for an array of another shape or dtype than the cache's, unless it has the room to fit."""
        x, axis = state.arrays[name], self._token_axes[name]
        if axis is None or x.dtype != like.dtype or _without(axis, x.shape) != _without(axis, like.shape):
            raise UserError(
                f"'{name}' of the state is {x.dtype}{list(x.shape)}; the cache's is {like.dtype}{list(like.shape)}."
            )
        room = min(x.shape[axis], like.shape[axis])
        if state.length > room:
            raise UserError(f"The state has read {state.length} tokens, and '{name}' has room for {room}.")

    def _shapes(self, max_len: int) -> RowShapes:
        row = self.decoder.row_shapes(max_len)
        return RowShapes(jax.tree.structure(row), dict(named(row)))


def state_after(decoder: Decoder, ids: Sequence[int] | np.ndarray, state: State | None = None) -> State:
    """Return the state after these tokens (T), which may go on from another.

    Raises:
      UserError: the state is another model's, or the tokens are none of the model's, or more than it reads.
    """
    ids = checked_ids("The text", ids, decoder.config.vocab_size) if len(ids) else ids
    layout, before = StateLayout(decoder), 0 if state is None else state.length
    length = before + len(ids)
    if decoder.max_len is not None and length > decoder.max_len:
        raise UserError(f"The state would have read {length} tokens; the model reads {decoder.max_len}.")
    room = -(-max(length, 1) // TOKEN_BLOCK) * TOKEN_BLOCK
    room = room if decoder.max_len is None else min(room, decoder.max_len)
    caches = decoder.init_cache(1, room) if state is None else layout.fork(state, room)
    return layout.take(prefill(decoder, caches, [np.asarray(ids, np.int32)]), length)


def named(caches: Caches) -> list[tuple[str, Any]]:
    """Return the leaves of caches by name, "layers/3/state/...", in the order of the tree."""
    layers = [layer for stack in caches for layer in stack]
    leaves = jax.tree_util.tree_leaves_with_path(layers)
    return [(f"layers/{jax.tree_util.keystr(path, simple=True, separator='/')}", leaf) for path, leaf in leaves]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _taken(token_axes: tuple, tokens: int, caches: Caches, row) -> dict[str, Array]:
    """Return the arrays of one row by name, those that grow with the sequence for its first tokens alone."""

    def held(x: Array, axis: int | None) -> Array:
        return x if axis is None else jax.lax.slice_in_dim(x, 0, min(x.shape[axis], tokens), axis=axis)

    axes = dict(token_axes)
    return {name: held(x[row], axes[name]) for name, x in named(caches)}


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _forked(structure: Any, shapes: tuple, rows: int, arrays: list) -> Caches:
    """Return caches of equal rows from the arrays of one, cut or filled with zeros to `shapes`."""

    repeated = [
        jnp.broadcast_to(_fitted(x, shape)[None], (rows, *shape)) for x, shape in zip(arrays, shapes, strict=True)
    ]
    return structure.unflatten(repeated)


def with_state(caches: Caches, row: Array, arrays: Mapping[str, Array]) -> Caches:
    """Return caches of which one row has the arrays of a state, cut or filled with zeros."""
    leaves = [x.at[row].set(_fitted(arrays[name], x.shape[1:])) for name, x in named(caches)]
    return jax.tree.unflatten(jax.tree.structure(caches), leaves)


_put = jax.jit(with_state, donate_argnums=0)


def _fitted(x: Array, shape: tuple) -> Array:
    """Return an array cut or filled with zeros to a shape."""
    if x.shape == shape:
        return x
    x = x[tuple(map(slice, shape))]
    return jnp.pad(x, [(0, size - there) for size, there in zip(shape, x.shape, strict=True)])


def _differing_axis(one: tuple, two: tuple) -> int | None:
    """Return the axis in which two shapes differ, or None."""
    return next((axis for axis, (a, b) in enumerate(zip(one, two, strict=True)) if a != b), None)


def _without(axis: int, shape: tuple) -> tuple:
    return shape[:axis] + shape[axis + 1 :]
