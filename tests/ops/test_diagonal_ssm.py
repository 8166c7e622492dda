import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from based_jax.ops.diagonal_ssm import CHUNK_TOKENS, diagonal_ssm, impulse_response, initial_state

H, P, N = 2, 3, 4


def parameters(normal):
    real, imaginary, *parts = (np.asarray(normal(H, N)) for _ in range(6))
    log_a = -np.abs(real) * np.float32(0.1) - np.float32(0.01) + 1j * imaginary
    return log_a, parts[0] + 1j * parts[1], parts[2] + 1j * parts[3]


def test_oracle_is_a_convolution_with_the_impulse_response(normal):
    log_a, b, c = parameters(normal)
    u = np.asarray(normal(2, 20, H, P))
    a, b64, c64 = (np.asarray(x, np.complex128) for x in (np.exp(log_a), b, c))
    response = 2 * np.stack([(c64 * b64 * a**t).sum(axis=-1).real for t in range(20)], axis=1)
    found = jax.jit(impulse_response, static_argnums=3)(log_a, b, c, 20)
    np.testing.assert_allclose(found, response, atol=1e-4)
    expected = [sum(response[:, t - s, None] * u[:, s] for s in range(t + 1)) for t in range(20)]
    y, _ = jax.jit(functools.partial(diagonal_ssm, impl="oracle"))(u, log_a, b, c)
    np.testing.assert_allclose(y, np.stack(expected, axis=1), atol=2e-4)


@pytest.mark.parametrize("T", [1, 33, 2 * CHUNK_TOKENS + 1])
def test_chunked_equals_the_oracle(T, normal, packed_ids, out_and_grads, close):
    ids, state = packed_ids(T), normal(6, H, P, N, 2)
    args = normal(6, T, H, P), state, *parameters(normal)

    def call(impl):
        def run(u, state, log_a, b, c):
            return diagonal_ssm(u, log_a, b, c, state=state, segment_ids=ids, impl=impl)

        return run

    cotangents = normal(*args[0].shape), normal(*state.shape)
    ours, expected = (out_and_grads(call(impl), args, cotangents) for impl in ("xla_chunks", "oracle"))
    split = [jax.tree.map(lambda x: (x.real, x.imag), jax.device_get(tree)) for tree in (ours, expected)]
    close(*split, tolerance=2e-5)


@pytest.mark.parametrize("T", [1, 33])
def test_toeplitz_equals_the_oracle(T, normal, out_and_grads, close):
    args, cotangents = (normal(2, T, H, P), *parameters(normal)), (normal(2, T, H, P), normal(2, H, P, N, 2))
    impls = "xla_toeplitz", "oracle"
    calls = [lambda *xs, impl=impl: diagonal_ssm(*xs, impl=impl) for impl in impls]
    found = (out_and_grads(call, args, cotangents) for call in calls)
    close(*(jax.tree.map(lambda x: (x.real, x.imag), jax.device_get(tree)) for tree in found), tolerance=2e-5)


def test_a_row_of_padding_keeps_the_state_and_bf16_its_dtype(normal):
    u, state = normal(1, 5, H, P, dtype="bfloat16"), normal(1, H, P, N, 2)
    y, after = jax.jit(diagonal_ssm)(u, *parameters(normal), state=state, segment_ids=np.zeros((1, 5), np.int32))
    assert y.dtype == jnp.bfloat16 and not np.any(np.asarray(y, np.float32))
    np.testing.assert_array_equal(after, state)
    assert initial_state(1, H, P, N).shape == state.shape
