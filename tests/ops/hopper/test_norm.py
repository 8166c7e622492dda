"""The norm's Hopper kernel as far as a CPU can tell: refusals, lowering for an H100, and the interpreter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.cases import parametrize_some
from helpers.devices import gpus
from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import get_races
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AxisType, PartitionSpec

from based_jax.errors import UserError
from based_jax.ops import norm
from based_jax.ops.calls import NormCall
from based_jax.ops.hopper import norm as hopper_norm
from based_jax.ops.norm import residual_layer_norm, residual_rms_norm

KINDS = (False, True), (True, True), (True, False), (False, False)
"""Whether a norm is centered, and whether it adds."""
FILLED = (2, 11, 600)
"""Whose rows end before those of a tile do, two of which are a tile."""


@pytest.mark.parametrize(
    "shape, dtype, words",
    [
        ((2, 512, 256), "float32", "y must be bfloat16, and is float32"),
        ((2, 513, 192), "bfloat16", "or of 32 from 64 for a multiple of 4 tokens, and are 192 for 1026 tokens"),
        ((2, 512, 48), "bfloat16", "a multiple of 8 from 512 to 4096, or of 128, .* and are 48 for 1024"),
        ((2, 512, 1684), "bfloat16", "and are 1684"),
        ((2, 512, 8192), "bfloat16", "and are 8192"),
        ((2, 128, 256), "bfloat16", "1024 tokens, and are 256"),
    ],
)
def test_refusals_name_the_value(shape, dtype, words):
    arguments = jnp.zeros(shape), jnp.zeros(shape, dtype), jnp.zeros(shape[-1])
    with gpus(), pytest.raises(UserError, match=words):
        residual_rms_norm(*arguments, impl="hopper_rows")


def test_a_mesh_with_explicit_axes_needs_shard_map():
    r = jnp.zeros((2, 512, 256))
    call = NormCall(r, r.astype(jnp.bfloat16), jnp.zeros(256), None, 1e-5, jnp.dtype("bfloat16"))
    with gpus(shape=(2,), axes=AxisType.Explicit):
        assert "shard_map" in hopper_norm.supports(call)
    with gpus(shape=(2,)):
        assert hopper_norm.supports(call) is None


@parametrize_some(
    "shape, lanes, centered, adds",
    [
        (*sizes, *kind)
        for sizes in (((8, 2048, 1024), None), ((8, 2048, 1680), None), ((3, 1025, 128), 2), ((4, 512, 64), 2))
        for kind in KINDS
    ],
    {
        ((8, 2048, 1024), None, False, True),
        ((8, 2048, 1680), None, False, True),
        ((3, 1025, 128), 2, True, True),
        ((4, 512, 64), 2, True, False),
    },
)
def test_lowers_for_an_h100(shape, lanes, centered, adds):
    def loss(r, y, scale, bias):
        of_bias = (residual_layer_norm, bias) if centered else (residual_rms_norm,)
        total, x = of_bias[0](r, y, scale, *of_bias[1:], dtype=jnp.bfloat16)
        return total.sum() + x.astype(jnp.float32).sum()

    def like(size, dtype=jnp.float32):
        return jax.ShapeDtypeStruct((*(() if lanes is None else (lanes,)), *size), dtype)

    y, bias = like(shape, jnp.bfloat16) if adds else None, like(shape[-1:]) if centered else None
    both = jax.value_and_grad(loss, argnums=(0, 1, 2, 3))
    with gpus():
        traced = jax.jit(both if lanes is None else jax.vmap(both)).trace(like(shape), y, like(shape[-1:]), bias)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "residual_norm_forward" in text and "residual_norm_backward" in text


@pytest.mark.parametrize("time, devices, taken", [(1025, 1, True), (1025, 8, False), (1028, 8, True)])
def test_a_shard_has_the_rows_that_a_tile_takes(time, devices, taken):
    r, weights = jnp.zeros((8, time, 64)), jnp.zeros(64)
    with gpus(shape=(devices,)):
        reason = hopper_norm.supports(NormCall(r, None, weights, weights, 1e-5, jnp.dtype("bfloat16")))
        assert (reason is None) == taken
        call = jax.jit(lambda r: residual_layer_norm(r, None, weights, weights, dtype=jnp.bfloat16)[1])
        assert ("residual_norm" in call.trace(r).lower(lowering_platforms=("cuda",)).as_text()) == taken


def test_lowers_under_shard_map():
    """The scale is the same on all devices: its gradients are summed over them."""

    def gradients(r, y, scale):
        def loss(*args):
            total, x = residual_rms_norm(*args, impl="hopper_rows")
            return total.sum() + x.astype(jnp.float32).sum()

        return jax.grad(loss, argnums=(0, 1, 2))(r, y, scale)

    data, everywhere = PartitionSpec("data"), PartitionSpec()
    specs = (data, data, everywhere)
    r = jnp.zeros((4, 512, 256))
    with gpus(shape=(2,)):
        sharded = jax.shard_map(gradients, in_specs=specs, out_specs=specs)
        traced = jax.jit(sharded).trace(r, r.astype(jnp.bfloat16), jnp.zeros(256))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "residual_norm_backward" in text and "all_reduce" in text


@parametrize_some(
    "shape, centered, adds",
    [(shape, *kind) for shape in ((2, 35, 1024), (1, 37, 384), (4, 160, 128), (2, 66, 64), FILLED) for kind in KINDS],
    {
        ((1, 37, 384), True, False),
        ((4, 160, 128), False, True),
        ((2, 66, 64), False, False),
        (FILLED, True, True),
    },
)
def test_kernels_equal_fp64(normal, out_and_grads, shape, centered, adds):
    """In Pallas' interpreter, which looks for races."""
    r, scale = 1 + normal(*shape), normal(shape[-1])
    y, bias = normal(*shape, dtype="bfloat16") if adds else None, normal(shape[-1]) if centered else None
    cotangents = normal(*shape), normal(*shape, dtype="bfloat16")

    def run(impl, dtype):
        def call(r, y, scale, bias):
            return impl(NormCall(r, y, scale, bias, 1e-5, jnp.dtype(dtype)))

        arrays = r, None if y is None else np.asarray(y, jnp.dtype(dtype)), scale, bias
        return out_and_grads(call, arrays, (cotangents[0], np.asarray(cotangents[1], jnp.dtype(dtype))))

    expected = run(norm._xla, "float32")
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        got = run(hopper_norm.compute, "bfloat16")
    for ours, right in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        wide, right = (np.asarray(z, np.float64) for z in (ours, right))
        limit = 5e-3 if ours.dtype == jnp.bfloat16 else 1e-5
        assert np.linalg.norm(wide - right) <= limit * np.linalg.norm(right)
    assert not get_races().races_found
