"""A token of Mamba between its products, against its definition."""

import jax
import numpy as np
import pytest

from based_jax.ops.gated_scan_step import gated_scan_step

B, D, N = 3, 5, 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_token_is_its_definition(dtype, normal, close):
    """B and C stand last in their product, and z in its own."""
    shapes = {"u": (B, D), "raw": (B, D), "selected": (B, 3 + 2 * N), "joint": (B, 2 * D)}
    narrow = {name: normal(*shape, dtype=dtype) for name, shape in shapes.items()}
    wide = {"A": -abs(normal(D, N)), "state": normal(B, D, N), "bias": normal(D), "skip": normal(D)}
    found, after = jax.jit(lambda given: gated_scan_step(**given))(narrow | wide)
    a = {name: np.asarray(x, np.float64) for name, x in (narrow | wide).items()}
    dt = np.log1p(np.exp(a["raw"] + a["bias"]))
    of_state, z = a["selected"][:, 3:], a["joint"][:, D:]
    kept = np.exp(dt[..., None] * a["A"])
    state = kept * a["state"] + (dt * a["u"])[..., None] * of_state[:, None, :N]
    y = (state * of_state[:, None, N:]).sum(axis=2)
    close(found, (y + a["skip"] * a["u"]) * z / (1 + np.exp(-z)), dtype)
    close(after, state, "float32" if dtype == "float32" else dtype)
