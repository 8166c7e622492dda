"""Projections in pieces: the same numbers, and which calls are cut."""

import jax
import jax.numpy as jnp
import pytest
from helpers.devices import gpus
from jax.sharding import AxisType

from based_jax.ops.projection import in_pieces, multiply, pieces


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pieces_change_neither_product_nor_gradients(dtype, normal, out_and_grads, close):
    x, kernel, g = normal(8, 5, 12, dtype=dtype), normal(12, 3, dtype=dtype), normal(8, 5, 3, dtype=dtype)

    def cut(x, kernel):
        return in_pieces(x, kernel, 4, precision=jax.lax.Precision.HIGHEST).reshape(8, 5, 3)

    def whole(x, kernel):
        return jnp.matmul(x, kernel, precision=jax.lax.Precision.HIGHEST)

    close(out_and_grads(cut, (x, kernel), g), out_and_grads(whole, (x, kernel), g), dtype)


@pytest.mark.parametrize(
    ("tokens", "kernel", "number"),
    [
        ((256, 256, 128), (128, 128), 128),
        ((256, 256, 128), (128, 384), 32),
        ((24, 1024, 128), (128, 2), 8),
        ((256, 4, 128), (128, 128), 4),
        ((8, 2048, 1024), (1024, 4096), 1),
        ((256, 128), (128, 128), 1),
        ((7, 16, 128), (128, 128), 1),
    ],
)
def test_small_kernels_are_cut_by_rows_of_the_batch(tokens, kernel, number):
    with gpus():
        assert pieces(tokens, kernel) == number


def test_nothing_is_cut_on_a_cpu_or_a_mesh():
    assert pieces((256, 256, 128), (128, 128)) == 1
    with gpus(shape=(2,), axes=AxisType.Auto):
        assert pieces((256, 256, 128), (128, 128)) == 1


def test_lowered_for_a_gpu_the_product_has_a_batch():
    x, kernel = jnp.zeros((256, 64, 128)), jnp.zeros((128, 64))
    with gpus():
        text = jax.jit(multiply).trace(x, kernel).lower(lowering_platforms=("cuda",)).as_text()
    assert "batching_dims = [0] x [0]" in text
