"""The window's TPU kernels: refusals, values in the interpreter, on one device and on eight, and what is compiled."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from helpers.cases import parametrize_some
from helpers.devices import tpus
from helpers.tpu_compiler import SLICES, compiled_text, lowered_kernels, needs_libtpu
from helpers.tpu_interpreter import interpreted

from based_jax import parallel
from based_jax.errors import UserError
from based_jax.ops import segments, sequence
from based_jax.ops.calls import AttentionCall
from based_jax.ops.dispatch import recorded_choices, without_kernels
from based_jax.ops.softmax import QKV, window_attention
from based_jax.ops.tpu import window as tpu_window
from pallas_kernels.tpu import window as kernels


def call_of(T=1024, K=64, V=64, H=4, B=2, dtype=jnp.bfloat16, window=129):
    q, v = (jnp.zeros((B, T, H, size), dtype) for size in (K, V))
    return AttentionCall(q, q, v, window, jnp.ones((B, T), jnp.int32))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (call_of(dtype=jnp.float16), "bfloat16 or float32, and are float16"),
        (call_of()._replace(k=jnp.zeros((2, 1024, 4, 64))), "and are bfloat16, float32"),
        (call_of(K=64, V=264), "at most 256, and are 64 and 264"),
        (call_of(window=130), "at most 129 keys, and is 130"),
        (call_of(B=0), "no dimension may be empty, and q is (0, 1024, 4, 64)"),
    ],
)
def test_refusals_name_the_value(call, words):
    assert words in tpu_window.supports(call)
    assert tpu_window.supports(call_of(K=70, V=256, dtype=jnp.float32)) is None


@pytest.mark.parametrize(("time", "tokens"), [(1, 128), (512, 512), (513, 128), (640, 128), (768, 384), (2048, 512)])
def test_a_program_has_the_tokens_that_fill_up_least(time, tokens):
    assert kernels.block_tokens(time) == tokens


def of_kernels(call, compute=tpu_window.compute):
    """Return o by the kernels, of documents with padding anywhere."""
    if call.segment_ids is not None:
        call = call._replace(segment_ids=segments.numbered(call.segment_ids))
    return segments.without_padding(compute, *QKV)(call)


# (T, K, V, H, window, dtype, packed): a tile and several, blocks of several tiles and several blocks, not filled; half
# of the tile before, all of it and none; heads of any size, an odd number of them; documents and padding anywhere.
CASES = [
    (130, 20, 40, 1, 129, "bfloat16", True),
    (200, 16, 16, 2, 129, "bfloat16", True),
    (300, 16, 16, 3, 64, "float32", True),
    (700, 64, 64, 2, 66, "bfloat16", False),
    (130, 112, 112, 1, 65, "bfloat16", True),
    (128, 16, 24, 1, 1, "float32", False),
    (130, 16, 128, 9, 129, "float32", False),
]


@parametrize_some("T, K, V, H, window, dtype, packed", CASES, CASES[:1])
def test_they_equal_the_oracle(T, K, V, H, window, dtype, packed, normal, packed_ids, out_and_grads, close):
    """Forward and gradients; nothing races, and what nothing has written is NaN."""
    q, k, v, cotangent = (normal(2, T, H, size, dtype=dtype, scale=2) for size in (K, K, V, V))
    ids = packed_ids(T)[1:5:3] if packed else None  # many documents, and padding between

    def oracle(q, k, v):
        exact = (x.astype(jnp.float32) for x in (q, k, v))
        return window_attention(*exact, window=window, segment_ids=ids, impl="oracle").astype(v.dtype)

    with interpreted():
        found = out_and_grads(lambda q, k, v: of_kernels(AttentionCall(q, k, v, window, ids)), (q, k, v), cotangent)
        found = jax.block_until_ready(found)
    close(found, out_and_grads(oracle, (q, k, v), cotangent), dtype)


@pytest.mark.parametrize("scale", [1e-3, 1e3], ids=str)
def test_scores_of_any_size_are_finite(scale, normal, out_and_grads, close):
    """Of a softmax that is flat, and of one that one key has alone; head by head the largest score is taken off."""
    q, k, v, cotangent = (normal(1, 128, 1, 16, scale=size) for size in (scale, scale, 1, 1))
    with interpreted():
        found = out_and_grads(lambda q, k, v: of_kernels(AttentionCall(q, k, v, 100)), (q, k, v), cotangent)
        found = jax.block_until_ready(found)
    oracle = functools.partial(window_attention, window=100, impl="oracle")
    close(found, out_and_grads(oracle, (q, k, v), cotangent), tolerance=1e-4, floor=1e-5)


@pytest.mark.long
def test_eight_devices_equal_one(normal, packed_ids, out_and_grads, close):
    """Rows, heads and time over two devices each: keys before a piece come from the device before."""
    q, k, v, cotangent = (normal(2, 70, 2, 16) for _ in range(4))
    ids = segments.numbered(packed_ids(70)[:2])

    def own(q, k, v):
        return sequence.windowed(tpu_window.compute, AttentionCall(q, k, v, 20, ids))

    mesh = parallel.make_mesh({"data": 2, "tensor": 2, "sequence": 2}, jax.devices())
    with interpreted(), jax.set_mesh(mesh):
        found = jax.device_get(out_and_grads(own, (q, k, v), cotangent))
    oracle = functools.partial(window_attention, window=20, segment_ids=ids, impl="oracle")
    close(found, out_and_grads(oracle, (q, k, v), cotangent))


def loss(q, k, v, ids, window=129):
    return jnp.sum(window_attention(q, k, v, window=window, segment_ids=ids).astype(jnp.float32) ** 2)


@pytest.mark.parametrize(
    ("shape", "names", "local"),
    [
        ((1,), ("data",), "4x4x64x1024"),
        ((2, 2), ("data", "tensor"), "2x2x64x1024"),
        ((2, 2), ("data", "sequence"), "2x4x64x640"),
    ],
    ids=str,
)
def test_auto_lowers_for_tpus_each_with_its_rows_heads_and_time(shape, names, local):
    """A piece of time has the 128 keys before it too."""
    call = call_of(B=4, K=50, V=50)
    with tpus(shape=shape, names=names), recorded_choices() as choices:
        found = lowered_kernels(jax.value_and_grad(loss, (0, 1, 2)), *call[:3], call.segment_ids)
    assert (list(choices["window_attention"]), len(found)) == (["tpu_tiles"], 2)
    assert all(f"tensor<{local}xbf16>" in kernel for kernel in found)


def test_without_kernels_auto_leaves_it_to_xla():
    with tpus(), recorded_choices() as choices, without_kernels():
        jax.eval_shape(loss, *call_of()[:3], None)
    with pytest.raises(UserError, match="needs tpu"), without_kernels():
        jax.eval_shape(functools.partial(window_attention, window=9, impl="tpu_tiles"), *call_of()[:3])
    assert list(choices["window_attention"]) == ["xla_bands"]


@needs_libtpu
@pytest.mark.long
@pytest.mark.parametrize("dim", [64, 112])
@pytest.mark.parametrize("name", SLICES)
def test_each_generation_compiles_them(name, dim):
    call = jax.eval_shape(functools.partial(call_of, T=2048, K=dim, V=dim, H=16))
    text = compiled_text(name, jax.value_and_grad(loss, (0, 1, 2)), *call[:3], call.segment_ids)
    assert set(re.findall(r"%(window_\w+?)[.\d]* = .* custom-call\(", text)) == {"window_forward", "window_gradients"}
