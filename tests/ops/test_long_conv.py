import jax
import jax.numpy as jnp
import numpy as np
import pytest

from based_jax.errors import UserError
from based_jax.ops.long_conv import long_conv


def test_oracle_is_the_convolution_of_numpy(normal):
    u, kernel = normal(2, 11, 3), normal(11, 3)
    y = long_conv(u, kernel, impl="oracle")
    for b in range(2):
        for d in range(3):
            np.testing.assert_allclose(y[b, :, d], np.convolve(u[b, :, d], kernel[:, d])[:11], atol=1e-5)


@pytest.mark.parametrize("T", [1, 2, 37])
@pytest.mark.parametrize("packed", [False, True])
def test_fft_equals_the_oracle(T, packed, normal, packed_ids, out_and_grads, close):
    ids = packed_ids(T) if packed else None
    args = normal(6, T, 3), normal(T, 3)
    ours, expected = (
        out_and_grads(lambda u, k, impl=impl: long_conv(u, k, segment_ids=ids, impl=impl), args, normal(6, T, 3))
        for impl in ("xla_fft", "oracle")
    )
    close(ours[0], expected[0], tolerance=2e-5)


@pytest.mark.parametrize("T", [1, 2, 37])
def test_toeplitz_equals_the_oracle(T, normal, out_and_grads, close):
    args, cotangent = (normal(2, T, 3), normal(T, 3)), normal(2, T, 3)
    calls = [lambda u, k, impl=impl: long_conv(u, k, impl=impl) for impl in ("xla_toeplitz", "oracle")]
    close(*(out_and_grads(call, args, cotangent) for call in calls))
    with pytest.raises(UserError, match="packed documents need a matrix each"):
        long_conv(*args, segment_ids=jnp.ones((2, T), int), impl="xla_toeplitz")


@pytest.mark.parametrize("packed", [False, True])
def test_gradients_equal_the_oracle_s(packed, normal, packed_ids, out_and_grads, close):
    ids = packed_ids(23) if packed else None
    args, cotangent = (normal(6, 23, 3), normal(23, 3)), normal(6, 23, 3)
    calls = [lambda u, k, impl=impl: long_conv(u, k, segment_ids=ids, impl=impl) for impl in ("xla_fft", "oracle")]
    close(*(out_and_grads(call, args, cotangent) for call in calls), tolerance=2e-5)


def test_bf16_keeps_its_dtype(normal, close):
    u, kernel = normal(2, 30, 3, dtype="bfloat16"), normal(30, 3)
    y = jax.jit(long_conv)(u, kernel)
    assert y.dtype == jnp.bfloat16
    close(y, long_conv(u.astype(jnp.float32), kernel, impl="oracle"), "bfloat16")
