"""The window's Hopper kernels as far as a CPU can tell: refusals, pieces, lowering for an H100, and the interpreter."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.devices import gpus
from helpers.interpreted import replace_products
from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import get_races
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AxisType, PartitionSpec

from based_jax.ops.calls import AttentionCall
from based_jax.ops.hopper import window as hopper_window
from based_jax.ops.softmax import window_attention


def _arrays(shape=(2, 2048, 16), k=64, v=64, dtype=jnp.bfloat16):
    return tuple(jnp.zeros((*shape, dim), dtype) for dim in (k, k, v))


@pytest.mark.parametrize(
    "arrays, window, words",
    [
        (_arrays(dtype=jnp.float32), 64, "bfloat16"),
        (_arrays(k=16), 64, "(64, 112, 128), and are 16 and 64"),
        (_arrays(k=128), 64, "and are 128 and 64"),
        (_arrays(), 130, "at most 129 keys, and is 130"),
        (_arrays((2, 0, 16)), 64, "a token"),
    ],
)
def test_refusals_name_the_value(arrays, window, words):
    with gpus():
        assert words in hopper_window.supports(AttentionCall(*arrays, window))
        assert hopper_window.supports(AttentionCall(*_arrays(), 129)) is None


def test_other_devices_and_meshes_are_refused():
    with gpus("NVIDIA A100-SXM4-80GB"):
        assert "A100" in hopper_window.supports(AttentionCall(*_arrays(), 64))
    arrays = _arrays()
    with gpus(shape=(2,), axes=AxisType.Explicit):
        assert "shard_map" in hopper_window.supports(AttentionCall(*arrays, 64))


@pytest.mark.parametrize(
    "shape, blocks, shared, pieces",
    [
        ((8, 2048, 16), 2, 1, 2),
        ((8, 2048, 16), 1, 2, 1),
        ((1, 32768, 16), 2, 1, 16),
        ((1, 32768, 16), 1, 2, 8),
        ((64, 2048, 16), 2, 1, 1),
        ((1, 1, 1), 2, 1, 1),
        ((1, 640, 1), 1, 2, 10),
    ],
)
def test_pieces_fill_the_chip(shape, blocks, shared, pieces):
    assert hopper_window.number_of_pieces(_arrays(shape)[0], blocks=blocks, shared=shared) == pieces


def _gradients(arrays, ids=None, window=64):
    def loss(q, k, v):
        o = window_attention(q, k, v, window=window, segment_ids=ids, impl="hopper_tiles")
        return o.astype(jnp.float32).sum()

    return jax.grad(loss, argnums=(0, 1, 2))(*arrays)


@pytest.mark.parametrize(
    "shape, head_dim, window, packed",
    [
        ((2, 15, 2), 64, 65, True),
        pytest.param((1, 4097, 4), 64, 1, True, marks=pytest.mark.long),
        pytest.param((2, 512, 16), 112, 128, False, marks=pytest.mark.long),
        pytest.param((2, 512, 16), 128, 129, True, marks=pytest.mark.long),
    ],
)
def test_lowers_for_an_h100(shape, head_dim, window, packed):
    ids = jnp.ones(shape[:2], jnp.int32) if packed else None
    arrays = _arrays(shape, head_dim, head_dim)
    texts = []
    with gpus():
        for call in (
            lambda *qkv: window_attention(*qkv, window=window, segment_ids=ids),
            lambda *qkv: _gradients(qkv, ids, window),
        ):
            traced = jax.jit(call).trace(*arrays)
            texts.append(traced.lower(lowering_platforms=("cuda",)).as_text())
    assert "window_forward" in texts[0]
    # The gradient needs nothing of the forward pass.
    assert "window_backward" in texts[1] and "window_forward" not in texts[1]


def test_lowers_under_vmap():
    with gpus():
        call = jax.jit(jax.vmap(lambda *qkv: _gradients(qkv)))
        text = call.trace(*_arrays((3, 2, 256, 4))).lower(lowering_platforms=("cuda",)).as_text()
    assert "window_backward" in text


def test_lowers_under_shard_map_over_batch_and_heads():
    spec = PartitionSpec("data", None, "heads")
    with gpus(shape=(2, 2)):
        sharded = jax.shard_map(
            lambda ids, *qkv: _gradients(qkv, ids), in_specs=(PartitionSpec("data"), *(spec,) * 3), out_specs=spec
        )
        traced = jax.jit(sharded).trace(jnp.ones((4, 256), jnp.int32), *_arrays((4, 256, 4)))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "window_backward" in text and "2x256x2x64xbf16" in text


def _relative(x, y):
    x, y = (np.asarray(z, np.float64) for z in (x, y))
    return np.linalg.norm(x - y) / np.linalg.norm(y)


@pytest.mark.parametrize(
    "time, head_dim, window, pieces, lengths",
    [
        (389, 64, 64, 2, (-30, 90, 1, 25, -60, 120, 63)),
        pytest.param(456, 64, 129, 1, (-30, 300, -60, 40, 26), marks=pytest.mark.long),
        (330, 112, 100, 3, None),
    ],
)
def test_interpreted_kernels_equal_the_oracle(rng, monkeypatch, time, head_dim, window, pieces, lengths):
    monkeypatch.setattr(hopper_window, "number_of_pieces", lambda *args, **options: pieces)
    replace_products(monkeypatch)
    ids = None
    if lengths:  # of documents, negative for padding
        ids = np.concatenate([np.full(abs(n), i + 1 if n > 0 else 0) for i, n in enumerate(lengths)])
        ids = jax.device_put(ids[None].astype(np.int32))
    *inputs, do = jax.device_put([rng.normal(size=(1, time, 1, head_dim)).astype(jnp.bfloat16) for _ in range(4)])

    @functools.partial(jax.jit, static_argnums=0)
    def run(call, inputs):
        o, pull = jax.vjp(call, *inputs)
        return o, *pull(do.astype(o.dtype))

    def oracle(q, k, v):
        return window_attention(q, k, v, window=window, segment_ids=ids, impl="oracle")

    wanted = run(oracle, [np.asarray(x, np.float32) for x in inputs])
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        found = run(lambda *qkv: hopper_window.compute(AttentionCall(*qkv, window, ids)), inputs)
    for got, right in zip(found, wanted, strict=True):
        assert _relative(got, right) < 5e-3
        if ids is not None:
            assert not np.asarray(got)[np.asarray(ids) == 0].any()
    assert not get_races().races_found


def test_a_row_with_padding_inside_a_document_is_nan_and_the_others_are_right(rng, monkeypatch):
    monkeypatch.setattr(hopper_window, "number_of_pieces", lambda *args, **options: 1)
    replace_products(monkeypatch)
    ids = np.ones((2, 64), np.int32)
    ids[0, 9] = ids[1, :3] = 0
    q, k, v = (rng.normal(size=(2, 64, 1, 64)).astype(jnp.bfloat16) for _ in range(3))
    with plgpu.force_gpu_interpret_mode():
        o = np.asarray(jax.jit(lambda *xs: hopper_window.compute(AttentionCall(*xs[:3], 64, xs[3])))(q, k, v, ids))
    oracle = jax.jit(lambda q, k, v, ids: window_attention(q, k, v, window=64, segment_ids=ids, impl="oracle"))
    assert np.isnan(o[0]).all()
    assert _relative(o[1], np.asarray(oracle(q, k, v, ids))[1]) < 5e-3
