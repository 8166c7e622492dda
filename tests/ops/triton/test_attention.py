"""Attention's Triton kernels as far as a CPU can tell: refusals, lowering for an H100, and the interpreter."""

import itertools

import jax
import jax.numpy as jnp
import pytest
from helpers import cuda_plugin, triton_interpreter
from helpers.cases import parametrize_some
from helpers.devices import gpus

from based_jax.ops import dispatch, segments, softmax
from based_jax.ops.calls import AttentionCall
from based_jax.ops.triton import attention as triton_attention
from based_jax.ops.triton import limits
from pallas_kernels.triton import attention as kernels
from pallas_kernels.triton.launch import shared_bytes


def call_of(T=256, K=64, V=64, dtype=jnp.bfloat16, window=None, B=2, H=2):
    q, v = (jnp.zeros((B, T, H, size), dtype) for size in (K, V))
    return AttentionCall(q, q, v, window or T, jnp.ones((B, T), jnp.int32))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (call_of(dtype=jnp.float32), "bfloat16 or float16, and are float32"),
        (call_of(V=264), "at most 256, and are 64 and 264"),
        (call_of(B=0), "elements, and are 0"),
    ],
)
def test_refusals_name_the_value(call, words):
    assert words in triton_attention.supports(call)
    assert triton_attention.supports(call_of(K=70, V=256, dtype=jnp.float16)) is None


def test_a_refusal_names_the_packages_that_are_missing(monkeypatch):
    monkeypatch.setattr(limits, "PACKAGES", ("triton", "no_such_package"))
    assert triton_attention.supports(call_of()).startswith("no_such_package must be installed: pip install")


SIZES = 64, 128, 256
# (T, K, V, window, sinks, dtype): tiles that are not filled; heads of several pieces; windows, with sinks too.
CASES = [
    (200, 40, 24, 200, 0, "float32"),
    (200, 40, 24, 200, 0, "bfloat16"),
    (130, 70, 70, 70, 0, "float32"),
    (300, 130, 64, 300, 0, "bfloat16"),
    (130, 40, 24, 9, 2, "float32"),
]


@parametrize_some("T, K, V, window, sinks, dtype", CASES, [CASES[i] for i in (1, 2, 4)])
def test_they_equal_the_oracle(T, K, V, window, sinks, dtype, normal, packed_ids, out_and_grads, close, monkeypatch):
    triton_interpreter.interpret(monkeypatch)
    q, k, v, cotangent = (normal(2, T, 1, size, dtype=dtype) for size in (K, K, V, V))
    ids = packed_ids(T)[1:3]  # many documents, and padding before one
    compute = segments.without_padding(softmax.WINDOW_ATTENTION["triton_tiles"].compute, *softmax.QKV)

    def tiles(q, k, v):
        return compute(AttentionCall(q, k, v, window, segments.numbered(ids), sinks=sinks))

    def oracle(q, k, v):
        return softmax.window_attention(q, k, v, window=window, sinks=sinks, segment_ids=ids, impl="oracle")

    close(out_and_grads(tiles, (q, k, v), cotangent), out_and_grads(oracle, (q, k, v), cotangent), dtype)


def loss(q, k, v, ids):
    return jnp.sum(softmax.attention(q, k, v, segment_ids=ids, impl="triton_tiles").astype(jnp.float32) ** 2)


@pytest.mark.parametrize("K", [70, pytest.param(256, marks=pytest.mark.long)])
def test_packed_documents_lower_for_an_h100(K):
    """Under a mesh each device runs the kernels on its own rows and heads."""
    call = call_of(K=K, V=K, B=4, H=4)
    with gpus(shape=(2, 2), names=("data", "tensor")):
        traced = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).trace(*call[:3], call.segment_ids)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    kernels = [line for line in text.splitlines() if "@triton_kernel_call" in line]
    width = -(-K // 16) * 16
    assert len(kernels) == 3 and all(f"tensor<2x256x2x{width}xbf16>" in line for line in kernels)


@parametrize_some(
    "kind, K", [*itertools.product(("NVIDIA A100-SXM4-80GB", "NVIDIA L40S"), SIZES)], [("NVIDIA L40S", 256)]
)
def test_kernels_fit_gpus_with_less_memory(monkeypatch, kind, K):
    kernels, call = cuda_plugin.compiled_kernels(monkeypatch), call_of(K=K, V=K)
    with gpus(kind):
        jax.jit(jax.grad(loss, (0, 1, 2))).trace(*call[:3], call.segment_ids).lower(lowering_platforms=("cuda",))
        assert len(kernels) == 3 and all(kernel.shared_bytes <= shared_bytes() for kernel in kernels)


@pytest.mark.parametrize("kind, size", [("NVIDIA A100-SXM4-80GB", 64), ("NVIDIA L40S", 32), ("gfx942", 32)])
def test_tiles_are_as_large_as_there_is_memory(kind, size):
    with gpus(kind):
        tilings = [kernels.tiling_of(kernels.GRADIENT_TILINGS, *call_of(K=K)[:3]) for K in (64, 256)]
    assert [tiling.own for tiling in tilings] == [64, size]


@pytest.mark.parametrize(
    "kind, name", [("NVIDIA A100-SXM4-80GB", "triton_tiles"), ("NVIDIA L40S", "triton_tiles"), ("gfx942", "xla_chunks")]
)
def test_auto_takes_them_for_documents(kind, name):
    with gpus(kind):
        for table in (softmax.ATTENTION, softmax.WINDOW_ATTENTION):
            assert dispatch.choose("attention", table, "auto", call_of(T=1024)) == name


def test_lanes_lower_for_an_h100():
    lanes = [jnp.stack([x, x]) for x in (*call_of()[:3], call_of().segment_ids)]
    with gpus():
        text = jax.jit(jax.vmap(jax.grad(loss, (0, 1, 2)))).trace(*lanes).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@triton_kernel_call") == 3
