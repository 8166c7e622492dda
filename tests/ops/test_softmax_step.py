"""Attention of one token over a cache, of which each row has filled another length."""

import jax
import jax.numpy as jnp
import numpy as np
from helpers.cases import parametrize_some

from based_jax import parallel
from based_jax.ops import softmax_step
from based_jax.ops.softmax import attention
from based_jax.ops.softmax_step import attention_step, attention_step_weights

step = jax.jit(attention_step, static_argnames=("head_dim", "impl"))

LENGTHS = [0, 1, 4, 9, 20, 21]
# (S, block, G, R, K, V, dtype): caches of one block, of several, and of some that the last one is no whole of.
CASES = [
    (21, 1024, 2, 1, 8, 5, "float32"),
    (21, 7, 1, 3, 7, 8, "float32"),
    (21, 8, 2, 2, 16, 16, "float32"),
    (21, 8, 2, 2, 16, 16, "bfloat16"),
    (21, 4, 3, 1, 70, 70, "bfloat16"),
]


@parametrize_some("S, block, G, R, K, V, dtype", CASES, CASES[3:4])
def test_blocks_equal_the_oracle(S, block, G, R, K, V, dtype, normal, close, monkeypatch):
    monkeypatch.setattr(softmax_step, "BLOCK_TOKENS", block)
    arrays = *(normal(6, *x, dtype=dtype) for x in ((G * R, K), (S, G, K), (S, G, V))), jnp.asarray(LENGTHS)
    for head_dim in (None, K - 1):
        o, expected = (step(*arrays, head_dim=head_dim, impl=impl) for impl in ("xla", "oracle"))
        close(o, expected, dtype)
    assert o.dtype == dtype and not np.asarray(o[0]).any()


def test_weights_are_those_of_the_definition(normal, close):
    """Beside what is read, of queries that share a key their mean; what a row has not filled is given nothing."""
    q, k, v = normal(6, 4, 8), normal(6, 21, 2, 8), normal(6, 21, 2, 8)
    length = jnp.asarray(LENGTHS)
    for impl in ("xla", "oracle"):
        o, weights = jax.jit(attention_step_weights, static_argnames="impl")(q, k, v, length, impl=impl)
        close(o, step(q, k, v, length, impl="oracle"))
        for row, count in enumerate(LENGTHS):
            s = np.einsum("grk,sgk->sgr", np.reshape(q[row], (2, 2, 8)), k[row, :count]) / np.sqrt(8)
            p = np.exp(s - s.max(axis=0, initial=-1e30))
            expected = (p / p.sum(axis=0)).mean(axis=2) if count else p.sum(axis=2)
            np.testing.assert_allclose(weights[row, :count], expected, atol=1e-5)
            assert not np.asarray(weights[row, count:]).any()


def test_it_is_the_last_row_of_attention(normal, close):
    q, k, v = (normal(2, 20, 4, 8) for _ in "qkv")
    o = step(q[:, -1], k, v, jnp.full(2, 20))
    close(o, jax.jit(lambda *qkv: attention(*qkv, impl="oracle"))(q, k, v)[:, -1])


def test_what_a_row_has_not_filled_is_not_read(normal, monkeypatch):
    """No block behind the longest row is, nor does what is there in a shorter one show."""
    monkeypatch.setattr(softmax_step, "BLOCK_TOKENS", 4)
    q, k, v = normal(2, 2, 8), normal(2, 20, 2, 8), normal(2, 20, 2, 8)
    length = jnp.asarray([3, 6])
    program = jax.jit(lambda *x: attention_step(*x)).lower(q, k, v, length).compile()
    there = (np.arange(20)[None] < length[:, None])[..., None, None]
    longest = (np.arange(20) < 8)[None, :, None, None]
    stale = [np.where(longest, np.where(there, x, 1e30), np.nan) for x in (k, v)]
    np.testing.assert_array_equal(program(q, *stale, length), program(q, k, v, length))


def test_grouped_keys_are_not_repeated():
    """What a step keeps beside the cache is a tenth of it: four queries for each key, which were four copies."""
    q, k = jax.ShapeDtypeStruct((2, 16, 64), jnp.float32), jax.ShapeDtypeStruct((2, 1024, 4, 64), jnp.float32)
    compiled = jax.jit(attention_step).lower(q, k, k, jax.ShapeDtypeStruct((2,), jnp.int32)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * k.size * 4 / 10


@parametrize_some("blocks", [1024, 4], [4])
def test_each_device_reads_its_own_rows_and_heads(blocks, normal, close, monkeypatch):
    monkeypatch.setattr(softmax_step, "BLOCK_TOKENS", blocks)
    arrays = normal(4, 4, 8), normal(4, 10, 2, 8), normal(4, 10, 2, 8), jnp.asarray([1, 5, 10, 3])
    mesh = parallel.make_mesh({"data": 4, "tensor": 2})
    specs = [jax.P("data", "tensor"), *[jax.P("data", None, "tensor")] * 2, jax.P("data")]
    placed = [jax.device_put(x, jax.NamedSharding(mesh, spec)) for x, spec in zip(arrays, specs, strict=True)]
    with jax.set_mesh(mesh):
        compiled = jax.jit(lambda *x: attention_step(*x)).lower(*placed).compile()  # not one with other blocks
        close(compiled(*placed), step(*arrays, impl="oracle"))
    assert not any(word in compiled.as_text() for word in ("all-gather", "all-reduce", "collective-permute"))
