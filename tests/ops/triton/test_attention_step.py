"""The Triton kernel of attention's step as far as a CPU can tell: refusals, the interpreter, lowering for an H100."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import cuda_plugin, triton_interpreter
from helpers.cases import parametrize_some
from helpers.devices import gpus

from based_jax.ops import dispatch, softmax_trial
from based_jax.ops.decode_calls import AttentionStepCall, AttentionTrialCall
from based_jax.ops.softmax_step import ATTENTION_STEP, attention_step, attention_step_weights, attention_weights
from based_jax.ops.softmax_trial import attention_trial
from based_jax.ops.triton import attention_step as triton_step
from pallas_kernels.triton import attention_step as kernels

SMALL = (kernels.Tiling(32, 16, 4, 2),)
LENGTHS = [0, 1, 16, 33, 70, 70]


def call_of(B=2, S=256, G=2, R=1, K=72, dtype=jnp.bfloat16):
    cache = jnp.zeros((B, S, G, K), dtype)
    return AttentionStepCall(jnp.zeros((B, G * R, K), dtype), cache, cache, jnp.full(B, S))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (call_of(dtype=jnp.float32), "bfloat16 or float16, and are float32"),
        (call_of(K=264), "at most 256, and are 264"),
        (call_of(R=65, G=1), "at most 64 queries each, and serve 65"),
        (call_of(B=0), "elements of keys, and has 0"),
    ],
)
def test_refusals_name_the_value(call, words):
    assert words in triton_step.supports(call)
    assert triton_step.supports(call_of(K=70, R=64)) is None


# (S, G, R, K, V, dtype): heads of several tiles that they do not fill; several queries for a key; a last split cut off.
CASES = [
    (70, 2, 1, 72, 72, "bfloat16"),
    (70, 2, 3, 40, 24, "float32"),
    (70, 1, 17, 16, 128, "bfloat16"),
    (32, 3, 1, 64, 64, "float32"),
    (40, 4, 2, 24, 24, "float32"),
]


@parametrize_some("S, G, R, K, V, dtype", CASES, CASES[4:])
def test_it_equals_the_oracle(S, G, R, K, V, dtype, normal, close, monkeypatch):
    """What stands behind a row's length is never read."""
    triton_interpreter.interpret(monkeypatch)
    monkeypatch.setattr(kernels, "TILINGS", SMALL)
    q, k, v = (normal(6, *shape, dtype=dtype) for shape in ((G * R, K), (S, G, K), (S, G, V)))
    length = jnp.minimum(jnp.asarray(LENGTHS), S)
    there = (jnp.arange(S)[None] < length[:, None])[..., None, None]
    expected = jax.jit(lambda *x: attention_step(*x, impl="oracle"))(q, k, v, length)
    stale = [jnp.where(there, x, jnp.nan) for x in (k, v)]
    close(triton_step.compute(AttentionStepCall(q, *stale, length)), expected, dtype)
    o, weights = triton_step.compute_with_weights(AttentionStepCall(q, *stale, length))
    close(o, expected, dtype)
    close(weights, jax.jit(attention_weights)(q, k, length), dtype)
    assert not np.asarray(weights)[~np.broadcast_to(there[..., 0], weights.shape)].any()


@parametrize_some("T, S, G, R, K", [(3, 40, 2, 2, 24), (20, 33, 1, 1, 16), (2, 70, 4, 1, 72)], [(3, 40, 2, 2, 24)])
def test_tokens_on_trial_read_a_ring_as_the_oracle_does(T, S, G, R, K, normal, close, monkeypatch):
    """Queries of tokens that see nothing of a split, or of the whole ring, among others."""
    triton_interpreter.interpret(monkeypatch)
    monkeypatch.setattr(kernels, "TILINGS", SMALL)
    shapes = (T, G * R, K), (T, G, K), (T, G, K), (S, G, K), (S, G, K)
    q, k, v, past_k, past_v = (normal(6, *shape) for shape in shapes)
    length = jnp.asarray([0, 1, S - 1, S, S + 7, 3 * S + 2])
    there = (jnp.arange(S)[None] < length[:, None])[..., None, None]
    stale = [jnp.where(there, x, jnp.nan) for x in (past_k, past_v)]
    expected = attention_trial(q, k, v, past_k, past_v, length, impl="oracle")
    close(softmax_trial._by_triton(AttentionTrialCall(q, k, v, *stale, length, True)), expected)


