"""Attention of a sequence's next tokens over a cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.cases import parametrize_some

from based_jax.ops import softmax, softmax_chunks, softmax_prefill
from based_jax.ops.softmax_prefill import ATTENTION_PREFILL, attention_prefill

prefill = jax.jit(attention_prefill, static_argnames="impl")

LENGTHS = [0, 1, 8, 9, 19, 19]
# (T, S, chunk, G, R, K, V, dtype): chunks that hold all, and that are filled by neither queries nor keys.
CASES = [
    (13, 19, 512, 2, 1, 8, 5, "float32"),
    (13, 19, 4, 1, 3, 7, 8, "float32"),
    (9, 19, 4, 2, 2, 16, 16, "bfloat16"),
    (1, 19, 8, 2, 2, 16, 16, "float32"),
]


@pytest.fixture
def arrays(normal):
    """Return a source of the arguments of six rows."""

    def draw(T, S, G, R, K, V, dtype="float32"):
        shapes = (T, G * R, K), (T, G, K), (T, G, V), (S, G, K), (S, G, V)
        return *(normal(6, *shape, dtype=dtype) for shape in shapes), jnp.asarray(LENGTHS)

    return draw


@parametrize_some(
    "T, S, chunk, G, R, K, V, dtype, packed",
    [(*case, packed) for case in CASES for packed in (False, True)],
    [(*CASES[1], True)],
)
def test_chunks_equal_the_oracle(T, S, chunk, G, R, K, V, dtype, packed, arrays, packed_ids, close, monkeypatch):
    for module in (softmax_chunks, softmax_prefill):
        monkeypatch.setattr(module, "CHUNK_TOKENS", chunk)
    call, ids = arrays(T, S, G, R, K, V, dtype), packed_ids(T) if packed else None
    o, expected = (prefill(*call, segment_ids=ids, impl=impl) for impl in ("xla_chunks", "oracle"))
    real = np.ones((6, T)) if ids is None else ids != 0
    close(*(jnp.where(real[..., None, None], y, 0) for y in (o, expected)), dtype)


@pytest.mark.long
def test_it_goes_on_where_attention_was_cut(normal, close):
    q, k, v = (normal(2, 20, 4, 8) for _ in "qkv")
    past = [jnp.pad(x[:, :12], ((0, 0), (0, 5), (0, 0), (0, 0)), constant_values=1e30) for x in (k, v)]
    o = prefill(*(x[:, 12:] for x in (q, k, v)), *past, jnp.full(2, 12))
    close(o, jax.jit(lambda *qkv: softmax.attention(*qkv, impl="oracle"))(q, k, v)[:, 12:])


def test_an_empty_cache_is_the_parallel_pass(arrays):
    """Bit for bit, by whatever form that pass takes, and the cache is not looked at."""
    q, k, v, past_k, past_v, length = arrays(13, 19, 2, 2, 8, 8)
    past = past_k + jnp.nan, past_v + jnp.nan, jnp.zeros_like(length)
    whole = jax.jit(lambda q, k, v: softmax.attention(q, *(jnp.repeat(x, 2, axis=2) for x in (k, v))))(q, k, v)
    np.testing.assert_array_equal(prefill(q, k, v, *past), whole)


def test_cudnn_s_form_joins_what_it_reads_of_both(arrays, close, monkeypatch):
    """By XLA's form of the same call."""
    attend = jax.nn.dot_product_attention
    in_xla = lambda *qkv, **options: attend(*qkv, **{**options, "implementation": "xla"})  # noqa: E731
    monkeypatch.setattr(jax.nn, "dot_product_attention", in_xla)
    call = softmax_prefill.AttentionPrefillCall(*arrays(13, 19, 2, 2, 7, 7))
    close(*(jax.jit(ATTENTION_PREFILL[form].compute)(call) for form in ("cudnn_flash", "oracle")))


def test_a_chunk_of_32768_tokens_takes_less_than_2_GiB(monkeypatch):
    """Beside as many cached ones, of 16 heads: all scores of the past alone would take 64 GiB."""
    monkeypatch.undo()
    x, length = jax.ShapeDtypeStruct((1, 32768, 16, 64), jnp.bfloat16), jax.ShapeDtypeStruct((1,), jnp.int32)
    compiled = jax.jit(attention_prefill).lower(*[x] * 5, length).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2 << 30
