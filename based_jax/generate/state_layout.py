"""Where caches have what of one sequence: states are taken out of them, and go on in others."""

import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Shaped, UInt32

from based_jax import config as configs
from based_jax.errors import UserError
from based_jax.generate.state import State
from based_jax.nn.lm import LM
from based_jax.nn.lm_config import LMConfig

TOKEN_BLOCK = 64
"""What grows with the sequence is kept for a multiple of so many tokens: few shapes are few programs."""
TRAINING_FIELDS = ("scan_layers", "remat", "init_std", "init_recipe", "embed_dropout")
"""Fields of a model's config that change nothing of what it reads."""
UINTS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}
ODD = (2654435761, 2246822519)
"""Multipliers of places, one for each sum of a parameter's bits."""


class StateLayout:
    """Takes states out of caches, and makes caches that go on from a state. Layers are not stacked.

    A state has the same arrays whatever room its caches had, but for the blocks of `TOKEN_BLOCK` tokens.

    Attributes:
      init_cache: makes caches before the first token, for a number of rows and with room for a number of tokens.
      kinds: the mixer of each layer.
      fingerprint: of the model.
    """

    def __init__(self, init_cache: Callable[[int, int], tuple], kinds: Sequence[str], fingerprint: str):
        self.init_cache, self.kinds, self.fingerprint = init_cache, tuple(kinds), fingerprint
        self._row_like = functools.lru_cache(maxsize=8)(self._shapes)
        one, two = (dict(named(self._row_like(max_len))) for max_len in (1, 2))
        self._token_axes = {name: _differing_axis(x.shape, two[name].shape) for name, x in one.items()}

    @classmethod
    def of(cls, model: LM) -> "StateLayout":
        """Return the layout of a model's caches; the fingerprint reads every parameter, once."""
        kinds = [kind for kind, _ in model.config.layers]
        return cls(model.init_cache, kinds, fingerprint(model.config, nnx.state(model, nnx.Param)))

    def take(self, caches: tuple, length: int, *, row: int = 0) -> State:
        """Return the state of one row of caches, of any number of rows and with any room, that has read `length`."""
        tokens = -(-length // TOKEN_BLOCK) * TOKEN_BLOCK
        return State(_taken(tuple(self._token_axes.items()), tokens, caches, row), self.kinds, length, self.fingerprint)

    def fork(self, state: State, max_len: int, rows: int = 1) -> tuple:
        """Return caches of rows that go on from the state, each with a copy of its own and room for `max_len` tokens.

        Raises:
          UserError: the state is another model's, or has read more than there is room for.
        """
        self.check(state, max_len)
        like = self._row_like(max_len)
        leaves, structure = jax.tree.flatten(like)
        shapes = tuple(x.shape for x in leaves)
        return _forked(structure, shapes, rows, [state.arrays[name] for name, _ in named(like)])

    def check(self, state: State, max_len: int) -> None:
        """Raise UserError for a state of another model, or of more tokens than caches for `max_len` have room for."""
        if state.model != self.fingerprint:
            raise UserError(f"The state is of model {state.model}; this model is {self.fingerprint}.")
        expected = dict(named(self._row_like(max_len)))
        for name in sorted(expected.keys() ^ state.arrays.keys()):
            raise UserError(f"'{name}' is not both in the state and in the model's caches, whose options differ.")
        for name, like in expected.items():
            self._check_array(name, state, like)

    def _check_array(self, name: str, state: State, like: jax.ShapeDtypeStruct) -> None:
        x, axis = state.arrays[name], self._token_axes[name]
        if x.dtype != like.dtype or _without(axis, x.shape) != _without(axis, like.shape):
            raise UserError(
                f"'{name}' of the state is {x.dtype}{list(x.shape)}; the cache's is {like.dtype}{list(like.shape)}."
            )
        if axis is not None and x.shape[axis] != like.shape[axis]:
            room = min(x.shape[axis], like.shape[axis])
            if state.length > room:
                raise UserError(f"The state has read {state.length} tokens, and '{name}' has room for {room}.")

    def _shapes(self, max_len: int) -> tuple:
        """Return the shapes and dtypes of one row of caches, without the axis of the rows."""
        return jax.eval_shape(lambda: jax.tree.map(lambda x: x[0], self.init_cache(1, max_len)))


def named(caches: tuple) -> list[tuple[str, Any]]:
    """Return the leaves of caches by name, "layers/3/state/...", in the order of the tree."""
    layers = [layer for stack in caches for layer in stack]
    leaves = jax.tree_util.tree_leaves_with_path(layers)
    return [(f"layers/{jax.tree_util.keystr(path, simple=True, separator='/')}", leaf) for path, leaf in leaves]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _taken(token_axes: tuple, tokens: int, caches: tuple, row) -> dict[str, Array]:
    """Return the arrays of one row by name, those that grow with the sequence for its first tokens alone."""

    def held(x: Array, axis: int | None) -> Array:
        return x if axis is None else jax.lax.slice_in_dim(x, 0, min(x.shape[axis], tokens), axis=axis)

    axes = dict(token_axes)
    return {name: held(x[row], axes[name]) for name, x in named(caches)}


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _forked(structure: Any, shapes: tuple, rows: int, arrays: list) -> tuple:
    """Return caches of equal rows from the arrays of one, cut or filled with zeros to `shapes`."""

    def fitted(x: Array, shape: tuple) -> Array:
        if x.shape != shape:
            x = x[tuple(map(slice, shape))]
            x = jnp.pad(x, [(0, size - there) for size, there in zip(shape, x.shape, strict=True)])
        return jnp.broadcast_to(x[None], (rows, *shape))

    return structure.unflatten(map(fitted, arrays, shapes))


def _differing_axis(one: tuple, two: tuple) -> int | None:
    """Return the axis in which two shapes differ, or None."""
    return next((axis for axis, (a, b) in enumerate(zip(one, two, strict=True)) if a != b), None)


def _without(axis: int | None, shape: tuple) -> tuple:
    return shape if axis is None else shape[:axis] + shape[axis + 1 :]


def fingerprint(config: LMConfig, params: nnx.State) -> str:
    """Return 32 hexadecimal digits of all that decides what a model reads: its config, and each bit of its parameters.

    It tells models apart that differ by accident; it is no signature.
    """
    fields = {name: value for name, value in configs.to_dict(config).items() if name not in TRAINING_FIELDS}
    layers = [(kind, {k: v for k, v in options.items() if k != "impl"}) for kind, options in fields["layers"]]
    sums = {"/".join(map(str, path)): x.tolist() for path, x in nnx.to_flat_state(jax.device_get(_bit_sums(params)))}
    text = json.dumps([fields | {"layers": layers}, sums], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


@jax.jit
def _bit_sums(params: nnx.State) -> nnx.State:
    """Return two sums modulo 2^32 of each parameter's bits, weighted by odd numbers that go by the place."""
    return jax.tree.map(_sums_of, params)


def _sums_of(x: Shaped[Array, "..."]) -> UInt32[Array, "2"]:
    bits = jax.lax.bitcast_convert_type(x, UINTS[x.dtype.itemsize]).astype(jnp.uint32)
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis in range(x.ndim):
        place = place * jnp.uint32(ODD[0]) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    weights = [((place ^ (place >> 15)) * jnp.uint32(odd)) | jnp.uint32(1) for odd in ODD]
    return jnp.stack([jnp.sum(bits * weight, dtype=jnp.uint32) for weight in weights])
