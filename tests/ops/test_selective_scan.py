import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.reference_cases import FORWARD, GRADIENT, assert_close, load

from based_jax.ops.scan import BLOCK_TOKENS
from based_jax.ops.selective_scan import initial_state, selective_scan, selective_scan_step, step_sizes

D, N = 4, 3
IMPLS = ("xla_steps", "xla_chunks")


def inputs(normal, T, dtype="float32"):
    dt = jax.nn.softplus(3 * normal(6, T, D))
    return normal(6, T, D, dtype=dtype), dt, -jnp.exp(normal(D, N)), *(normal(6, T, N, dtype=dtype) for _ in "BC")


def test_oracle_equals_fp64(normal):
    u, dt, A, B, C = inputs(normal, 6)
    h = np.zeros((6, D, N))
    y, _ = jax.jit(functools.partial(selective_scan, impl="oracle"))(u, dt, A, B, C)
    for t in range(6):
        step = np.asarray(dt[:, t], np.float64)[..., None]
        added = step * np.asarray(B[:, t, None]) * np.asarray(u[:, t, :, None])
        h = np.exp(step * np.asarray(A, np.float64)) * h + added
        np.testing.assert_allclose(y[:, t], (h * np.asarray(C[:, t, None])).sum(axis=-1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(2, 5, D), (7, D)])
def test_step_sizes_are_softplus(shape, dtype, normal, out_and_grads, close):
    raw, bias, grad = normal(*shape, dtype=dtype, scale=3.0), normal(D), normal(*shape)
    got = out_and_grads(step_sizes, (raw, bias), grad)
    x = np.asarray(raw, np.float64) + np.asarray(bias, np.float64)
    draw = np.asarray(grad, np.float64) / (1 + np.exp(-x))
    assert (got[0].dtype, got[1][0].dtype, got[1][1].dtype) == (jnp.float32, dtype, jnp.float32)
    close(got[0], np.logaddexp(x, 0))
    close(got[1], (draw, draw.reshape(-1, D).sum(axis=0)), dtype)


@pytest.mark.parametrize("T", [1, pytest.param(37, marks=pytest.mark.long), 2 * BLOCK_TOKENS + 3])
def test_chunked_equals_the_oracle(T, normal, packed_ids, out_and_grads, close):
    ids, state = packed_ids(T), normal(6, D, N)

    def call(impl):
        def run(u, dt, A, B, C, state):
            return selective_scan(u, dt, A, B, C, state=state, segment_ids=ids, impl=impl)

        return run

    args, cotangents = (*inputs(normal, T), state), (normal(6, T, D), normal(6, D, N))
    close(*(out_and_grads(call(impl), args, cotangents) for impl in ("xla_chunks", "oracle")), tolerance=2e-5)


def test_bf16_and_steps(normal, close):
    u, dt, A, B, C = inputs(normal, 9, dtype="bfloat16")
    y, after = jax.jit(selective_scan)(u, dt, A, B, C)
    assert y.dtype == jnp.bfloat16
    state, step = initial_state(6, D, N), jax.jit(selective_scan_step)
    u, dt, B, C = map(np.asarray, (u, dt, B, C))
    for t in range(9):
        o, state = step(u[:, t], dt[:, t], A, B[:, t], C[:, t], state)
        close(o, y[:, t], "bfloat16")
    close(state, after)


@pytest.mark.parametrize("impl", IMPLS)
def test_reference(impl, out_and_grads):
    case = load("mamba1_selective_scan_a")
    names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")

    def call(u, delta, A, B, C, D, z, delta_bias):
        u, delta, B, C, z = (x.swapaxes(1, 2) for x in (u, delta, B, C, z))
        dt = jax.nn.softplus(delta + delta_bias[None, None])
        y, state = selective_scan(u, dt, A, B, C, impl=impl)
        return ((y + D[None, None] * u) * jax.nn.silu(z)).swapaxes(1, 2), state

    args = tuple(jnp.asarray(case.inputs[name]) for name in names)
    (y, state), grads = out_and_grads(call, args, tuple(jnp.asarray(case.inputs[n]) for n in ("r", "r_state")))
    assert_close(y, case.outputs["o"], FORWARD, "y")
    assert_close(state, case.outputs["final_state"], FORWARD, "state")
    for name, grad in zip(names, grads, strict=True):
        assert_close(grad, case.gradients[name], GRADIENT, f"gradient of {name}")


@pytest.mark.parametrize("impl", ["xla_chunks", pytest.param("xla_steps", marks=pytest.mark.long)])
def test_raw_steps_are_those_of_the_bias(impl, normal, packed_ids, out_and_grads, close):
    T, D, N = 13, 5, 3
    u, raw, A, B, C = normal(6, T, D), normal(6, T, D), -jnp.abs(normal(D, N)), normal(6, T, N), normal(6, T, N)
    arguments, ids, cotangents = (u, raw, A, B, C, normal(D)), packed_ids(T), (normal(6, T, D), normal(6, D, N))

    def made_before(u, raw, A, B, C, bias):
        return selective_scan(u, step_sizes(raw, bias), A, B, C, segment_ids=ids, impl="oracle")

    def given(*arguments):
        return selective_scan(*arguments[:5], bias=arguments[5], segment_ids=ids, impl=impl)

    close(
        out_and_grads(given, arguments, cotangents), out_and_grads(made_before, arguments, cotangents), tolerance=2e-5
    )
