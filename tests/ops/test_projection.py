"""Projections in pieces: the same numbers, and which calls are cut."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.devices import gpus
from jax.sharding import AxisType

from based_jax.ops import projection
from based_jax.ops.projection import (
    decoded_pieces,
    in_pieces,
    multiply,
    multiply_parts,
    pieces,
    sum_pieces,
    sums_of_pieces,
)


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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sums_over_pieces_are_the_product_of_one_token(dtype, normal, close):
    x, kernel = normal(12, dtype=dtype), normal(12, 3, dtype=dtype)
    exact = x.astype(jnp.float32) @ kernel.astype(jnp.float32)
    close(sums_of_pieces(x, kernel, 4).sum(axis=0), exact, dtype)


@pytest.mark.parametrize(("columns", "by_kernel"), [(256, True), (96, False)])
def test_one_token_is_summed_over_pieces_on_a_gpu_alone(columns, by_kernel):
    x, kernel = jnp.zeros((1, 1792), jnp.bfloat16), jnp.zeros((1792, columns), jnp.bfloat16)
    with gpus():
        assert sum_pieces((3584, 1792)) == 8 and sum_pieces((1792, 7168)) == 2 and sum_pieces((48, 8)) == 1
        lower = {rows: jax.jit(multiply).trace(jnp.tile(x, (rows, 1)), kernel) for rows in (1, 2)}
        texts = {rows: call.lower(lowering_platforms=("cuda",)).as_text() for rows, call in lower.items()}
    assert ("token_product" in texts[1]) == by_kernel
    assert "dot_general" not in texts[1] and "dot_general" in texts[2]
    assert "dot_general" in jax.jit(multiply).lower(x, kernel).as_text()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("decoded", [True, False])
def test_parts_of_a_product_are_its_channels(decoded, dtype, monkeypatch, normal, close):
    monkeypatch.setattr(projection, "are_decoded", lambda tokens: decoded)
    monkeypatch.setattr(projection, "decoded_pieces", lambda tokens, kernel: 4)
    for tokens in ((3,), (2, 1)):
        x, kernel = normal(*tokens, 40, dtype=dtype), normal(40, 9, dtype=dtype)
        found = jax.jit(lambda x, kernel: multiply_parts(x, kernel, (5, 1, 3)))(x, kernel)
        right = np.split(np.asarray(x, np.float64) @ np.asarray(kernel, np.float64), [5, 6], axis=-1)
        for one, y in zip(found, right, strict=True):
            close(one, y, dtype)
            assert one.dtype == x.dtype


def test_a_narrow_matrix_is_cut_by_rows_for_tokens_that_are_decoded():
    with gpus():
        assert [decoded_pieces(*size) for size in ((128, (4096, 160)), (512, (4096, 160)), (2, (128, 64)))] == [
            32,
            16,
            1,
        ]
        text = jax.jit(lambda x, kernel: multiply_parts(x, kernel, (128, 32)))
        text = text.trace(jnp.zeros((128, 4096)), jnp.zeros((4096, 160))).lower(lowering_platforms=("cuda",)).as_text()
    assert "batching_dims = [1] x [0]" in text
