"""Mixers whose tokens lie over devices: values and gradients of one device, and what the devices exchange."""

import functools
import math

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from helpers.cases import parametrize_some
from helpers.documents import rows_over_pieces
from helpers.hlo import Program
from helpers.small_mixers import SMALL

from based_jax import parallel
from based_jax.errors import UserError
from based_jax.nn.mixers import MIXERS, make_mixer

B, T, D = 4, 32, 16

REFUSED = "hyena", "implicit_conv", "long_conv"
"""What convolves with a filter as long as the row."""
CUT = sorted(MIXERS.keys() - set(REFUSED))

OPTIONS = SMALL | {"prefix": {**SMALL["prefix"], "enc_length": 11}}  # which ends within a piece

MESHES = [{"data": 2, "sequence": 4}, {"data": 1, "sequence": 8}, {"data": 1, "tensor": 2, "sequence": 4}]

on_some = parametrize_some(
    "kind, sizes, packed",
    [(kind, sizes, packed) for kind in CUT for sizes in MESHES for packed in (False, True)],
    [("conv", MESHES[2], True), ("taylor", MESHES[0], False)],
    ids=str,
)


@functools.cache
def mixer_of(kind):
    return make_mixer(kind, D, std=0.2, out_std=0.2, rngs=nnx.Rngs(0), **OPTIONS.get(kind, {}))


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
    """And no device gathers the tokens of others, nor their ids."""
    ids = jnp.asarray(rows_over_pieces(rng, T)) if packed else None
    x, cotangent = normal(B, T, D), normal(B, T, D)
    params, call = both_ways(kind, ids, cotangent)
    mesh = parallel.make_mesh(sizes)
    compiled, arguments = on_mesh(mesh, call, params, x, ids)
    close(compiled(*arguments), jax.jit(call)(params, x, ids))
    exchanged = Program(compiled.as_text()).exchanged(tuple(mesh.shape.values()), parallel.AXES.index("sequence"))
    assert any(found.kind == "collective-permute" for found in exchanged)
    assert not [x for x in exchanged if x.kind in ("all-gather", "all-to-all") and math.prod(x.shape) >= B * T]


@parametrize_some("kind", REFUSED, ["long_conv"])
def test_others_are_refused(kind):
    with jax.set_mesh(parallel.make_mesh(MESHES[0])), pytest.raises(UserError, match="for long_conv, which needs all"):
        jax.eval_shape(mixer_of(kind), jnp.ones((B, T, D)))
