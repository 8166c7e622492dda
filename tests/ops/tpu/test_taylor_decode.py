"""The TPU kernel that decodes with Taylor attention: refusals, values in the interpreter, what is compiled of it."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.cases import parametrize_some
from helpers.devices import tpus
from helpers.taylor_states import arguments_of
from helpers.tpu_compiler import SLICES, compiled_text, needs_libtpu
from helpers.tpu_interpreter import interpreted

from based_jax.errors import UserError
from based_jax.ops.decode_calls import RecentTokens, TaylorDecodeCall
from based_jax.ops.dispatch import recorded_choices
from based_jax.ops.taylor import taylor_attention
from based_jax.ops.taylor_decode import FORMATS, holding, initial_state, taylor_attention_decode, total
from based_jax.ops.tpu import taylor_decode as tpu_taylor_decode
from pallas_kernels.tpu import taylor_decode as kernels

COPIED = re.compile(r"= \w+\[([\d,]+)\]\S* copy\(")


SIZES = {"B": 128, "H": 16, "V": 112}
"""Of a call that `auto` gives to the kernel."""


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"flush": 1}, "the state must have recent tokens, and flush is 1"),
        ({"dtype": "float16"}, "must all be bfloat16 or float32, and are float16"),
        ({"B": 0}, "no dimension may be empty, and q is \\(0, 1, 2, 16\\)"),
        ({"flush": 256, "B": 256}, "VMEM does not hold 128 rows of 256 recent tokens with 16 \\+ 112 channels"),
    ],
)
def test_refusals_name_the_value(sizes, words):
    with tpus(), pytest.raises(UserError, match=words):
        jax.eval_shape(lambda: taylor_attention_decode(*arguments_of(**SIZES | {"H": 2} | sizes), impl="tpu"))


# (dtype of the state, of tokens, B, T, H, K, V, W, recent tokens, bytes of a block): a row without room and others,
# rows that are not in step, features in one block and in several, lanes in several.
CASES = [
    ("float32", "float32", 2, 1, 1, 2, 3, 2, (2, 1), 1 << 22),
    ("float32", "float32", 3, 2, 2, 4, 5, 4, (2, 1, 0), 3 << 12),
    ("float32", "bfloat16", 5, 3, 2, 16, 24, 16, (1, 2, 9, 0, 13), 1 << 20),
    ("bfloat16", "bfloat16", 2, 1, 1, 16, 112, 16, (16, 5), 1 << 22),
    ("int8", "bfloat16", 3, 2, 1, 7, 16, 16, (16, 5, 1), 1 << 14),
    ("float8_e4m3fn", "bfloat16", 3, 1, 1, 8, 16, 16, (16, 5, 1), 1 << 22),
    ("float32", "bfloat16", 256, 1, 1, 4, 8, 16, (7, 3) * 128, 1 << 22),
]


@parametrize_some("state_dtype, dtype, B, T, H, K, V, W, counts, block", CASES, CASES[:1])
def test_it_equals_the_xla_form(state_dtype, dtype, B, T, H, K, V, W, counts, block, normal, close, monkeypatch):
    """Nothing races, and what nothing has written is NaN."""
    monkeypatch.setattr(kernels, "MAX_BLOCK_BYTES", block)
    past = tuple(normal(B, 9, H, dim) for dim in (K, K, V))
    qkv = tuple(normal(B, T, H, dim, dtype=dtype) for dim in (K, K, V))
    recent = tuple(normal(B, H, W, dim, dtype=dtype) for dim in (K, V))

    @jax.jit
    def start(past):
        empty = initial_state(B, H, K, V, flush=W, dtype=jnp.dtype(dtype), state_dtype=state_dtype)
        return holding(taylor_attention(*past, impl="oracle")[1], empty)

    state = start(past)._replace(recent=RecentTokens(*recent, jnp.asarray(counts, jnp.int32)))
    call = TaylorDecodeCall(*qkv, state.sums, state.recent[:2], state.recent.length)
    with interpreted():
        o, sums, tokens, length = jax.block_until_ready(jax.jit(tpu_taylor_decode.compute)(call))
    exact = tuple(x.astype(jnp.float32) for x in qkv)  # of the same values, not rounded again
    wanted, after = jax.jit(lambda *x: taylor_attention_decode(*x, impl="xla_steps"))(*exact, state)
    close(o, wanted, dtype, tolerance=5e-3 if dtype == "bfloat16" else None)
    close(total(state._replace(sums=sums, recent=RecentTokens(*tokens, length))), total(after))
    assert (length == after.recent.length).all() and sums.values.dtype == state.sums.values.dtype
    kept = np.asarray(counts) + T <= W  # rows that have room, whatever others have
    for held, new in zip(*map(jax.tree.leaves, (state.sums, sums)), strict=True):
        assert np.array_equal(held[kept], new[kept])


@pytest.mark.parametrize(("shape", "rows", "heads"), [((1,), 256, 16), ((2, 2), 128, 8)], ids=str)
def test_auto_lowers_for_tpus_each_with_its_rows_and_heads(shape, rows, heads):
    with tpus(shape=shape), recorded_choices() as choices:
        traced = jax.jit(taylor_attention_decode).trace(*jax.eval_shape(lambda: arguments_of(**SIZES | {"B": 256})))
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert list(choices["taylor_attention_decode"]) == ["tpu_steps"]
    [kernel] = re.findall(r"@tpu_custom_call\(.*?\) .*?: \(.*", text)
    assert f"tensor<{heads}x153x112x{rows}xf32>" in kernel


def test_auto_leaves_few_rows_to_xla():
    with tpus(shape=(2,)), recorded_choices() as choices:
        jax.eval_shape(lambda: taylor_attention_decode(*arguments_of(**SIZES)))
    assert list(choices["taylor_attention_decode"]) == ["xla_steps"]


@needs_libtpu
@pytest.mark.long
@pytest.mark.parametrize("state_dtype", FORMATS)
@pytest.mark.parametrize("name", SLICES)
def test_states_are_written_where_they_lie_by_each_generation(name, state_dtype):
    """Neither they nor recent tokens are copied, as they lie before and after."""
    arguments = jax.eval_shape(lambda: arguments_of(**SIZES, state_dtype=state_dtype))
    text = compiled_text(name, lambda *x: taylor_attention_decode(*x, impl="tpu"), *arguments, donate=(3,))
    assert text.count('custom_call_target="tpu_custom_call"') == 1
    assert {"128,16,153,112", "128,16,16,112", "128,16,16,16"}.isdisjoint(COPIED.findall(text))


@needs_libtpu
@pytest.mark.long
def test_nothing_of_a_state_is_copied_in_a_loop():
    """As tokens follow each other: q, k and v of what the one before gave."""
    *_, state = jax.eval_shape(lambda: arguments_of(**SIZES))
    weights = jax.ShapeDtypeStruct((16 * 112, 16 * (16 + 16 + 112)), jnp.bfloat16)

    def tokens(x, weights, state):
        def token(_, carry):
            x, state = carry
            q, k, v = jnp.split((x @ weights).reshape(128, 1, 16, -1), (16, 32), axis=3)
            o, state = taylor_attention_decode(q, k, v, state, impl="tpu")
            return o.reshape(x.shape), state

        return jax.lax.fori_loop(0, 9, token, (x, state))

    x = jax.ShapeDtypeStruct((128, 16 * 112), jnp.bfloat16)
    text = compiled_text(SLICES[0], tokens, x, weights, state, donate=(2,))
    body, entry = text.split("\nENTRY ")
    shapes = {",".join(map(str, x.shape)) for x in jax.tree.leaves(state) if x.ndim > 1}
    assert "taylor_decode" in body and shapes.isdisjoint(COPIED.findall(body))
    assert set(COPIED.findall(entry)) & shapes <= {"128,16,153"}
