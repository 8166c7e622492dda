"""The residual addition with its norm: against fp64, and the Hopper kernels as far as a CPU can tell."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from based_jax.nn.block import Stream
from based_jax.nn.layers import NORMS
from based_jax.ops.norm import residual_layer_norm, residual_rms_norm


def exact(r, y, scale, bias, eps):
    total = np.asarray(r, np.float64) + (0 if y is None else np.asarray(y, np.float64))
    rows = total if bias is None else total - total.mean(axis=-1, keepdims=True)
    x = rows / np.sqrt(np.mean(rows**2, axis=-1, keepdims=True) + eps) * np.asarray(scale, np.float64)
    return total, x if bias is None else x + np.asarray(bias, np.float64)


def norms(r, y, scale, bias, **options):
    if bias is None:
        return residual_rms_norm(r, y, scale, **options)
    return residual_layer_norm(r, y, scale, bias, **options)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("shape", [(2, 9, 24), (3, 5)])
def test_equals_fp64(shape, centered, adds, dtype, normal, close):
    r, scale = normal(*shape), normal(shape[-1])
    y, bias = normal(*shape, dtype=dtype) if adds else None, normal(shape[-1]) if centered else None
    total, x = jax.jit(functools.partial(norms, eps=0.1, dtype=dtype))(r, y, scale, bias)
    assert (total.dtype, x.dtype) == (jnp.float32, dtype)
    wanted = exact(r, y, scale, bias, 0.1)
    close(total, wanted[0])
    close(x, wanted[1], dtype)
    half, same = (jax.eval_shape(functools.partial(norms, dtype=to), r, y, scale, bias) for to in ("float16", None))
    assert (half[1].dtype, same[1].dtype) == (jnp.float16, dtype if adds else jnp.float32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_equals_flax(dtype, normal, close):
    """The modules hold the parameters; their own norms are the reference."""
    r, y = 3 + normal(2, 9, 24), normal(2, 9, 24, dtype=dtype)
    for make in NORMS.values():
        module = make(24, 1e-5, rngs=nnx.Rngs(0))
        for param in jax.tree.leaves(nnx.state(module), is_leaf=lambda x: isinstance(x, nnx.Variable)):
            param[...] = normal(24)

        @jax.jit
        def both(module, stream):
            return stream.normed(module, jnp.dtype(dtype)), (stream.total(), module(stream.total()))

        for stream in (Stream(r), Stream(r, y)):
            (total, x), (wanted, normed) = both(module, stream)
            close(total, wanted)
            close(x, normed, dtype)
