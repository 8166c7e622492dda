"""The Hopper kernel of short convolutions' step as far as a CPU can tell: refusals, lowering, the interpreter."""

import jax
import jax.numpy as jnp
import pytest
from helpers.devices import gpus
from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import get_races
from jax.experimental.pallas import mosaic_gpu as plgpu

from based_jax.errors import UserError
from based_jax.ops import conv, gated_conv
from based_jax.ops.conv import short_conv_step
from based_jax.ops.decode_calls import GatedConvStepCall, ShortConvStepCall

FORMS = {
    "plain": (ShortConvStepCall, conv.STEP_IMPLEMENTATIONS),
    "gated": (GatedConvStepCall, gated_conv.STEP_IMPLEMENTATIONS),
}


@pytest.mark.parametrize(
    ("options", "channels", "words"),
    [
        ({"dilation": 2}, 128, "dilation must be 1, and is 2"),
        ({}, 192, "a multiple of 128 channels, and are 3 and 192"),
    ],
)
def test_refusals_name_the_value(options, channels, words):
    width = 2 * options.get("dilation", 1) + 1
    x, kernel, state = jnp.zeros((2, channels)), jnp.zeros((3, channels)), jnp.zeros((2, width, channels))
    with gpus(), pytest.raises(UserError, match=words):
        short_conv_step(x, kernel, state, impl="hopper", **options)


@pytest.mark.parametrize("mesh", [True, False])
def test_lowers_for_an_h100(mesh):
    x, kernel, state = jnp.zeros((2, 256)), jnp.zeros((3, 256)), jnp.zeros((2, 3, 256))

    def step(x, state):
        return short_conv_step(x, kernel, state, impl="hopper")

    with gpus(shape=(2, 2), names=("data", "tensor")) if mesh else gpus():
        text = jax.jit(step).trace(x, state).lower(lowering_platforms=("cuda",)).as_text()
    assert "short_conv_step" in text and "output_operand_alias" in text


@pytest.fixture
def interpreted(monkeypatch):
    """Run the kernel in Pallas' interpreter, which looks for races."""
    from pallas_kernels.hopper import stream

    monkeypatch.setattr(stream, "load", lambda ref: ref[...].astype(jnp.float32))
    with gpus(), plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        yield


@pytest.mark.parametrize(
    ("form", "taps", "channels", "dtype"),
    [
        ("plain", 4, 128, "bfloat16"),
        ("gated", 3, 128, "bfloat16"),
        pytest.param("plain", 2, 384, "float32", marks=pytest.mark.long),
        pytest.param("gated", 3, 256, "float32", marks=pytest.mark.long),
    ],
)
def test_the_kernel_equals_the_oracle(form, taps, channels, dtype, normal, close, interpreted):
    make, table = FORMS[form]
    width = channels * (1 + (form == "gated"))
    bias = normal(width).astype(dtype).astype(jnp.float32)
    call = make(normal(2, width, dtype=dtype), normal(taps, channels), normal(2, taps, channels, dtype=dtype), bias)
    call = call._replace(silu=True) if form == "plain" else call
    (y, after), (right, state) = (table[impl].compute(call) for impl in ("hopper_taps", "oracle"))
    close(y, right, dtype)
    assert (after == state).all() and not get_races().races_found
