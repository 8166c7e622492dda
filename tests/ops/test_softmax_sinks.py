"""Windows with sinks: every form equals the oracle, and that one fp64 sums over the keys that are seen."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.devices import gpus
from helpers.documents import numbered

from based_jax import parallel
from based_jax.errors import UserError
from based_jax.ops import softmax, softmax_chunks
from based_jax.ops.calls import AttentionCall
from based_jax.ops.dispatch import choose
from based_jax.ops.hopper import window as hopper_window
from based_jax.ops.softmax import WINDOW_ATTENTION, window_attention

# (T, K, V, H, window, sinks): below, at and above a band; more sinks than keys before the window, and than tokens.
CASES = [(9, 4, 5, 2, 1, 1), (65, 8, 4, 2, 7, 3), (130, 16, 8, 3, 66, 4), (129, 5, 6, 1, 40, 70), (20, 4, 4, 1, 30, 2)]
FORMS = ["xla_bands", "xla_chunks", "xla_steps"]


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    monkeypatch.setattr(softmax_chunks, "CHUNK_TOKENS", 32)


@pytest.fixture
def draw(normal, packed_ids):
    def inputs(T, K, V, H, dtype="float32"):
        q, k, v, cotangent = (normal(6, T, H, size, dtype=dtype) for size in (K, K, V, V))
        return (q, k, v), cotangent, packed_ids(T)

    return inputs


def caller(impl, window, sinks, ids=None):
    return lambda q, k, v: window_attention(q, k, v, window=window, sinks=sinks, segment_ids=ids, impl=impl)


def exact(q, k, v, window, sinks, ids):
    """Return outputs in fp64, query by query over the tokens of its document that it sees."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    ids = np.ones(q.shape[:2], int) if ids is None else numbered(np.asarray(ids))
    o = np.zeros_like(v)
    for b, t in zip(*np.nonzero(ids), strict=True):
        own = np.flatnonzero(ids[b, : t + 1] == ids[b, t])
        seen = np.union1d(own[:sinks], own[max(0, len(own) - window) :])
        s = np.einsum("hk,shk->hs", q[b, t], k[b, seen]) / math.sqrt(q.shape[-1])
        p = np.exp(s - s.max(axis=1, keepdims=True))
        o[b, t] = np.einsum("hs,shv->hv", p / p.sum(axis=1, keepdims=True), v[b, seen])
    return o


@pytest.mark.parametrize("case", CASES[:2] + CASES[4:], ids=str)
def test_the_oracle_equals_fp64(case, draw, close):
    *sizes, window, sinks = case
    qkv, _, ids = draw(*sizes)

    @jax.jit
    def both(qkv, ids):
        return [caller("oracle", window, sinks, each)(*qkv) for each in (ids, None)]

    close(both(qkv, ids), [exact(*qkv, window, sinks, each) for each in (ids, None)])


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("case", CASES[1:4], ids=str)
def test_every_form_equals_the_oracle(case, packed, draw, out_and_grads, close):
    *sizes, window, sinks = case
    qkv, cotangent, ids = draw(*sizes)
    ids = ids if packed else None
    expected = out_and_grads(caller("oracle", window, sinks, ids), qkv, cotangent)
    for impl in FORMS if sizes[0] < 100 else FORMS[:2]:
        close(out_and_grads(caller(impl, window, sinks, ids), qkv, cotangent), expected, what=impl)


@pytest.mark.parametrize("impl", FORMS)
def test_forms_in_bf16_and_of_large_scores(impl, draw, out_and_grads, close):
    qkv, cotangent, ids = draw(65, 8, 4, 2, "bfloat16")
    expected, found = (out_and_grads(caller(name, 7, 3, ids), qkv, cotangent) for name in ("oracle", impl))
    close(found, expected, "bfloat16")
    large = [40 * qkv[0].astype("float32"), *(x.astype("float32") for x in qkv[1:])]
    outputs = [jax.jit(caller(name, 7, 3, ids))(*large) for name in ("oracle", impl)]
    close(outputs[1], outputs[0])


def test_kernels_without_sinks_say_so():
    q = jnp.zeros((1, 64, 2, 64), jnp.bfloat16)
    call = AttentionCall(q, q, q, 8, sinks=2)
    assert "2 sinks are asked for" in hopper_window.supports(call)
    assert "2 are asked for" in softmax.cudnn_supports(call)
    assert "of packed documents" in WINDOW_ATTENTION["tpu_splash"].supports(
        call._replace(segment_ids=jnp.ones((1, 64), int))
    )


@pytest.mark.parametrize(("head_dim", "without"), [(64, "hopper_tiles"), (256, "triton_tiles")])
def test_auto_leaves_sinks_to_xla_until_a_gpu_has_run_them(head_dim, without):
    q = jnp.zeros((2, 256, 2, head_dim), jnp.bfloat16)
    call = AttentionCall(q, q, q, 64, sinks=2)
    with gpus():
        for sinks, impl in ((0, without), (2, "xla_bands")):
            assert choose("window_attention", WINDOW_ATTENTION, "auto", call._replace(sinks=sinks)) == impl
        assert WINDOW_ATTENTION["triton_tiles"].supports(call) is None  # it can be named


def test_tokens_over_devices_are_refused():
    q = jnp.zeros((1, 64, 2, 4))
    mesh = parallel.make_mesh({"sequence": 2}, jax.devices()[:2])
    with jax.set_mesh(mesh), pytest.raises(UserError, match="'sequence' has 2 devices; for windows with sinks"):
        jax.jit(caller("auto", 8, 1))(q, q, q)
