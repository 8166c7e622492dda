"""Kernels under a mesh: each device runs them on its part of the arrays."""

import jax
import jax.numpy as jnp
import pytest
from devices import gpus

from based_jax import parallel
from based_jax.ops import hopper
from based_jax.ops.conv import short_conv
from based_jax.ops.gated_conv import gated_short_conv
from based_jax.ops.norm import residual_rms_norm
from based_jax.ops.softmax import window_attention
from based_jax.ops.taylor import taylor_attention

TOKENS = "batch", None, "heads"


def _scaled(x, scale, ids):
    return x * scale[None, None, None] * (1 if ids is None else ids[:, :, None, None])


@pytest.mark.parametrize("sizes", [{"data": 2, "fsdp": 2, "tensor": 2}, {"data": 8}, {"tensor": 8}])
@pytest.mark.parametrize("with_ids", [False, True])
def test_shards_are_parts_of_the_whole(normal, close, sizes, with_ids):
    x, scale, ids = normal(8, 3, 8, 5), normal(5), jnp.ones((8, 3), jnp.int32) if with_ids else None

    def call(x, scale):
        return hopper.per_shard(_scaled, (x, scale, ids), (TOKENS, (), ("batch",)), (TOKENS,))

    def both(x, scale):
        y, pull = jax.vjp(call, x, scale)
        return y, pull(x)

    expected = both(x, scale)
    with jax.set_mesh(parallel.make_mesh(sizes)):
        close(jax.jit(both)(x, scale), expected)


def test_a_device_sees_its_rows_and_heads_alone(normal):
    shapes = []

    def note(x):
        shapes.append(x.shape)
        return x

    for shape, sizes, seen in (
        ((4, 3, 6, 5), {"data": 2, "fsdp": 2, "tensor": 2}, (1, 3, 3, 5)),
        ((3, 3, 6, 5), {"data": 2, "fsdp": 2, "tensor": 2}, (3, 3, 3, 5)),  # what does not divide stays whole
        ((4, 3, 5, 5), {"data": 4, "tensor": 2}, (1, 3, 5, 5)),
    ):
        with jax.set_mesh(parallel.make_mesh(sizes)):
            out = jax.jit(lambda x: hopper.per_shard(note, (x,), (TOKENS,), (TOKENS,)))(normal(*shape))
        assert out.shape == shape and shapes.pop() == seen


@pytest.mark.parametrize("operation", ["taylor", "window", "conv", "gated conv", "norm"])
def test_each_operation_lowers_with_its_gradients(operation):
    wide, narrow = jnp.zeros((4, 512, 4, 64), jnp.bfloat16), jnp.zeros((4, 512, 4, 16), jnp.bfloat16)
    flat, ids = jnp.zeros((4, 512, 256), jnp.bfloat16), jnp.ones((4, 512), jnp.int32)
    calls = {
        "taylor": (lambda *x: taylor_attention(*x, segment_ids=ids), (narrow, narrow, wide), "2x512x2x64xbf16"),
        "window": (lambda *x: window_attention(*x, window=64, segment_ids=ids), (wide,) * 3, "2x512x2x64xbf16"),
        "conv": (
            lambda *x: short_conv(*x, segment_ids=ids, impl="hopper"),
            (flat, jnp.zeros((3, 256))),
            "2x512x1x128xbf16",
        ),
        "gated conv": (
            lambda *x: gated_short_conv(*x, segment_ids=ids),
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
