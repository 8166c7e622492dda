"""The Hopper kernel of what follows a product of few tokens as far as a CPU can tell: lowering, the interpreter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.devices import gpus
from jax.experimental.pallas import mosaic_gpu as plgpu

from based_jax.ops.few_tokens import few_tokens_residual_norm
from pallas_kernels.hopper import few_tokens_norm as kernels


def test_both_kernels_lower_for_an_h100():
    r, scale = jnp.zeros((3, 256)), jnp.zeros(256)
    x, kernel = jnp.zeros((3, 64), jnp.bfloat16), jnp.zeros((64, 256), jnp.bfloat16)
    with gpus():
        step = jax.jit(lambda *arrays: few_tokens_residual_norm(*arrays, impl="hopper"))
        text = step.trace(r, x, kernel, scale, scale).lower(lowering_platforms=("cuda",)).as_text()
    assert "few_tokens_product" in text and "few_tokens_norm" in text


@pytest.mark.parametrize("has_bias", [False, True])
def test_the_kernel_equals_the_sum_and_its_norm(has_bias, normal, close, monkeypatch):
    """More rows of sums than tokens; channels of which a lane has three pairs."""
    monkeypatch.setattr(kernels, "load_global", lambda ref, layout: ref[...])
    r, sums, bias, scale = normal(2, 768), normal(3, 4, 768), normal(768) if has_bias else None, normal(768)
    with gpus(), plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        total, found = kernels.residual_norm(r, sums, bias, scale, eps=0.1)
    y = np.asarray(sums, np.float64).sum(axis=0)[:2] + (0 if bias is None else np.asarray(bias))
    close(total, (expected := np.asarray(r) + y), "bfloat16")
    close(found, expected / np.sqrt((expected**2).mean(axis=1, keepdims=True) + 0.1) * np.asarray(scale), "bfloat16")
