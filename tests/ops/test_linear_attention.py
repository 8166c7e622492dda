import jax
import jax.numpy as jnp
import numpy as np
import pytest

from based_jax.devices import H100_CROSSOVERS
from based_jax.ops import dispatch
from based_jax.ops import linear_attention as linear_attention_module
from based_jax.ops.calls import LinearAttentionCall
from based_jax.ops.linear_attention import (
    CHUNK_TOKENS,
    IMPLEMENTATIONS,
    encoder_state,
    initial_state,
    linear_attention,
    linear_attention_step,
)
from based_jax.ops.precision import EXACT

FAST = [name for name in IMPLEMENTATIONS if name != "oracle"]
jitted = jax.jit(linear_attention, static_argnames="impl")


def inputs(normal, T, E=6, V=5, H=2, B=6, dtype="float32"):
    """Return features that are positive, so that no normaliser vanishes, values and a state."""
    phi_q, phi_k = (np.abs(normal(B, T, H, E)) + 0.1 for _ in "qk")
    state = np.abs(normal(*jax.eval_shape(lambda: initial_state(B, H, E, V)).shape))
    return *(x.astype(dtype) for x in (phi_q, phi_k, np.asarray(normal(B, T, H, V)))), state


def test_oracle_equals_fp64(normal):
    phi_q, phi_k, v, state = inputs(normal, 9, B=1)
    q, k, v64, s = (np.asarray(x, np.float64) for x in (phi_q, phi_k, v, state))
    o, after = jitted(phi_q, phi_k, v, state=state, impl="oracle")
    for t in range(9):
        s = s + np.einsum("bhe,bhv->bhev", k[:, t], np.concatenate([v64[:, t], np.ones((1, 2, 1))], axis=-1))
        sums = np.einsum("bhe,bhev->bhv", q[:, t], s)
        np.testing.assert_allclose(o[:, t], sums[..., :-1] / sums[..., -1:], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(after, s, rtol=1e-5)


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("T", [1, 33, CHUNK_TOKENS + 1])
def test_every_form_equals_the_oracle(impl, T, normal, packed_ids, out_and_grads, close):
    args, ids = inputs(normal, T), packed_ids(T)

    def call(impl):
        def run(phi_q, phi_k, v, state):
            return linear_attention(phi_q, phi_k, v, state=state, segment_ids=ids, impl=impl)

        return run

    cotangents = normal(*args[2].shape), normal(*args[3].shape)
    close(out_and_grads(call(impl), args, cotangents), out_and_grads(call("oracle"), args, cotangents))


@pytest.mark.parametrize("impl", FAST)
def test_bf16_stays_close(impl, normal, close):
    phi_q, phi_k, v, _ = inputs(normal, 70, dtype="bfloat16")
    o, _ = jitted(phi_q, phi_k, v, impl=impl)
    assert o.dtype == jnp.bfloat16
    exact, _ = jitted(*(x.astype(np.float32) for x in (phi_q, phi_k, v)), impl="oracle")
    close(o, exact, "bfloat16")


def test_steps_equal_one_pass(normal, close):
    phi_q, phi_k, v, state = inputs(normal, 5)
    whole, after = jax.device_get(jitted(phi_q, phi_k, v, state=state))
    step = jax.jit(linear_attention_step)
    for t in range(5):
        o, state = step(*(x[:, t] for x in (phi_q, phi_k, v)), state)
        close(o, whole[:, t])
    close(state, after)


def test_an_encoded_prefix_is_a_state_in_no_order(normal, close):
    phi_q, phi_k, v, _ = inputs(normal, 8)
    mask = np.int32([[1, 1, 0, 1, 1, 1, 0, 1]] * 6)
    _, after = jitted(phi_q, phi_k, v, segment_ids=mask, impl="oracle")
    last, encode = np.int32([[0, 0, 0, 0, 0, 0, 0, 1]] * 6), jax.jit(encoder_state)

    def encoded(*arrays):
        return np.asarray(encode(*arrays))

    close(encoded(phi_k, v, mask), encoded(phi_k[:, ::-1], v[:, ::-1], mask[:, ::-1]))
    close(encoded(phi_k, v, mask) - encoded(phi_k, v, mask - last), encoded(phi_k, v, last))
    close(after, encoded(phi_k, v, mask))


def test_values_with_a_mean_cost_the_gradient_no_digits(normal):
    """The two terms of a weight's gradient are then much larger than their sum."""
    p, v, g = np.square(normal(2, 1, 9, 9)), np.asarray(normal(2, 9, 1, 64)) + 30, np.asarray(normal(2, 9, 1, 64))
    p, v, g = (x.astype(jnp.bfloat16) for x in (p, v, g))

    @jax.jit
    def pulled_back(p, v, g):
        return jax.vjp(lambda p, v: linear_attention_module._mean(p, v, None, EXACT), p, v)[1](g)[0]

    p64, v64, g64 = (np.asarray(x, np.float64) for x in (p, v, g))
    z = p64.sum(-1).swapaxes(1, 2)[..., None]
    o = np.einsum("bhts,bshv->bthv", p64, v64) / z
    share = g64 / z
    expected = np.einsum("bthv,bshv->bhts", share, v64) - np.sum(share * o, -1).swapaxes(1, 2)[..., None]
    found = np.asarray(pulled_back(p, v, g), np.float64)
    assert np.abs(found - expected).max() < 0.02 * np.abs(expected).max()


def test_auto_takes_one_chunk_for_short_sequences_on_a_gpu(monkeypatch):
    monkeypatch.setattr(dispatch, "target_platform", lambda: "cuda")
    most = H100_CROSSOVERS.linear_attention_one_chunk_tokens
    for length, chosen in ((most, "xla_quadratic"), (most + 1, "xla_chunks")):
        x = jnp.zeros((1, length, 1, 4))
        call = LinearAttentionCall(x, x, x)
        assert dispatch.choose("linear_attention", IMPLEMENTATIONS, "auto", call) == chosen


def test_one_chunk_of_a_sequence_that_auto_would_cut(normal, close):
    q, k, v = (np.abs(normal(1, H100_CROSSOVERS.linear_attention_one_chunk_tokens + 1, 1, 4)) for _ in range(3))
    close(*(jitted(q, k, v, impl=impl) for impl in ("xla_quadratic", "oracle")))
