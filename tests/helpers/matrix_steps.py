"""Tokens of operations on matrix states, with the states before them."""

import jax
import jax.numpy as jnp

from based_jax.ops.decode_calls import MatrixStepCall

B, H, K, V = 3, 2, 5, 7
KINDS = ("decay", "bonus", "delta_rule", "low_rank")


def call_of(kind, normal, *, decays=K, dtype="float32", sizes=(B, H, K, V)):
    """Return a token of an operation, with the state before it."""
    B, H, K, V = sizes
    q, k, v = (normal(B, H, size, dtype=dtype) for size in (K, K, V))
    unit = normal(B, H, K)
    unit = unit / jnp.linalg.norm(unit, axis=-1, keepdims=True)
    more = {
        "decay": {},
        "bonus": {"bonus": normal(H, K)},
        "delta_rule": {"beta": jax.nn.sigmoid(normal(B, H))},
        "low_rank": {"a": -unit, "b": 0.5 * unit},
    }[kind]
    k = unit.astype(dtype) if kind == "delta_rule" else k
    return MatrixStepCall(q, k, v, -(normal(B, H, decays) ** 2), normal(*sizes), scale=0.3, **more)
