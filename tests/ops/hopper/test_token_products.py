"""The Hopper kernels of a mixer's ends for one token as far as a CPU can tell: lowering, the interpreter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.devices import gpus
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import token_products as kernels
from pallas_kernels.hopper import token_strips


def arguments(normal, width, *columns):
    matrices = [(0.1 * normal(width, n)).astype(jnp.bfloat16) for n in columns]
    return normal(width), normal(2, width), normal(width), matrices


def test_rows_are_cut_into_pieces_for_all_multiprocessors():
    cuts = (14, 28), (8, 16), (16, 32), (14, 84), (7, 200)
    assert [kernels.piece_count(*cut, 132) for cut in cuts] == [2, 8, 4, 1, 1]


def test_both_lower_for_an_h100(normal):
    *stream, matrices = arguments(normal, 256, 64, 128)
    with gpus():
        calls = (
            jax.jit(lambda: kernels.normed_products(*stream, matrices, eps=1e-5)),
            jax.jit(lambda: kernels.sums(stream[0], matrices[1], multiprocessors=132)),
        )
        texts = [call.trace().lower(lowering_platforms=("cuda",)).as_text() for call in calls]
    assert [text.count("mosaic_gpu_v2") for text in texts] == [1, 1]


@pytest.fixture
def interpreted(monkeypatch):
    """Let kernels run in the interpreter, which knows no layouts."""
    monkeypatch.setattr(plgpu, "load", lambda ref, **_: ref[...])
    monkeypatch.setattr(kernels, "keep_plain", lambda *_: None)
    monkeypatch.setattr(token_strips, "load_shared", lambda ref, _: ref[...].astype(jnp.float32))
    with gpus(), plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        yield


@pytest.mark.long
def test_products_of_a_norm_and_sums_are_their_definitions(normal, interpreted):
    """Of matrices of different widths, more chunks of rows than a ring has slots, and of pieces of the rows."""
    r, y, scale, matrices = arguments(normal, 13 * 128, 32, 192)
    total, found = kernels.normed_products(r, y, scale, matrices, eps=1e-5)
    t = np.asarray(r + y.sum(axis=0), np.float64)
    x = t / np.sqrt(np.mean(t * t) + 1e-5) * scale
    np.testing.assert_allclose(total, t, rtol=1e-5, atol=1e-5)
    for z, matrix in zip(found, matrices, strict=True):
        expected = x @ np.asarray(matrix, np.float64)
        np.testing.assert_allclose(z.astype(jnp.float32), expected, rtol=0, atol=1e-2 * np.abs(expected).max())
    pieces = kernels.sums(r, matrices[1], multiprocessors=80)
    assert len(pieces) == 13
    expected = np.asarray(r, np.float64) @ np.asarray(matrices[1], np.float64)
    np.testing.assert_allclose(pieces.sum(axis=0), expected, rtol=0, atol=1e-4 * np.abs(expected).max())
