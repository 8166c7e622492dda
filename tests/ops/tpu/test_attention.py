"""Splash attention as far as a CPU can tell: refusals, its mask, lowering for TPUs, and values in the interpreter."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.cases import parametrize_some
from helpers.devices import tpus
from jax.experimental.pallas.ops.tpu.splash_attention import LocalMask

from based_jax import parallel
from based_jax.ops import segments, softmax
from based_jax.ops.calls import AttentionCall
from based_jax.ops.dispatch import recorded_choices
from based_jax.ops.tpu import attention as tpu_attention
from based_jax.ops.tpu.band import Band


def call_of(T=1024, K=64, V=64, H=4, B=2, dtype=jnp.bfloat16, window=None):
    q, v = (jnp.zeros((B, T, H, size), dtype) for size in (K, V))
    return AttentionCall(q, q, v, window or T, jnp.ones((B, T), jnp.int32))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (call_of(dtype=jnp.float32), "bfloat16, and are float32"),
        (call_of(K=64, V=264), "at most 256, and are 64 and 264"),
        (call_of(B=0), "a token"),
        (call_of(T=(1 << 17) + 1, K=1, V=1, H=1, B=1), "at most 131072 tokens"),
    ],
)
def test_refusals_name_the_value(call, words):
    assert words in tpu_attention.supports(call)
    assert tpu_attention.supports(call_of(K=70, V=256)) is None


def test_within_shard_map_it_is_refused():
    def refusal(q):
        assert "jax.shard_map" in tpu_attention.supports(AttentionCall(q, q, q, 8))
        return q

    mesh = parallel.make_mesh({"data": 2}, jax.devices()[:2])
    jax.shard_map(refusal, mesh=mesh, in_specs=jax.P("data"), out_specs=jax.P("data"))(call_of(T=8).q)


@pytest.mark.parametrize(("time", "window", "sinks"), [(8, 8, 0), (64, 64, 0), (64, 17, 0), (64, 1, 0), (64, 9, 10)])
def test_a_band_is_a_local_mask(time, window, sinks):
    expected, band = LocalMask((time, time), (window - 1, 0), 0)[:, :], Band(time, window, sinks)
    first = (np.arange(time)[None] < sinks) & (np.arange(time)[None] <= np.arange(time)[:, None])
    expected = expected | first
    assert band == Band(time, window, sinks) and band != Band(time, window, sinks + 1)
    for i in range(0, time, 8):
        for j in range(0, time, 8):
            block = slice(i, i + 8), slice(j, j + 8)
            np.testing.assert_array_equal(band[block], expected[block])


# (T, K, V, H, window, sinks, packed): one block and several, not filled; heads of any size; documents; windows.
CASES = [
    (200, 70, 40, 2, 200, 0, True),
    (100, 64, 64, 1, 100, 0, False),
    (300, 128, 130, 1, 300, 0, True),
    (300, 96, 96, 1, 100, 0, True),
    (300, 64, 64, 1, 20, 2, False),
]


@parametrize_some("T, K, V, H, window, sinks, packed", CASES, [CASES[0], CASES[-1]])
def test_it_equals_the_oracle(T, K, V, H, window, sinks, packed, normal, packed_ids, out_and_grads, close, monkeypatch):
    monkeypatch.setattr(tpu_attention, "BLOCK_TOKENS", 128)
    q, k, v, cotangent = (normal(2, T, H, size, dtype="bfloat16") for size in (K, K, V, V))
    ids = packed_ids(T)[1:3] if packed else None  # many documents, and padding before one
    compute = segments.without_padding(functools.partial(tpu_attention.compute, interpret=True), *softmax.QKV)

    def splash(q, k, v):
        return compute(AttentionCall(q, k, v, window, None if ids is None else segments.numbered(ids), sinks=sinks))

    def oracle(q, k, v):
        return softmax.window_attention(q, k, v, window=window, sinks=sinks, segment_ids=ids, impl="oracle")

    found = out_and_grads(splash, (q, k, v), cotangent)
    close(found, out_and_grads(oracle, (q, k, v), cotangent), "bfloat16")


def loss(q, k, v, ids):
    return jnp.sum(softmax.attention(q, k, v, segment_ids=ids).astype(jnp.float32) ** 2)


@pytest.mark.parametrize(("shape", "local"), [((1,), (4, 4)), ((2, 2), (2, 2))], ids=str)
def test_auto_lowers_for_tpus_each_with_its_rows_and_heads(shape, local):
    """The kernels of both passes get (rows, heads, tokens, 64): those of the device."""
    call = call_of(B=4, K=50, V=50)
    with tpus(shape=shape), recorded_choices() as choices:
        traced = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).trace(*call[:3], call.segment_ids)
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert list(choices["attention"]) == ["tpu_splash"]
    rows, heads = local
    kernels = re.findall(r"@tpu_custom_call\(.*?\) .*?: \(.*", text)
    assert len(kernels) == 3
    assert all(f"tensor<{rows}x{heads}x1024x64xbf16>" in kernel for kernel in kernels)


def test_auto_leaves_short_sequences_and_windows_to_others():
    short, narrow = call_of(T=512), call_of(window=64)
    with tpus(), recorded_choices() as choices:
        jax.eval_shape(softmax.attention, *short[:3])
        jax.eval_shape(functools.partial(softmax.window_attention, window=64), *narrow[:3])
    assert {operation: list(names) for operation, names in choices.items()} == {
        "attention": ["xla_quadratic"],
        "window_attention": ["tpu_tiles"],
    }
