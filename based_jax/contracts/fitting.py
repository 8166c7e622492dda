"""What a mixer is fitted in: a size, inputs, compiled passes, and how close two of them have to be."""

import functools
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from based_jax.nn.mixer import Mixer
from based_jax.nn.mixers import kind_of, make_mixer

ROWS, TOKENS, LONGEST = 9, 9, 40
"""Of inputs; the last is the sequence that every cache has room for, so that one step is compiled for all."""
D_MODEL, STD = 16, 0.2
"""A width at which a mixer is quick, and a deviation of its projections at which nothing hides in a tolerance."""
TOLERANCE, FLOOR = 1e-5, 1e-6
"""Of fp32: relative to the largest entry, and what is forgiven whatever that is."""


class BrokenContractError(AssertionError):
    """A mixer does not do what a contract says; the message is one sentence on what it does instead."""


def require(kept: Any, broken: str) -> None:
    """Raise BrokenContractError with a sentence unless the contract is kept."""
    if not kept:
        raise BrokenContractError(broken)


call = jax.jit(lambda mixer, x, ids=None: mixer(x, ids))
prefill = jax.jit(lambda mixer, x, cache, ids=None: mixer.prefill(x, cache, ids), donate_argnames="cache")
step = jax.jit(lambda mixer, x, cache: mixer.step(x, cache), donate_argnames="cache")


class Fitting:
    """A mixer at a small size, with random inputs of its own.

    Args:
      mixer: its name, or its class.
      options: of its Config, for those whose defaults are too large at this width.
      d_model: width D.
      rng: where inputs come from.

    Raises:
      UserError: the mixer is unknown or incomplete, or an option is.
    """

    def __init__(
        self,
        mixer: str | type,
        options: Mapping[str, Any] | None = None,
        *,
        d_model: int = D_MODEL,
        rng: np.random.Generator | None = None,
    ):
        self.kind, self.options, self.d_model = kind_of(mixer), dict(options or {}), d_model
        self.rng = np.random.default_rng(0) if rng is None else rng
        self.mixer = self.mixer_of()  # in fp32; not first in what is traced, since it is kept

    def mixer_of(self, seed: int = 0, dtype: Any = jnp.float32) -> Mixer:
        """Return the mixer with parameters of a seed, computing in a dtype."""
        return _mixer(self.kind, json.dumps(self.options, sort_keys=True), self.d_model, seed, dtype)

    def build(self, **options) -> Mixer:
        """Return the mixer with other options and a small start, to be traced."""
        return make_mixer(self.kind, self.d_model, rngs=nnx.Rngs(0), **{**self.options, **options})

    def normal(self, *shape: int) -> np.ndarray:
        """Return Gaussian inputs."""
        return self.rng.standard_normal(shape).astype(np.float32)

    def empty(self, room: int = LONGEST) -> Any:
        """Return a cache of `ROWS` rows before the first token."""
        return self.mixer.init_cache(ROWS, room)

    def read(self, x: Any, cache: Any) -> np.ndarray:
        """Return the outputs of x read token by token."""
        return self.decode(x, cache)[0]

    def decode(self, x: Any, cache: Any) -> tuple[np.ndarray, Any]:
        """Return the outputs of x read token by token, and the cache after them."""
        outputs = []
        for t in range(x.shape[1]):
            y, cache = step(self.mixer, x[:, t], cache)
            outputs.append(y)
        return np.stack(outputs, axis=1), cache


@functools.cache
def _mixer(kind: str, options: str, d_model: int, seed: int, dtype: Any) -> Mixer:
    start = {"std": STD, "out_std": STD, "dtype": dtype, "rngs": nnx.Rngs(seed)}
    return make_mixer(kind, d_model, **start, **json.loads(options))


def close(actual: Any, expected: Any, what: str) -> None:
    """Require that two trees agree relative to the largest entry of each expected leaf; `what` are the first's."""
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    for a, e in ((np.asarray(a, np.float64), np.asarray(e, np.float64)) for a, e in pairs):
        require(a.shape == e.shape, f"{what} have shape {a.shape}, and not {e.shape}.")
        with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is off by NaN
            error, scale = np.abs(a - e).max(initial=0), np.abs(e).max(initial=0)
        require(error <= TOLERANCE * scale + FLOOR, f"{what} are off by {error:.2e}, where the largest is {scale:.2e}.")


def same(actual: Any, expected: Any, what: str) -> None:
    """Require that two trees are equal bit for bit; `what` is the first."""
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    require(all(np.array_equal(a, e, equal_nan=True) for a, e in pairs), f"{what} differ in a bit.")
