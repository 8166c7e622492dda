"""How operations multiply: low precision in its own dtype on tensor cores, fp32 exactly, sums in fp32."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from based_jax.ops.dispatch import target_platform

EXACT = jax.lax.Precision.HIGHEST


def product_policy(dtype) -> tuple[Any, jax.lax.Precision]:
    """Return the (dtype, precision) to multiply in for inputs of `dtype`.

    XLA's CPU backend lacks some layouts of bf16 products that sum in fp32, and has no faster unit for the others.
    """
    exact = dtype == jnp.float32 or target_platform() == "cpu"
    return (jnp.float32, EXACT) if exact else (dtype, jax.lax.Precision.DEFAULT)


def inner_precision(dtype) -> jax.lax.Precision:
    """Return the precision of fp32 products inside an operation on inputs of `dtype`.

    Exact for fp32; for less, what has a few more digits than the inputs on tensor cores: TF32, or three bf16 on a TPU.
    """
    return EXACT if dtype == jnp.float32 else jax.lax.Precision.HIGH


def einsum(spec: str, a: Array, b: Array, precision, dtype=jnp.float32) -> Array:
    """Contract with sums in fp32, rounded to `dtype`, which is also that of the product's gradient."""
    return jnp.einsum(spec, a, b, precision=precision, preferred_element_type=dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def narrow_einsum(spec: str, a: Array, b: Array, precision) -> Array:
    """Contract to fp32; the gradient is rounded to the operands' dtype before it is multiplied.

    Not for terms that cancel, such as those of a normaliser. Of its own accord JAX widens both operands of such
    products to fp32.
    """
    return einsum(spec, a, b, precision)


def _narrow_forward(spec, a, b, precision):
    return einsum(spec, a, b, precision), (a, b)


def _narrow_backward(spec, precision, operands, grad):
    _, pullback = jax.vjp(lambda a, b: einsum(spec, a, b, precision, a.dtype), *operands)
    return pullback(grad.astype(operands[0].dtype))


narrow_einsum.defvjp(_narrow_forward, _narrow_backward)
