"""A token of a delta rule on unit queries and keys, against its definition."""

import jax
import numpy as np
import pytest

from based_jax.ops.unit_delta_step import unit_delta_step

B, H, K, V = 3, 2, 5, 7


@pytest.mark.parametrize("impl", ["auto", "oracle"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("decays", [1, K])
def test_a_token_is_its_definition(decays, dtype, impl, normal, close):
    """Queries of all heads stand first, then keys, then values; one query is 0, and another is large."""
    joint, log_decay = normal(B, H * (2 * K + V), dtype=dtype), -(normal(B, H, decays) ** 2)
    joint = joint.at[0, :K].set(0).at[1, :K].mul(1e4)
    beta, state = jax.nn.sigmoid(normal(B, H)), normal(B, H, K, V)
    found, after = jax.jit(lambda *x: unit_delta_step(*x, scale=0.3, impl=impl))(joint, log_decay, beta, state)
    assert found.dtype == joint.dtype
    x = np.asarray(joint, np.float64)
    q, k, v = (part.reshape(B, H, -1) for part in np.split(x, [H * K, 2 * H * K], axis=1))
    q, k = (part / np.sqrt((part**2).sum(axis=2, keepdims=True) + 1e-6) for part in (q, k))
    kept = np.exp(np.asarray(log_decay, np.float64))[..., None] * np.asarray(state, np.float64)
    new = np.asarray(beta, np.float64)[..., None] * (v - np.einsum("bhk,bhkv->bhv", k, kept))
    right = kept + k[..., None] * new[:, :, None]
    close(after, right, "float32")
    close(found, 0.3 * np.einsum("bhk,bhkv->bhv", q, right), dtype)