@parametrize_some("K, R, B", [(72, 1, 4), (128, 8, 4), (72, 1, 1024)], [(72, 1, 1024)])
def test_it_lowers_for_an_h100(K, R, B, monkeypatch):
    """Under a mesh each device runs the kernel on its own rows and heads, which say into how many splits keys go."""
    found = cuda_plugin.compiled_kernels(monkeypatch)
    call = jax.eval_shape(lambda: call_of(B=B, S=2048, G=4, R=R, K=K))
    with gpus(shape=(2, 2), names=("data", "tensor")):
        run = jax.jit(lambda *x: attention_step(*x, impl="triton"))
        text = run.trace(*call[:4]).lower(lowering_platforms=("cuda",)).as_text()
    [line] = [line for line in text.splitlines() if "@triton_kernel_call" in line]
    splits, n = {4: 32, 1024: 4}[B], {72: 2, 128: 1}[K]
    assert f"tensor<{B // 2}x{splits}x{2 * R}x{n * K}xf32>" in line
    assert f"tensor<{B // 2}x2048x{2 // n}x{n * K}xbf16>" in line
    assert len(found) == 1 and 0 < found[0].shared_bytes <= 227 << 10


@pytest.mark.long
def test_scores_are_told_by_one_kernel_of_an_h100(monkeypatch):
    found = cuda_plugin.compiled_kernels(monkeypatch)
    call = jax.eval_shape(lambda: call_of(B=128, S=512, G=24))
    with gpus(shape=(2, 2), names=("data", "tensor")):
        run = jax.jit(lambda *x: attention_step_weights(*x, impl="triton"))
        text = run.trace(*call[:4]).lower(lowering_platforms=("cuda",)).as_text()
    [line] = [line for line in text.splitlines() if "@triton_kernel_call" in line]
    assert "tensor<64x12x512xf32>" in line
    assert len(found) == 1 and 0 < found[0].shared_bytes <= 227 << 10


@pytest.mark.long
def test_lanes_lower_for_an_h100(monkeypatch):
    cuda_plugin.without_code(monkeypatch)
    lanes = [jnp.stack([x, x]) for x in call_of()[:4]]
    with gpus():
        run = jax.jit(jax.vmap(lambda *x: attention_step(*x, impl="triton")))
        text = run.trace(*lanes).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@triton_kernel_call") == 1


@pytest.mark.parametrize("kind, name", [("NVIDIA H200", "triton_splits"), ("NVIDIA L40S", "triton_splits")])
def test_auto_takes_it_on_gpus_that_are_known(kind, name):
    with gpus(kind):
        assert dispatch.choose("attention_step", ATTENTION_STEP, "auto", call_of()) == name


@pytest.mark.parametrize("sizes, heads", [((24, 1, 72), 2), ((16, 1, 64), 2), ((3, 1, 64), 1), ((8, 4, 128), 1)])
def test_heads_that_are_read_as_one(sizes, heads):
    assert triton_step.heads_as_one(*sizes) == heads


@pytest.mark.parametrize(
    ("rows", "is_ring", "words"),
    [(128, True, None), (1, True, "128 rows, and there are 1"), (128, False, "rings alone")],
)
def test_auto_reads_rings_of_many_rows_for_several_tokens(rows, is_ring, words):
    x, ring = jnp.zeros((rows, 4, 16, 112), "bfloat16"), jnp.zeros((rows, 129, 16, 112), "bfloat16")
    call = AttentionTrialCall(x, x, x, ring, ring, jnp.zeros(rows, jnp.int32), is_ring)
    with gpus("NVIDIA H200"):
        reason = softmax_trial.ATTENTION_TRIAL["triton_splits"].slower(call)
    assert reason is None if words is None else reason.endswith(words)
