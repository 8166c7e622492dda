"""The Hopper kernel of the selective scan's step as far as a CPU can tell: refusals, lowering, the interpreter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.devices import gpus
from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import get_races
from jax.experimental.pallas import mosaic_gpu as plgpu

from based_jax.errors import UserError
from based_jax.ops import gated_scan_step as gated
from based_jax.ops.decode_calls import GatedScanStepCall, SelectiveScanStepCall
from based_jax.ops.gated_scan_step import gated_scan_step
from based_jax.ops.selective_scan import STEP_IMPLEMENTATIONS, selective_scan_step


def _zeros(channels=128, states=16):
    u, B = jnp.zeros((2, channels)), jnp.zeros((2, states))
    return u, u, -jnp.ones((channels, states)), B, B, jnp.zeros((2, channels, states))


@pytest.mark.parametrize(
    ("options", "words"),
    [({"channels": 96}, "multiple of 128, and are 96"), ({"states": 12}, "8, 16, 32 states, and has 12")],
)
def test_refusals_name_the_value(options, words):
    with gpus(), pytest.raises(UserError, match=words):
        selective_scan_step(*_zeros(**options), impl="hopper")


@pytest.mark.parametrize(
    ("behind", "joint", "words"), [(36, 256, "with B must be a multiple of 8, and are 36"), (32, 192, "with z .* 192")]
)
def test_refusals_of_products_name_the_value(behind, joint, words):
    u, dt, A, _, _, state = _zeros()
    options = {"bias": jnp.zeros(128), "skip": jnp.zeros(128)}
    with gpus(), pytest.raises(UserError, match=words):
        gated_scan_step(u, dt, A, jnp.zeros((2, behind)), jnp.zeros((2, joint)), state, **options, impl="hopper")


@pytest.mark.parametrize("mesh", [True, False])
def test_lowers_for_an_h100(mesh):
    with gpus(shape=(2, 2), names=("data", "tensor")) if mesh else gpus():
        call = jax.jit(lambda *arguments: selective_scan_step(*arguments, impl="hopper")).trace(*_zeros())
        text = call.lower(lowering_platforms=("cuda",)).as_text()
    assert "selective_scan_step" in text and "output_operand_alias" in text


@pytest.fixture
def interpreted(monkeypatch):
    """Run the kernel in Pallas' interpreter, which looks for races."""
    from pallas_kernels.hopper import selective_scan_step

    monkeypatch.setattr(selective_scan_step, "load_global", lambda ref, layout: ref[...])
    with gpus(), plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        yield


@pytest.mark.parametrize(
    ("channels", "states", "dtype", "raw"),
    [(128, 16, "bfloat16", True), pytest.param(384, 8, "float32", False, marks=pytest.mark.long)],
)
def test_the_kernel_equals_the_oracle(channels, states, dtype, raw, normal, close, interpreted):
    u, A = normal(2, channels, dtype=dtype), -jnp.exp(normal(channels, states))
    dt, bias = normal(2, channels, dtype=dtype), normal(channels)
    steps = {"dt": dt, "bias": bias} if raw else {"dt": jax.nn.softplus(dt)}
    B, C = (normal(2, states, dtype=dtype) for _ in "BC")
    call = SelectiveScanStepCall(u=u, A=A, B=B, C=C, state=normal(2, channels, states), **steps)
    (y, after), (right, state) = (STEP_IMPLEMENTATIONS[impl].compute(call) for impl in ("hopper_states", "oracle"))
    close(y, right, dtype)
    np.testing.assert_allclose(after, state, rtol=1e-5, atol=2e-6)
    assert not get_races().races_found


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.long)])
def test_the_gated_kernel_equals_the_oracle(dtype, normal, close, interpreted):
    """B, C and z are the last channels of products."""
    tokens = {"u": (3, 256), "raw": (3, 256), "selected": (3, 24 + 2 * 8), "joint": (3, 512)}
    narrow = {name: normal(*shape, dtype=dtype) for name, shape in tokens.items()}
    call = GatedScanStepCall(
        **narrow, A=-jnp.exp(normal(256, 8)), state=normal(3, 256, 8), bias=normal(256), skip=normal(256)
    )
    found, expected = (gated.IMPLEMENTATIONS[impl].compute(call) for impl in ("hopper_states", "oracle"))
    close(found[0], expected[0], dtype)
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-5, atol=2e-6)
    assert not get_races().races_found
