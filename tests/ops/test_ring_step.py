"""A token of attention over a ring, against its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from based_jax.errors import UserError
from based_jax.ops.ring_step import ring_step

B, S, G, K = 3, 4, 2, 6


@pytest.mark.parametrize(("dtype", "queries"), [("float32", 4), ("bfloat16", 2)])
def test_a_token_is_its_definition(dtype, queries, normal, close):
    """Rings that are empty, full, and begun; several queries a key."""
    heads, angles = normal(B, queries + 2 * G, K, dtype=dtype), 3 * normal(B, K // 2)
    k, v = normal(B, S, G, K, dtype=dtype), normal(B, S, G, K, dtype=dtype)
    length = np.asarray([0, 7, 2], np.int32)
    o, *rings = jax.jit(ring_step)(heads, k, v, length, angles)
    wide = [np.asarray(x, np.float64) for x in (heads, k, v, angles)]
    for row in range(B):
        expected = defined(*(x[row] for x in wide[:3]), length[row], wide[3][row])
        for found, right in zip((o, *rings), expected, strict=True):
            close(found[row], right, dtype)


def defined(heads, k, v, length, angles):
    turn = np.exp(1j * angles)
    pairs = (heads[:, : K // 2] + 1j * heads[:, K // 2 :]) * turn
    turned = np.concatenate([pairs.real, pairs.imag], axis=1)
    q, own_k, own_v = turned[: -2 * G], turned[-2 * G : -G], heads[-G:]
    k, v = k.copy(), v.copy()
    k[length % S], v[length % S] = own_k, own_v
    seen = min(length + 1, S)
    o = []
    for i, query in enumerate(q):
        g = i * G // len(q)
        p = np.exp(k[:seen, g] @ query / np.sqrt(K))
        o.append(p @ v[:seen, g] / p.sum())
    return np.stack(o), k, v


@pytest.mark.parametrize(("joint", "channels", "half"), [(4, 6, 3), (6, 6, 2)])
def test_other_heads_are_refused(joint, channels, half):
    ring, length = jnp.zeros((1, S, G, K)), jnp.zeros(1, jnp.int32)
    with pytest.raises(UserError, match=rf"heads are \({joint}, {channels}\) and angles {half} for 2 keys of 6"):
        ring_step(jnp.zeros((1, joint, channels)), ring, ring, length, jnp.zeros((1, half)))
