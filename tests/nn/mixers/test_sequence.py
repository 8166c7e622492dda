"""Mixers whose tokens lie over devices: values and gradients of one device, and what the devices exchange."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from helpers.cases import parametrize_some
from helpers.hlo import Program

from based_jax import parallel
from based_jax.nn.mixers import make_mixer

B, T, D = 4, 32, 16

SMALL = {
    "base_conv": {},
    "conv": {},
    "taylor": {"num_heads": 2, "feature_dim": 4},
    "window": {"num_heads": 2, "window": 4},
}
ORDINARY = ["conv", "taylor", "window"]
"""One for each cut of `ops/sequence.py`."""

MESHES = [{"data": 2, "sequence": 4}, {"data": 1, "sequence": 8}, {"data": 1, "tensor": 2, "sequence": 4}]
"""Heads that two devices divide, rows that they do, and pieces of 4 tokens, none longer than a window."""

on_some = parametrize_some(
    "kind, sizes, packed",
    [(kind, sizes, packed) for kind in SMALL for sizes in MESHES for packed in (False, True)],
    [(kind, MESHES[2], True) for kind in ORDINARY] + [("taylor", MESHES[0], False)],
    ids=str,
)


@functools.cache
def mixer_of(kind):
    return make_mixer(kind, D, std=0.2, out_std=0.2, rngs=nnx.Rngs(0), **SMALL[kind])


def rows_of_documents(rng):
    """Return ids (B, T): some that return, documents over many pieces, padding of whole pieces and within documents."""
    mixed = rng.integers(0, 3, T)
    long = np.repeat([1, 2, 0, 2], [5, 18, 6, 3])
    padded = np.repeat([0, 1, 0, 1], [9, 3, 12, 8])
    return np.stack([mixed, long, padded, np.ones(T)]).astype(np.int32)


def both_ways(kind, ids, cotangent):
    """Return (split mixer, its call with gradients), outputs of padding, which mean nothing, left out."""
    graphdef, params = nnx.split(mixer_of(kind))
    real = 1.0 if ids is None else (ids != 0)[..., None]

    def call(params, x, ids):
        y, pull = jax.vjp(lambda params, x: nnx.merge(graphdef, params)(x, ids) * real, params, x)
        return y, pull(cotangent)

    return params, call


def on_mesh(mesh, call, params, x, ids):
    """Return a call's program on a mesh, compiled, and what it takes there."""
    placed = jax.device_put(params, parallel.shardings(params, mesh))
    tokens = [None if a is None else jax.device_put(a, parallel.batch_sharding(mesh, a.shape)) for a in (x, ids)]
    with jax.set_mesh(mesh):
        return jax.jit(call).lower(placed, *tokens).compile(), (placed, *tokens)


@on_some
def test_pieces_of_time_are_those_of_one_device(kind, sizes, packed, rng, normal, close):
    """And no device gathers the tokens of others: what it gets of them is smaller than its own piece of all rows."""
    ids = jnp.asarray(rows_of_documents(rng)) if packed else None
    x, cotangent = normal(B, T, D), normal(B, T, D)
    params, call = both_ways(kind, ids, cotangent)
    mesh = parallel.make_mesh(sizes)
    compiled, arguments = on_mesh(mesh, call, params, x, ids)
    close(compiled(*arguments), jax.jit(call)(params, x, ids))
    exchanged = Program(compiled.as_text()).exchanged(tuple(mesh.shape.values()), parallel.AXES.index("sequence"))
    assert any(found.kind == "collective-permute" for found in exchanged)
    assert not [x for x in exchanged if x.kind in ("all-gather", "all-to-all") and math.prod(x.shape) >= B * T * D / 8]
