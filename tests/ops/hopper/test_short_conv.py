"""The short convolutions' Hopper kernels, plain and gated, as far as a CPU can tell."""

import functools

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
from based_jax.ops import conv, gated_conv
from based_jax.ops.calls import GatedConvCall, ShortConvCall
from based_jax.ops.conv import short_conv
from based_jax.ops.gated_conv import gated_short_conv

CALLS = {
    "plain": short_conv,
    "silu": functools.partial(short_conv, silu=True),
    "gated": gated_short_conv,
}
forms = pytest.mark.parametrize("form", CALLS)


def halves(form):
    """Return the channels of x for each of y."""
    return 1 + (form == "gated")


def kernels(form):
    """Return the names of a form's kernels."""
    name = "gated_conv" if form == "gated" else "short_conv"
    return f"{name}_forward_mosaic_gpu", f"{name}_backward_mosaic_gpu"


@forms
@pytest.mark.parametrize(
    "shape, taps, dtype, words",
    [
        ((2, 16, 128), 3, "float32", "bfloat16"),
        ((2, 16, 128), 5, "bfloat16", "2 to 4 taps, and has 5"),
        ((2, 16, 96), 3, "bfloat16", "multiple of 128, and are 96"),
        ((0, 16, 128), 3, "bfloat16", "and are 0"),
    ],
)
def test_refusals_name_the_value(form, shape, taps, dtype, words):
    x, kernel = jnp.zeros((*shape[:2], halves(form) * shape[2]), dtype), jnp.zeros((taps, shape[2]))
    with gpus(), pytest.raises(UserError, match=words):
        CALLS[form](x, kernel, impl="hopper_taps")


def test_taps_apart_are_refused():
    x, kernel = jnp.zeros((2, 16, 128), jnp.bfloat16), jnp.zeros((3, 128))
    with gpus(), pytest.raises(UserError, match="dilation must be 1, and is 2"):
        short_conv(x, kernel, dilation=2, impl="hopper_taps")


def test_a_mesh_with_explicit_axes_needs_shard_map():
    x, kernel = jnp.zeros((2, 16, 256), jnp.bfloat16), jnp.zeros((3, 128))
    calls = (conv, ShortConvCall(x[..., :128], kernel, silu=True)), (gated_conv, GatedConvCall(x, kernel))
    for module, call in calls:
        supports = module.IMPLEMENTATIONS["hopper_taps"].supports
        with gpus(shape=(2,), axes=AxisType.Explicit):
            assert "shard_map" in supports(call)
        with gpus(shape=(2,)):
            assert supports(call) is None


@parametrize_some(
    "form, time, channels, lanes",
    [(form, *sizes) for form in CALLS for sizes in ((2048, 2048, None), (13, 384, 2))],
    {("silu", 13, 384, 2), ("gated", 2048, 2048, None)},
)
def test_auto_lowers_for_an_h100(form, time, channels, lanes):
    x, kernel, bias = (
        jnp.zeros((2, time, halves(form) * channels), jnp.bfloat16),
        jnp.zeros((3, channels)),
        jnp.zeros(halves(form) * channels),
    )
    ids = jnp.ones((2, time), jnp.int32)

    def loss(x, kernel, bias):
        return CALLS[form](x, kernel, bias=bias, segment_ids=ids)[0].astype(jnp.float32).sum()

    both, arguments = jax.value_and_grad(loss, argnums=(0, 1, 2)), (x, kernel, bias)
    if lanes:
        both, arguments = jax.vmap(both), [jnp.stack([y] * lanes) for y in arguments]
    with gpus():
        text = jax.jit(both).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert [name for name in kernels(form) if name not in text] == []


@parametrize_some("form", CALLS, {"gated"})
def test_lowers_under_shard_map(form):
    """Weights are the same on all devices: their gradients are summed over them."""

    def gradients(x, kernel):
        def loss(*args):
            y, _ = CALLS[form](*args, impl="hopper_taps")
            return y.astype(jnp.float32).sum()

        return jax.grad(loss, argnums=(0, 1))(x, kernel)

    data, everywhere = PartitionSpec("data"), PartitionSpec()
    with gpus(shape=(2,)):
        sharded = jax.shard_map(gradients, in_specs=(data, everywhere), out_specs=(data, everywhere))
        traced = jax.jit(sharded).trace(jnp.zeros((4, 16, halves(form) * 128), jnp.bfloat16), jnp.zeros((3, 128)))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert kernels(form)[1] in text and "all_reduce" in text


@parametrize_some(
    "form, time, channels, taps, packed, biased",
    [
        (form, *sizes)
        for form in CALLS
        for sizes in ((43, 256, 3, True, True), (24, 128, 2, False, False), (20, 128, 4, True, True))
    ],
    {
        ("plain", 24, 128, 2, False, False),
        ("silu", 20, 128, 4, True, True),
        ("gated", 20, 128, 4, True, True),
    },
)
def test_kernels_equal_the_oracle(
    normal, packed_ids, out_and_grads, monkeypatch, form, time, channels, taps, packed, biased
):
    """In Pallas' interpreter, which looks for races."""
    from pallas_kernels.hopper import short_conv as kernels

    for part in ("FORWARD_BLOCK_TOKENS", "BACKWARD_BLOCK_TOKENS"):
        monkeypatch.setattr(kernels, part, 16)
    rows = slice(1, 3)  # of the packed ones
    ids = packed_ids(time)[rows] if packed else None
    x, dy = (normal(2, time, k * channels, dtype="bfloat16") for k in (halves(form), 1))
    wide = normal(taps, channels), normal(halves(form) * channels), normal(2, taps, channels)

    def run(impl, x):
        def call(x, kernel, bias, state):
            state, bias = (y if wanted else None for y, wanted in ((state, packed), (bias, biased)))
            return CALLS[form](x, kernel, bias=bias, state=state, segment_ids=ids, impl=impl)[0]

        return out_and_grads(call, (x, *wide), np.asarray(dy, x.dtype))

    expected = run("oracle", np.asarray(x, np.float32))
    for module in (conv, gated_conv):
        hopper = module.IMPLEMENTATIONS["hopper_taps"]
        monkeypatch.setitem(module.IMPLEMENTATIONS, "hopper_taps", type(hopper)(hopper.compute))
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        got = run("hopper_taps", x)
    for ours, right in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        ours, right = (np.asarray(y, np.float64) for y in (ours, right))
        assert np.linalg.norm(ours - right) <= 5e-3 * np.linalg.norm(right)
    assert not get_races().races_found


def test_a_row_with_padding_inside_a_document_is_nan_and_the_others_are_right(normal):
    x, kernel, ids = normal(2, 16, 128, dtype="bfloat16"), normal(3, 128), np.ones((2, 16), np.int32)
    ids[0, 9] = ids[1, :3] = 0

    @functools.partial(jax.jit, static_argnums=0)
    def y_and_grad(impl, x, kernel, ids):
        def convolve(x):
            return conv.IMPLEMENTATIONS[impl].compute(ShortConvCall(x, kernel, None, None, ids))

        y, pull = jax.vjp(convolve, x)
        return y, *pull(jnp.ones_like(y))

    with plgpu.force_gpu_interpret_mode():
        found = y_and_grad("hopper_taps", x, kernel, ids)
    for ours, right in zip(found, y_and_grad("oracle", x, kernel, ids), strict=True):
        ours, right = (np.asarray(x, np.float32) for x in (ours, right))
        assert np.isnan(ours[0]).all()
        np.testing.assert_allclose(ours[1], right[1], rtol=2e-2, atol=2e-2)
