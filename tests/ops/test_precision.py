import jax
import jax.numpy as jnp
import numpy as np
import pytest

from based_jax.ops.precision import EXACT, narrow_einsum

SPEC = "BTK,BSK->BTS"


def gradients(dtype, normal):
    a, b, g = normal(2, 5, 7, dtype=dtype), normal(2, 4, 7, dtype=dtype), normal(2, 5, 4)

    @jax.jit
    def both(a, b, g):
        out, pullback = jax.vjp(lambda a, b: narrow_einsum(SPEC, a, b, EXACT), a, b)
        return out, pullback(g)

    out, grads = both(a, b, g)
    assert out.dtype == jnp.float32
    return (a, b, g), out, grads


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_product_and_its_gradients(dtype, normal):
    (a, b, g), out, (da, db) = gradients(dtype, normal)
    a64, b64, g64 = (np.asarray(x, np.float64) for x in (a, b, g))
    np.testing.assert_allclose(out, np.einsum(SPEC, a64, b64), rtol=1e-5, atol=1e-5)
    tolerance = {"float32": 1e-5, "bfloat16": 2e-2}[dtype]
    assert da.dtype == db.dtype == dtype
    for found, expected in ((da, np.einsum("BTS,BSK->BTK", g64, b64)), (db, np.einsum("BTS,BTK->BSK", g64, a64))):
        error = np.abs(np.asarray(found, np.float64) - expected).max()
        assert error < tolerance * np.abs(expected).max()


def test_gradients_multiply_in_the_dtype_of_the_operands(normal):
    a, b = normal(2, 5, 7, dtype="bfloat16"), normal(2, 4, 7, dtype="bfloat16")
    text = str(
        jax.make_jaxpr(jax.grad(lambda a, b: jnp.sum(narrow_einsum(SPEC, a, b, EXACT) ** 2), argnums=(0, 1)))(a, b)
    )
    forward, *backward = [line.split("=")[0] for line in text.splitlines() if "dot_general" in line]
    assert ":f32[" in forward
    assert len(backward) >= 2
    assert all(":bf16[" in product for product in backward)


def test_gradients_of_a_product_map_over_lanes(normal):
    a, b = normal(3, 2, 5, 7, dtype="bfloat16"), normal(3, 2, 4, 7, dtype="bfloat16")
    grad = jax.jit(jax.grad(lambda a, b: jnp.sum(narrow_einsum(SPEC, a, b, EXACT) ** 2)))
    mapped = np.asarray(jax.jit(jax.vmap(grad))(a, b), np.float32)
    for i in range(3):
        alone = grad(np.asarray(a)[i], np.asarray(b)[i])
        np.testing.assert_allclose(mapped[i], np.asarray(alone, np.float32), rtol=1e-2)
