"""The Hopper kernel of one token's product as far as a CPU can tell: which it takes, gradients, the interpreter."""

import jax
import jax.numpy as jnp
import pytest
from helpers.devices import gpus
from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import get_races
from jax.experimental.pallas import mosaic_gpu as plgpu

from based_jax.ops.hopper import token_product


def test_what_it_takes():
    x, matrix = jnp.zeros(192), jnp.zeros((192, 96))
    with gpus():
        assert token_product.supports(x, jnp.zeros((192, 256))) is None
        assert "64 by 128, and has 192 by 96" in (token_product.supports(x, matrix) or "")
        assert "float16" in (token_product.supports(x.astype("float16"), matrix) or "")
        assert token_product.pieces(3584, 1792) == 56 and token_product.pieces(1792, 7168) == 14


@pytest.fixture
def interpreted(monkeypatch):
    """Run the kernel in Pallas' interpreter, which looks for races."""
    from pallas_kernels.hopper import stream
    from pallas_kernels.hopper import token_product as kernels

    monkeypatch.setattr(kernels, "load_global", lambda ref, layout: ref[...])
    monkeypatch.setattr(stream, "load", lambda ref: ref[...])
    with gpus(), plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        yield


@pytest.mark.parametrize(
    ("rows", "columns", "dtype"),
    [(128, 128, "bfloat16"), pytest.param(192, 256, "float32", marks=pytest.mark.long)],
)
def test_it_equals_the_product(rows, columns, dtype, normal, close, interpreted):
    x, matrix = normal(rows, dtype=dtype), normal(rows, columns, dtype=dtype)
    dy = normal(columns)

    def ours(x, matrix):
        return token_product.sums(x, matrix).sum(axis=0) @ dy

    def right(x, matrix):
        return x.astype(jnp.float32) @ matrix.astype(jnp.float32) @ dy

    for found, wanted in zip(*(jax.value_and_grad(f, (0, 1))(x, matrix) for f in (ours, right)), strict=True):
        close(found, wanted, dtype)
    assert not get_races().races_found
