import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.reference_cases import FORWARD, assert_close, load

from based_jax.ops.calls import WkvState
from based_jax.ops.scan import BLOCK_TOKENS
from based_jax.ops.wkv4 import initial_state, wkv4, wkv4_step

D = 4
jitted = jax.jit(wkv4, static_argnames="impl")


def parameters(normal):
    return -jnp.exp(normal(D)), normal(D)


def test_oracle_is_the_average_in_fp64(normal):
    k, v, (decay, bonus) = normal(2, 7, D), normal(2, 7, D), parameters(normal)
    wkv, _ = jitted(k, v, decay, bonus, impl="oracle")
    k64, v64, d, u = (np.asarray(x, np.float64) for x in (k, v, decay, bonus))
    for t in range(7):
        age = np.arange(t)[::-1, None] * d
        weights = np.concatenate([np.exp(age[None] + k64[:, :t]), np.exp(u + k64[:, t])[:, None]], axis=1)
        expected = (weights * v64[:, : t + 1]).sum(axis=1) / weights.sum(axis=1)
        np.testing.assert_allclose(wkv[:, t], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "T", [1, *(pytest.param(T, marks=pytest.mark.long) for T in (BLOCK_TOKENS, 37)), 2 * BLOCK_TOKENS + 3]
)
def test_chunked_equals_the_oracle(T, normal, packed_ids, out_and_grads, close):
    """The maximum is a means: what counts is the sums that it scales."""
    ids, (decay, bonus) = packed_ids(T), parameters(normal)
    state = WkvState(normal(6, D), jnp.abs(normal(6, D)) + 0.1, normal(6, D))

    def call(impl):
        def run(k, v, decay, bonus, state):
            wkv, after = wkv4(k, v, decay, bonus, state=state, segment_ids=ids, impl=impl)
            scale = jnp.exp(after.max)
            return wkv, after.num * scale, after.den * scale

        return run

    args = normal(6, T, D), normal(6, T, D), decay, bonus, state
    cotangents = normal(6, T, D), normal(6, D), normal(6, D)
    close(*(out_and_grads(call(impl), args, cotangents) for impl in ("xla_chunks", "oracle")), tolerance=5e-5)


@pytest.mark.parametrize("impl", ["xla_steps", "xla_chunks"])
def test_huge_keys_do_not_overflow(impl, normal):
    k, v, (decay, bonus) = 300 * normal(2, 40, D), normal(2, 40, D), parameters(normal)
    wkv, _ = jitted(k, v, decay, bonus, impl=impl)
    assert np.isfinite(wkv).all()
    assert np.abs(wkv).max() <= np.abs(v).max() + 1e-5


def test_steps_and_bf16(normal, close):
    k, v, (decay, bonus) = normal(2, 6, D, dtype="bfloat16"), normal(2, 6, D, dtype="bfloat16"), parameters(normal)
    whole, after = jitted(k, v, decay, bonus)
    assert whole.dtype == jnp.bfloat16
    state, step = initial_state(2, D), jax.jit(wkv4_step)
    for t in range(6):
        wkv, state = step(np.asarray(k)[:, t], np.asarray(v)[:, t], decay, bonus, state)
        close(wkv, whole[:, t], "bfloat16")
    close(state.num * jnp.exp(state.max), after.num * jnp.exp(after.max))


def test_reference_and_its_state():
    case = load("hf_rwkv4_time_mix_a")
    key, value = (jnp.asarray(case.outputs[name]) for name in ("key", "value"))
    decay, bonus = -np.exp(case.weights["time_decay"]), case.weights["time_first"]
    wkv, state = jitted(key, value, decay, bonus)
    assert_close(wkv, case.outputs["wkv"], FORWARD)
    for name in ("num", "den", "max"):
        assert_close(getattr(state, name), case.outputs[f"state_{name}"], FORWARD, name)
