import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.cases import parametrize_some
from helpers.documents import numbered

from based_jax.devices import H100_CROSSOVERS
from based_jax.ops import dispatch
from based_jax.ops.calls import LinearAttentionCall
from based_jax.ops.hopper import limits
from based_jax.ops.linear_attention import CHUNK_TOKENS
from based_jax.ops.taylor import (
    IMPLEMENTATIONS,
    expanded_dim,
    full_taylor_features,
    taylor_attention,
    taylor_features,
)

FAST = [name for name, entry in IMPLEMENTATIONS.items() if entry.platform is None and name != "oracle"]


def forms(length):
    """Return what a case is for: longer than half a chunk, only the chunked form does anything new."""
    return FAST if length <= CHUNK_TOKENS // 2 + 1 else ["xla_chunks"]


# (T, K, V, H): both sides of the chunk and of half of it, and the odd sizes.
CASES = [
    (1, 16, 64, 2),
    (2, 24, 112, 1),
    (63, 7, 5, 3),
    (64, 16, 1, 2),
    (65, 24, 5, 1),
    (127, 1, 64, 3),
    (128, 8, 5, 2),
    (129, 16, 64, 1),
    (300, 8, 5, 2),
]


def features64(x):
    """Return phi(x) from its definition, product by product."""
    K = x.shape[-1]
    x = x / K**0.25
    products = [x[..., m] * x[..., n] * (math.sqrt(0.5) if m == n else 1) for m in range(K) for n in range(m + 1)]
    return np.concatenate([np.ones_like(x[..., :1]), x, np.stack(products, axis=-1)], axis=-1)


