"""Kernels under a mesh: each device runs them on its part of the arrays."""

import jax
import jax.numpy as jnp
import pytest
from helpers.cases import parametrize_some
from helpers.devices import gpus

from based_jax import parallel
from based_jax.ops import dispatch
from based_jax.ops.conv import short_conv
from based_jax.ops.gated_conv import gated_short_conv
from based_jax.ops.norm import residual_rms_norm
from based_jax.ops.softmax import window_attention
from based_jax.ops.taylor import taylor_attention


@pytest.mark.parametrize(
    "operation", [pytest.param("taylor", marks=pytest.mark.long), "window", "conv", "gated conv", "norm"]
)
def test_each_operation_lowers_with_its_gradients(operation):
    wide, narrow = jnp.zeros((4, 512, 4, 64), jnp.bfloat16), jnp.zeros((4, 512, 4, 16), jnp.bfloat16)
    flat, ids = jnp.zeros((4, 512, 256), jnp.bfloat16), jnp.ones((4, 512), jnp.int32)
    calls = {
        "taylor": (lambda *x: taylor_attention(*x, segment_ids=ids)[0], (narrow, narrow, wide), "2x512x2x64xbf16"),
        "window": (lambda *x: window_attention(*x, window=64, segment_ids=ids), (wide,) * 3, "2x512x2x64xbf16"),
        "conv": (
            lambda *x: short_conv(*x, segment_ids=ids, impl="hopper_taps")[0],
            (flat, jnp.zeros((3, 256))),
            "2x512x1x128xbf16",
        ),
        "gated conv": (
            lambda *x: gated_short_conv(*x, segment_ids=ids)[0],
            (flat, jnp.zeros((3, 128))),
            "2x512x2x128xbf16",
        ),
        "norm": (
            lambda *x: residual_rms_norm(*x)[1],
            (flat.astype(jnp.float32), flat, jnp.zeros(256)),
            "1024x256xbf16",
        ),
    }
    call, arrays, part = calls[operation]
    with gpus(shape=(2, 1, 2), names=parallel.AXES):
        gradients = jax.grad(lambda *x: call(*x).astype(jnp.float32).sum(), argnums=tuple(range(len(arrays))))
        text = jax.jit(gradients).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    kernels = [line for line in text.splitlines() if "mosaic_gpu" in line]
    assert any(part in line for line in kernels) and not any("4x512x" in line for line in kernels)


PIECES = {
    "taylor_attention": (lambda x, ids: taylor_attention(x[..., :16], x[..., :16], x, segment_ids=ids)[0], "chunks"),
    "window_attention": (lambda x, ids: window_attention(x, x, x, window=64, segment_ids=ids), "tiles"),
    "gated_short_conv": (lambda x, ids: gated_short_conv(flat(x), jnp.ones((3, 256)), segment_ids=ids)[0], "taps"),
    "short_conv": (lambda x, ids: short_conv(flat(x), jnp.ones((3, 512)), segment_ids=ids)[0], "taps"),
}


def flat(x):
    return x.reshape(*x.shape[:2], -1)


@parametrize_some("name", PIECES, ["window_attention", "short_conv"])
def test_pieces_of_time_run_in_kernels_with_their_gradients(name):
    call, form = PIECES[name]
    x, ids = jnp.zeros((4, 4096, 8, 64), jnp.bfloat16), jnp.ones((4, 4096), jnp.int32)
    with gpus(shape=(2, 1, 2, 4), names=parallel.AXES), dispatch.recorded_choices() as choices:
        jax.eval_shape(jax.grad(lambda x: call(x, ids).astype(jnp.float32).sum()), x)
    assert f"hopper_{form}" in choices[name]
