"""The Hopper kernel for products of few tokens as far as a CPU can tell: lowering, the interpreter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.devices import gpus
from helpers.interpreted import replace_products
from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import get_races
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import few_tokens_product as kernels
from pallas_kernels.hopper import mosaic


def test_lowers_for_an_h100():
    x, matrix = jnp.zeros((128, 256), jnp.bfloat16), jnp.zeros((256, 128), jnp.bfloat16)
    with gpus():
        for product in (lambda x, matrix: kernels.sums(x, matrix, pieces=2), kernels.gated):
            text = jax.jit(product).trace(x, matrix).lower(lowering_platforms=("cuda",)).as_text()
            assert "few_tokens" in text


def test_pieces_fill_the_multiprocessors_and_divide_the_rows():
    assert [kernels.sum_pieces(*shape, 132) for shape in ((3584, 1792), (1792, 7168), (1792, 1792))] == [4, 1, 4]


@pytest.fixture
def interpreted(monkeypatch):
    replace_products(monkeypatch)
    monkeypatch.setattr(mosaic, "zeros", lambda shape: jnp.zeros(shape, jnp.float32))
    with gpus(), plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        yield


@pytest.mark.long
def test_the_kernels_equal_the_product(normal, interpreted):
    """More chunks than slots, two pieces, two strips."""
    x, matrix = (0.1 * normal(64, 1408)).astype("bfloat16"), normal(1408, 128, dtype="bfloat16")
    product = np.asarray(x, np.float32) @ np.asarray(matrix, np.float32)
    found = np.asarray(kernels.sums(x, matrix, pieces=2)).sum(axis=0)
    assert not get_races().races_found
    np.testing.assert_allclose(found, product, rtol=1e-4, atol=1e-3)
    value, gate = np.split(product, 2, axis=1)
    found = np.asarray(kernels.gated(x, matrix), np.float32)
    expected = value * gate / (1 + np.exp(-gate))
    assert np.abs(found - expected).max() < 2e-2 * np.abs(expected).max()
