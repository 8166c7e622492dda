"""The Hopper kernel of matrix states' step as far as a CPU can tell: refusals, lowering, the interpreter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.devices import gpus
from helpers.matrix_steps import call_of
from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import get_races
from jax.experimental.pallas import mosaic_gpu as plgpu

from based_jax.errors import UserError
from based_jax.ops.decode_calls import UnitDeltaStepCall
from based_jax.ops.delta_rule import delta_rule_step
from based_jax.ops.gated_linear_attention import gated_linear_attention_step
from based_jax.ops.matrix_state_step import IMPLEMENTATIONS
from based_jax.ops.unit_delta_step import IMPLEMENTATIONS as UNIT_STEPS
from based_jax.ops.unit_delta_step import unit_delta_step


def _zeros(batch=4, heads=4, keys=32, values=32, dtype="bfloat16"):
    q, v, gate = jnp.zeros((batch, heads, keys), dtype), jnp.zeros((batch, heads, values), dtype), (batch, heads)
    return q, q, v, jnp.zeros((*gate, 1)), jnp.zeros(gate), jnp.zeros((*gate, keys, values))


def _step(*arguments):
    return delta_rule_step(*arguments, impl="hopper")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "float16"}, "bfloat16 or float32, and is float16"),
        ({"keys": 24}, "K must be a multiple of 16 up to 256 and V of 32, and a state is 24 by 32"),
        ({"batch": 0}, "have 0"),
    ],
)
def test_refusals_name_the_value(options, words):
    with gpus(), pytest.raises(UserError, match=words):
        _step(*_zeros(**options))


def test_a_state_that_is_read_before_it_is_written_is_left_to_xla():
    q, k, v, g, _, state = _zeros()
    with gpus(), pytest.raises(UserError, match="with a bonus it is read before"):
        gated_linear_attention_step(q, k, v, g, state, bonus=jnp.zeros((4, 32)), impl="hopper")


@pytest.mark.parametrize("where", ["loop", "mesh", "lanes"])
def test_lowers_for_an_h100(where):
    arguments, step = _zeros(), _step
    if where == "lanes":
        arguments, step = [jnp.stack([x] * 2) for x in arguments], jax.vmap(step)
    if where == "loop":

        def step(*arguments):
            return jax.lax.fori_loop(0, 3, lambda _, state: _step(*arguments[:-1], state)[1], arguments[-1])

    with gpus(shape=(2, 2), names=("data", "tensor")) if where == "mesh" else gpus():
        text = jax.jit(step).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert "matrix_state_step" in text and "output_operand_alias" in text


@pytest.fixture
def interpreted(monkeypatch):
    """Run the kernel in Pallas' interpreter, which looks for races."""
    from pallas_kernels.hopper import matrix_state_step

    monkeypatch.setattr(matrix_state_step, "load_global", lambda ref, layout: ref[...])
    with gpus(), plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        yield


@pytest.mark.parametrize(
    ("kind", "decays", "dtype", "sizes"),
    [
        ("delta_rule", 1, "bfloat16", (1, 1, 16, 64)),
        pytest.param("low_rank", 16, "float32", (1, 3, 16, 96), marks=pytest.mark.long),
        pytest.param("decay", 48, "bfloat16", (1, 1, 48, 32), marks=pytest.mark.long),
        pytest.param("delta_rule", 64, "float32", (2, 2, 64, 128), marks=pytest.mark.long),
        pytest.param("decay", 1, "float32", (2, 3, 256, 64), marks=pytest.mark.long),
    ],
)
def test_the_kernel_equals_the_oracle(kind, decays, dtype, sizes, normal, close, interpreted):
    call = call_of(kind, normal, decays=decays, dtype=dtype, sizes=sizes)
    found = IMPLEMENTATIONS["hopper_states"].compute(call)
    exact = {name: getattr(call, name).astype(jnp.float32) for name in "qkv"}  # of the same values, not rounded again
    right = IMPLEMENTATIONS["oracle"].compute(call._replace(**exact))
    close(found[0], right[0], dtype)
    np.testing.assert_allclose(found[1], right[1], atol=2e-6)
    assert not get_races().races_found


def _unit_step(*arguments):
    return unit_delta_step(*arguments, impl="hopper")


def _unit_zeros(batch=4, heads=4, keys=32, values=32, dtype="bfloat16"):
    joint, gates = jnp.zeros((batch, heads * (2 * keys + values)), dtype), jnp.zeros((batch, heads))
    return joint, gates[..., None], gates, jnp.zeros((batch, heads, keys, values))


def test_refusals_of_unit_keys_name_the_value():
    for options, words in (({"dtype": "float16"}, "bfloat16 or float32, and is float16"), ({"values": 48}, "32 by 48")):
        with gpus(), pytest.raises(UserError, match=words):
            _unit_step(*_unit_zeros(**options))
    with gpus(shape=(2, 2), names=("data", "tensor")), pytest.raises(UserError, match="there is a mesh"):
        _unit_step(*_unit_zeros())


def test_unit_keys_lower_for_an_h100():
    def loop(*arguments):
        return jax.lax.fori_loop(0, 3, lambda _, state: _unit_step(*arguments[:-1], state)[1], arguments[-1])

    with gpus():
        text = jax.jit(loop).trace(*_unit_zeros()).lower(lowering_platforms=("cuda",)).as_text()
    assert "unit_delta_step" in text and "output_operand_alias" in text


@pytest.mark.parametrize(
    ("decays", "dtype", "sizes"),
    [
        (1, "bfloat16", (2, 1, 16, 64)),
        pytest.param(16, "float32", (1, 3, 16, 96), marks=pytest.mark.long),
        pytest.param(1, "bfloat16", (2, 3, 64, 128), marks=pytest.mark.long),
    ],
)
def test_the_kernel_of_unit_keys_equals_the_oracle(decays, dtype, sizes, normal, close, interpreted):
    B, H, K, V = sizes
    call = UnitDeltaStepCall(
        normal(B, H * (2 * K + V), dtype=dtype),
        -(normal(B, H, decays) ** 2),
        jax.nn.sigmoid(normal(B, H)),
        normal(*sizes),
        0.3,
    )
    found = UNIT_STEPS["hopper_states"].compute(call)
    right = UNIT_STEPS["oracle"].compute(call._replace(joint=call.joint.astype(jnp.float32)))
    close(found[0], right[0], dtype)
    np.testing.assert_allclose(found[1], right[1], atol=4e-6)
    assert not get_races().races_found
