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
    """Contract with sums in fp32, rounded to `dtype`; the products of the gradient take their operands in a's dtype.

    Of its own accord JAX multiplies an fp32 gradient with operands that it converts to fp32.
    """
    if a.dtype == dtype:
        return jnp.einsum(spec, a, b, precision=precision, preferred_element_type=dtype)
    return _wider(spec, precision, dtype, a, b)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _wider(spec: str, precision, dtype, a: Array, b: Array) -> Array:
    return jnp.einsum(spec, a, b, precision=precision, preferred_element_type=dtype)


def _wider_forward(spec, precision, dtype, a, b):
    return _wider(spec, precision, dtype, a, b), (a, b)


def _wider_backward(spec, precision, dtype, operands, grad):
    _, pullback = jax.vjp(lambda a, b: einsum(spec, a, b, precision, a.dtype), *operands)
    return pullback(grad.astype(operands[0].dtype))


_wider.defvjp(_wider_forward, _wider_backward)
