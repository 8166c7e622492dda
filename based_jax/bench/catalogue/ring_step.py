"""A token of attention over a ring of its last keys, in which it takes its place. It has no gradient."""

import functools

import jax
import jax.numpy as jnp

from based_jax.bench.catalogue.cached_attention import attended
from based_jax.bench.catalogue.definitions import filled
from based_jax.bench.catalogue.operation import (
    FORWARD,
    HEAD_DIM,
    Arrays,
    Case,
    Function,
    Operation,
    Shape,
    bf16,
    fp32,
    moved_bytes,
)
from based_jax.ops import ring_step

TIMED_SLOTS = 128


def _arrays(case: Case) -> dict[str, jax.ShapeDtypeStruct]:
    """Return a token's heads and a ring of S tokens before it, of `dims` (K, S); see `_length`."""
    (batch, heads), (channels, slots) = case.shape, case.dims
    ring = (batch, slots, heads, channels)
    narrow = {"heads": (batch, 3 * heads, channels), "keys": ring, "values": ring}
    return bf16(narrow) | fp32({"angles": (batch, channels // 2), "fill": (batch,)})


def _length(arrays: Arrays) -> jax.Array:
    """Return the tokens that rows have had: none, some, or many times around the ring."""
    slots = arrays["keys"].shape[1]
    return filled(arrays["fill"], slots) + jnp.where(arrays["fill"] > 1, 3 * slots, 0)


def _function(case: Case) -> Function:
    def run(arrays: Arrays, ids: jax.Array | None) -> Arrays:
        heads, keys, values, angles = (arrays[name] for name in ("heads", "keys", "values", "angles"))
        o, k, v = ring_step.ring_step(heads, keys, values, _length(arrays), angles, impl=case.impl)
        return {"o": o, "keys_after": k, "values_after": v}

    return run


def definition(arrays: Arrays, ids: jax.Array) -> Arrays:
    """Return the attention of the turned query, and the ring with the turned key and the value in their slot."""
    (q, key, value), angles = jnp.split(arrays["heads"], 3, axis=1), arrays["angles"][:, None]
    length, slots = _length(arrays), arrays["keys"].shape[1]
    is_own = jnp.arange(slots)[None] == (length % slots)[:, None]

    def turned(x: jax.Array) -> jax.Array:
        first, second = jnp.split(x, 2, axis=2)
        turn = jnp.cos(angles), jnp.sin(angles)
        return jnp.concatenate([first * turn[0] - second * turn[1], second * turn[0] + first * turn[1]], axis=2)

    def placed(ring: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.where(is_own[..., None, None], x[:, None], ring)

    k, v = placed(arrays["keys"], turned(key)), placed(arrays["values"], value)
    there = jnp.arange(slots)[None] < jnp.minimum(length + 1, slots)[:, None]
    return {"o": attended(turned(q)[:, None], k, v, there[:, None])[:, 0], "keys_after": k, "values_after": v}


def _timed(shape: Shape) -> Case:
    """Return that of B sequences, whatever their length."""
    return Case("ring_step", shape[:2], (HEAD_DIM, TIMED_SLOTS))


make = functools.partial(Case, "ring_step")
RING_STEP = Operation(
    table=ring_step.IMPLEMENTATIONS,
    arrays=_arrays,
    function=_function,
    oracle=lambda case: definition,
    # A key meets few queries: their products take no time.
    cost=lambda case, which: (moved_bytes(_arrays(case), _function(case.by("xla"))), 0.0),
    kernels={"hopper_rings": ("ring_step",)},
    cases=(
        make((5, 16), (32, 9), quick=True),
        make((3, 32), (16, 64)),
        make((2, 16), (128, 300)),
        *(make((batch, 16), (112, 129)) for batch in (1, 128)),
    ),
    small_cases=(make((2, 16), (64, 20)),),
    timed={"ring_step": _timed},
    passes=(FORWARD,),
    updates={"keys": "keys_after", "values": "values_after"},
)
