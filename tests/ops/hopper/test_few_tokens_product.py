"""The Hopper kernel for products of few tokens as far as a CPU can tell: lowering, the interpreter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.devices import gpus
from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import get_races
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import few_tokens_product as kernels


def _products(x, matrix, multiprocessors=132):
    """Return the product in two parts, by one kernel."""
    parts = kernels.products(x, jnp.split(matrix, 2, axis=1), multiprocessors=multiprocessors)
    return jnp.concatenate(parts, axis=1)


def _sums(x, matrix, multiprocessors=132):
    return kernels.sums(x, matrix, multiprocessors=multiprocessors)


def test_lowers_for_an_h100():
    x, matrix = jnp.zeros((128, 256), jnp.bfloat16), jnp.zeros((256, 256), jnp.bfloat16)
    with gpus():
        for product in (_products, _sums, kernels.gated):
            text = jax.jit(product).trace(x, matrix).lower(lowering_platforms=("cuda",)).as_text()
            assert "few_tokens" in text


def test_pieces_fill_the_multiprocessors_and_divide_the_rows():
    cuts = (3584, 28), (1792, 112), (1792, 28), (1792, 4), (64, 1)
    assert [kernels.sum_pieces(*cut, 132) for cut in cuts] == [4, 1, 4, 7, 1]


@pytest.fixture
def interpreted(monkeypatch):
    """Let kernels run in the interpreter, with a ring of two or three tiles, whose slots are filled again."""
    monkeypatch.setattr(kernels, "RING_BYTES", 48 * 1024)
    with gpus(), plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        yield


@pytest.mark.long
@pytest.mark.parametrize(("tokens", "multiprocessors"), [(64, 4), (128, 8), (256, 132)])
def test_the_kernels_equal_the_product(normal, interpreted, tokens, multiprocessors):
    """One tile of tokens, two, four; strips of 128 columns, and of 64."""
    x, matrix = (0.1 * normal(tokens, 512)).astype("bfloat16"), normal(512, 256, dtype="bfloat16")
    product = np.asarray(x, np.float32) @ np.asarray(matrix, np.float32)
    found = np.asarray(_sums(x, matrix, multiprocessors))
    assert found.shape[0] == 2 and not get_races().races_found
    np.testing.assert_allclose(found.sum(axis=0), product, rtol=1e-4, atol=1e-3)
    found = np.asarray(_products(x, matrix, multiprocessors - 5), np.float32)
    assert np.abs(found - product).max() < 1e-2 * np.abs(product).max()
    value, gate = np.split(product, 2, axis=1)
    found = np.asarray(kernels.gated(x, matrix), np.float32)
    expected = value * gate / (1 + np.exp(-gate))
    assert np.abs(found - expected).max() < 2e-2 * np.abs(expected).max()
    assert not get_races().races_found
