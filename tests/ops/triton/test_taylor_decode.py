"""The Triton kernel that reads Taylor states, as far as a CPU can tell: refusals, the interpreter, lowering."""

import jax
import jax.numpy as jnp
import pytest
from helpers import cuda_plugin, triton_interpreter
from helpers.cases import parametrize_some
from helpers.devices import gpus
from helpers.taylor_states import arguments_of

from based_jax.errors import UserError
from based_jax.ops.decode_calls import RecentTokens, TaylorDecodeCall
from based_jax.ops.dispatch import recorded_choices
from based_jax.ops.taylor import taylor_attention
from based_jax.ops.taylor_decode import IMPLEMENTATIONS, holding, initial_state, taylor_attention_decode


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"flush": 1}, "the state must have recent tokens, and flush is 1"),
        ({"dtype": "float16"}, "must all be bfloat16 or float32, and are float16"),
        ({"B": 0}, "no dimension may be empty, and q is \\(0, 1, 2, 16\\)"),
        ({"V": 264, "T": 4}, "V must be at most 256 for 4 tokens, and is 264"),
        ({"flush": 24}, "flush must be a multiple of 16, and is 24"),
    ],
)
def test_refusals_name_the_value(sizes, words):
    with gpus(), pytest.raises(UserError, match=words):
        jax.eval_shape(lambda: taylor_attention_decode(*arguments_of(**sizes), impl="triton"))


def test_gpus_without_fp8_refuse_it():
    with gpus("NVIDIA A100-SXM4-80GB"), pytest.raises(UserError, match="Ampere GPUs have no float8_e4m3fn"):
        jax.eval_shape(lambda: taylor_attention_decode(*arguments_of(state_dtype="float8_e4m3fn"), impl="triton"))


# (dtype of the state, of tokens, T, H, K, V, W, recent tokens): a row without room and others; sizes that fill no tile.
CASES = [
    ("float32", "float32", 1, 2, 4, 5, 16, (16, 1, 0)),
    ("float32", "bfloat16", 3, 2, 16, 24, 32, (1, 12, 29)),
    ("bfloat16", "bfloat16", 1, 1, 16, 112, 16, (16, 5, 0)),
    ("int8", "bfloat16", 2, 1, 7, 16, 16, (16, 5, 1)),
]


@parametrize_some("state_dtype, dtype, T, H, K, V, W, counts", CASES, CASES[:1])
def test_it_equals_the_xla_form(state_dtype, dtype, T, H, K, V, W, counts, normal, close, monkeypatch):
    triton_interpreter.interpret(monkeypatch)
    past = tuple(normal(3, 9, H, dim) for dim in (K, K, V))
    qkv = tuple(normal(3, T, H, dim, dtype=dtype) for dim in (K, K, V))
    recent = tuple(normal(3, H, W, dim, dtype=dtype) for dim in (K, V))

    @jax.jit
    def start(past):
        empty = initial_state(3, H, K, V, flush=W, dtype=jnp.dtype(dtype), state_dtype=state_dtype)
        return holding(taylor_attention(*past, impl="oracle")[1], empty)

    state = start(past)._replace(recent=RecentTokens(*recent, jnp.asarray(counts, jnp.int32)))
    call = TaylorDecodeCall(*qkv, state.sums, state.recent[:2], state.recent.length)
    o, sums, tokens, length = jax.jit(IMPLEMENTATIONS["triton_steps"].compute)(call)
    exact = tuple(x.astype(jnp.float32) for x in qkv)  # of the same values, not rounded again
    wanted, after = jax.jit(lambda *x: taylor_attention_decode(*x, impl="xla_steps"))(*exact, state)
    close(o, wanted, dtype, tolerance=5e-3 if dtype == "bfloat16" else None)
    close((sums, RecentTokens(*tokens, length)), after)


@parametrize_some(
    "state_dtype, T, V", [("float32", 1, 112), ("int8", 4, 64), ("float8_e4m3fn", 1, 112)], [("int8", 4, 64)]
)
def test_it_lowers_for_an_h100(state_dtype, T, V, monkeypatch):
    """Under a mesh each device runs the kernel on its own rows and heads."""
    found = cuda_plugin.compiled_kernels(monkeypatch)
    arguments = jax.eval_shape(lambda: arguments_of(B=4, T=T, V=V, H=4, state_dtype=state_dtype))
    with gpus(shape=(2, 2), names=("data", "tensor")):
        run = jax.jit(lambda *x: taylor_attention_decode(*x, impl="triton"))
        text = run.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    [line] = [line for line in text.splitlines() if "@triton_kernel_call" in line]
    assert f"tensor<2x2x153x{V}x" in line and f"tensor<2x{T}x2x{V}xbf16>" in line
    assert len(found) == 1 and 0 <= found[0].shared_bytes <= 99 << 10


def test_auto_leaves_what_has_not_been_run():
    with gpus("NVIDIA L40S"), recorded_choices() as choices:
        jax.eval_shape(lambda: taylor_attention_decode(*arguments_of()))
    assert list(choices["taylor_attention_decode"]) == ["xla_steps"]