def exact(q, k, v, state=None, ids=None):
    """Return outputs and state in fp64, one document after another."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    v1 = np.concatenate([v, np.ones_like(v[..., :1])], axis=-1)
    ids = np.ones(q.shape[:2], int) if ids is None else numbered(np.asarray(ids))
    B, _, H, K = q.shape
    after = np.zeros((B, H, expanded_dim(K), v1.shape[-1])) if state is None else np.array(state, np.float64)
    o = np.zeros_like(v)
    for b in range(B):
        for i, document in enumerate(dict.fromkeys(ids[b][ids[b] != 0])):
            at = np.flatnonzero(ids[b] == document)
            if i > 0:
                after[b] = 0
            s = np.einsum("thk,shk->hts", q[b, at], k[b, at]) / math.sqrt(K)
            sums = np.einsum("hts,shv->thv", np.tril(1 + s + s**2 / 2), v1[b, at])
            sums += np.einsum("the,hev->thv", features64(q[b, at]), after[b])
            o[b, at] = sums[..., :-1] / sums[..., -1:]
            after[b] += np.einsum("the,thv->hev", features64(k[b, at]), v1[b, at])
    return o, after


def caller(impl, *, ids=None):
    def call(q, k, v, state=None):
        return taylor_attention(q, k, v, state=state, segment_ids=ids, impl=impl)

    return call


@pytest.fixture
def draw(normal, packed_ids):
    """Return a source of (q, k, v), a state and ids for sizes of `CASES`."""

    def inputs(T, K, V, H, dtype="float32", batch=6):
        q, k = (normal(batch, T, H, K, dtype=dtype) for _ in range(2))
        k0, v0 = np.asarray(normal(batch, 5, H, K), np.float64), np.asarray(normal(batch, 5, H, V + 1), np.float64)
        v0[..., -1] = 1
        state = np.einsum("bthe,bthv->bhev", features64(k0), v0).astype(np.float32)
        return (q, k, normal(batch, T, H, V, dtype=dtype)), state, packed_ids(T)

    return inputs


@pytest.fixture
def cotangents(normal):
    """Return a source of cotangents for the output and the state."""

    def draw(qkv, dtype="float32"):
        (B, T, H, V), K = qkv[2].shape, qkv[0].shape[-1]
        return normal(B, T, H, V, dtype=dtype), normal(B, H, expanded_dim(K), V + 1, scale=0.1)

    return draw


def test_features_have_the_taylor_inner_product(normal, close):
    for K in (1, 7, 8, 16, 24, 32):
        q, k = normal(50, K), normal(50, K)
        s = np.sum(np.asarray(q, np.float64) * np.asarray(k, np.float64), axis=-1) / math.sqrt(K)
        for features, size in ((taylor_features, expanded_dim(K)), (full_taylor_features, 1 + K + K * K)):
            phi_q, phi_k = jax.jit(lambda q, k, phi=features: (phi(q), phi(k)))(q, k)
            assert phi_q.shape == (50, size)
            close(np.sum(np.asarray(phi_q, np.float64) * phi_k, axis=-1), 1 + s + s**2 / 2)
        close(jax.jit(taylor_features)(q), features64(np.asarray(q, np.float64)))


@pytest.mark.parametrize("case", CASES[:5], ids=str)
def test_oracle_equals_fp64(case, draw, close):
    qkv, state, ids = draw(*case)

    @jax.jit
    def both(qkv, state, ids):
        return caller("oracle")(*qkv), caller("oracle", ids=ids)(*qkv, state)

    plain, packed = both(qkv, state, ids)
    close(plain, exact(*qkv), what="plain")
    close(packed, exact(*qkv, state, ids), what="packed, with a state")


def test_oracle_gradients_equal_fp64_differences(draw, cotangents, normal, out_and_grads):
    qkv, state, ids = draw(20, 7, 5, 2)
    args = (*qkv, state)
    weights = tuple(np.asarray(w, np.float64) for w in cotangents(qkv))
    _, grads = out_and_grads(lambda *a: caller("oracle", ids=ids)(*a), args, weights)
    for i, (x, grad) in enumerate(zip(args, grads, strict=True)):
        direction, step = np.asarray(normal(*x.shape), np.float64), 1e-5

        def moved(sign, i=i, x=x, by=step * direction):
            o, after = exact(*args[:i], np.asarray(x, np.float64) + sign * by, *args[i + 1 :], ids)
            return np.sum(o * weights[0]) + np.sum(after * weights[1])

        slope = (moved(1) - moved(-1)) / (2 * step)
        assert abs(np.sum(grad * direction) - slope) < 1e-5 * np.linalg.norm(grad), f"argument {i}"


@parametrize_some("case", CASES, [CASES[i] for i in (0, 2, 4, 7, 8)], ids=str)
def test_every_form_equals_the_oracle(case, draw, cotangents, out_and_grads, close):
    qkv, state, ids = draw(*case)
    args, weights = (*qkv, state), cotangents(qkv)
    expected = out_and_grads(caller("oracle", ids=ids), args, weights)
    for impl in forms(case[0]):
        close(out_and_grads(caller(impl, ids=ids), args, weights), expected, what=impl)


@pytest.mark.parametrize("case", [CASES[3], CASES[7]], ids=str)
def test_every_form_equals_the_oracle_without_state_and_ids(case, draw, cotangents, out_and_grads, close):
    qkv, _, _ = draw(*case, batch=2)
    weights = cotangents(qkv)
    expected = out_and_grads(caller("oracle"), qkv, weights)
    for impl in forms(case[0]):
        close(out_and_grads(caller(impl), qkv, weights), expected, floor=1e-5, what=impl)


@pytest.mark.parametrize("case", [(65, 24, 5, 3), pytest.param((300, 8, 64, 2), marks=pytest.mark.long)], ids=str)
def test_every_form_equals_the_oracle_in_bf16(case, draw, cotangents, out_and_grads, close):
    qkv, state, ids = draw(*case, dtype="bfloat16")
    weights = cotangents(qkv, "bfloat16")
    expected = out_and_grads(caller("oracle", ids=ids), (*qkv, state), weights)
    for impl in forms(case[0]):
        (o, after), grads = out_and_grads(caller(impl, ids=ids), (*qkv, state), weights)
        assert (o.dtype, after.dtype) == (jnp.bfloat16, jnp.float32)
        close(((o, after), grads), expected, "bfloat16", what=impl)


@pytest.mark.parametrize("impl", FAST)
def test_pieces_equal_one_call(impl, draw, cotangents, out_and_grads, close):
    """A row of one document and a left-padded one, whose first piece is padding only; gradients cross the state."""
    qkv, state, _ = draw(200, 8, 5, 2, batch=2)
    ids = np.int32([np.ones(200), np.arange(200) >= 65])

    def in_pieces(*args):
        *qkv, state = args
        outputs = []
        for start, stop in ((0, 65), (65, 194), (194, 200)):
            o, state = caller(impl, ids=ids[:, start:stop])(*(x[:, start:stop] for x in qkv), state)
            outputs.append(o)
        return jnp.concatenate(outputs, axis=1), state

    args, weights = (*qkv, state), cotangents(qkv)
    close(out_and_grads(in_pieces, args, weights), out_and_grads(caller("oracle", ids=ids), args, weights))


@pytest.mark.parametrize("impl", [*FAST, "oracle"])
def test_vmap_equals_a_loop(impl, draw, close):
    qkv, state, ids = draw(130, 7, 5, 2)
    lanes = [np.reshape(x, (3, 2, *x.shape[1:])) for x in jax.device_get((*qkv, state, ids))]
    call = jax.jit(lambda *lane: caller(impl, ids=lane[-1])(*lane[:-1]))
    mapped = jax.device_get(jax.jit(jax.vmap(call))(*lanes))
    for i in range(3):
        close(jax.tree.map(lambda x, i=i: x[i], mapped), call(*(x[i] for x in lanes)))


@pytest.mark.parametrize("impl", [*FAST, "oracle"])
def test_large_scores_and_large_late_keys(impl, draw, close):
    (q, k, v), _, _ = jax.device_get(draw(300, 16, 64, 1, batch=2))
    growing = np.exp(np.linspace(-5, 7, 300, dtype=np.float32)).reshape(1, 300, 1, 1)
    for name, q_, k_ in (("large scores", 30 * q, 30 * k), ("late keys", q, growing * k)):
        o, state = jax.jit(caller(impl))(q_, k_, v)
        expected, expected_state = exact(q_, k_, v)
        close(state, expected_state, what=name)
        close(o, expected, tolerance=1e-3, what=name)


@pytest.mark.parametrize("impl", [name for name in FAST if name != "xla_quadratic"])
def test_state_of_bf16_inputs_does_not_drift(impl, draw, close):
    """A state that is summed in bf16 would stop counting at 256 tokens."""
    (q, k, v), _, _ = jax.device_get(draw(4096, 8, 5, 1, dtype="bfloat16", batch=1))
    o, state = jax.jit(caller(impl))(q, k, v + 1)
    expected, expected_state = exact(q, k, v + 1)
    assert np.asarray(state)[0, 0, 0, -1] == 4096
    close(state, expected_state, tolerance=1e-3)
    close(o, expected, "bfloat16")


def temporary_bytes(f, T, K=16, V=16):
    shapes = [jax.ShapeDtypeStruct((1, T, 2, size), jnp.float32) for size in (K, K, V)]
    return jax.jit(f).lower(*shapes).compile().memory_analysis().temp_size_in_bytes


def test_memory_is_linear_and_features_are_never_whole():
    def forward(q, k, v):
        return taylor_attention(q, k, v, impl="xla_chunks")[0]

    backward = jax.grad(lambda *qkv: jnp.sum(forward(*qkv) ** 2), argnums=(0, 1, 2))
    T = 16 * CHUNK_TOKENS
    features = 4 * T * 2 * expanded_dim(16) * 4
    for f in (forward, backward):
        once, four_times = temporary_bytes(f, T), temporary_bytes(f, 4 * T)
        assert four_times < 4.5 * once
        assert four_times < features


def test_auto_takes_one_chunk_for_short_sequences_on_a_gpu(draw, monkeypatch):
    monkeypatch.setattr(dispatch, "target_platform", lambda: "cuda")
    monkeypatch.setattr(limits, "refusal", lambda: "this is no Hopper GPU")
    most = H100_CROSSOVERS.linear_attention_one_chunk_tokens
    for length, chosen in ((most, "xla_quadratic"), (most + 1, "xla_chunks")):
        x = jnp.zeros((1, length, 1, 4))
        call = LinearAttentionCall(x, x, x)
        assert dispatch.choose("taylor_attention", IMPLEMENTATIONS, "auto", call) == chosen
