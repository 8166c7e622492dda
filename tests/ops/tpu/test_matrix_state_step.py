"""The TPU kernel of matrix states' step: refusals, values in the interpreter, and what is compiled of it."""

import re

import jax
import jax.numpy as jnp
import pytest
from helpers.cases import parametrize_some
from helpers.devices import tpus
from helpers.matrix_steps import call_of
from helpers.tpu_compiler import SLICES, compiled_text, needs_libtpu
from helpers.tpu_interpreter import interpreted

from based_jax.errors import UserError
from based_jax.ops.delta_rule import delta_rule_step
from based_jax.ops.dispatch import recorded_choices
from based_jax.ops.gated_linear_attention import gated_linear_attention_step
from based_jax.ops.matrix_state_step import IMPLEMENTATIONS


def arguments_of(batch=4, heads=16, keys=128, values=128, dtype="bfloat16"):
    """Return the arguments of `delta_rule_step`."""
    q, v, gate = jnp.zeros((batch, heads, keys), dtype), jnp.zeros((batch, heads, values), dtype), (batch, heads)
    return q, q, v, jnp.zeros((*gate, 1)), jnp.zeros(gate), jnp.zeros((*gate, keys, values))


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"dtype": "float16"}, "bfloat16 or float32, and is float16"),
        ({"batch": 0}, "no dimension may be empty, and states are \\(0, 16, 128, 128\\)"),
        ({"heads": 4, "keys": 512, "values": 512}, "VMEM does not hold 4 states of 512 by 512, nor 8"),
    ],
)
def test_refusals_name_the_value(sizes, words):
    with tpus(), pytest.raises(UserError, match=words):
        jax.eval_shape(lambda: delta_rule_step(*arguments_of(**sizes), impl="tpu"))


def test_a_state_that_is_read_before_it_is_written_is_left_to_xla():
    q, k, v, g, _, state = jax.eval_shape(arguments_of)
    step = jax.jit(lambda *x: gated_linear_attention_step(*x, bonus=jnp.zeros((16, 128)), impl="tpu"))
    with tpus(), pytest.raises(UserError, match="with a bonus it is read before"):
        step.trace(q, k, v, g, state)


# (kind, decays, dtype, (B, H, K, V)): one decay a head and one a channel, sizes that fill no tile, several programs.
CASES = [
    ("delta_rule", 1, "bfloat16", (3, 3, 12, 20)),
    ("delta_rule", 16, "float32", (1, 2, 16, 128)),
    ("low_rank", 24, "float32", (2, 3, 24, 136)),
    ("decay", 1, "bfloat16", (2, 16, 16, 64)),
    ("decay", 256, "float32", (1, 16, 256, 256)),
]


@parametrize_some("kind, decays, dtype, sizes", CASES, CASES[:1])
def test_it_equals_the_oracle(kind, decays, dtype, sizes, normal, close):
    """Nothing races, and what nothing has written is NaN."""
    call = call_of(kind, normal, decays=decays, dtype=dtype, sizes=sizes)
    with interpreted():
        o, state = jax.block_until_ready(IMPLEMENTATIONS["tpu_states"].compute(call))
    exact = {name: getattr(call, name).astype(jnp.float32) for name in "qkv"}  # of the same values, not rounded again
    right, after = IMPLEMENTATIONS["oracle"].compute(call._replace(**exact))
    assert o.dtype == call.v.dtype
    close(o, right, dtype)
    close(state, after, tolerance=2e-6)


@pytest.mark.parametrize(("shape", "rows", "heads"), [((1,), 4, 16), ((2, 2), 2, 8)], ids=str)
def test_auto_lowers_for_tpus_each_with_its_rows_and_heads(shape, rows, heads):
    with tpus(shape=shape), recorded_choices() as choices:
        text = (
            jax.jit(delta_rule_step).trace(*jax.eval_shape(arguments_of)).lower(lowering_platforms=("tpu",)).as_text()
        )
    assert [*choices.values()] == [{"tpu_states": None}]
    [kernel] = re.findall(r"@tpu_custom_call\(.*?\) .*?: \(.*", text)
    assert f"tensor<{rows}x{heads}x128x128xf32>" in kernel


def test_auto_leaves_decays_alone_and_narrow_values_to_xla():
    q, k, v, g, _, state = jax.eval_shape(arguments_of)
    with tpus(), recorded_choices() as choices:
        jax.eval_shape(gated_linear_attention_step, q, k, v, g, state)
        jax.eval_shape(lambda: delta_rule_step(*arguments_of(values=64)))
    assert [*choices.values()] == [{"xla_passes": None}] * 2


@needs_libtpu
@pytest.mark.long
@pytest.mark.parametrize("name", SLICES)
def test_states_are_written_where_they_lie_by_each_generation(name):
    arguments = jax.eval_shape(lambda: arguments_of(batch=5))
    text = compiled_text(name, lambda *x: delta_rule_step(*x, impl="tpu"), *arguments, donate=(5,))
    assert text.count('custom_call_target="tpu_custom_call"') == 1
    assert "5,16,128,128" not in re.findall(r"= \w+\[([\d,]+)\]\S* copy\(", text)
