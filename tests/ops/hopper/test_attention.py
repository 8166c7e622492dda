"""Attention's Hopper kernels as far as a CPU can tell: refusals, lowering for an H100, and the interpreter."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.cases import parametrize_some
from helpers.devices import gpus
from helpers.interpreted import replace_products
from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import get_races
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from based_jax.ops import segments, softmax
from based_jax.ops.calls import AttentionCall
from based_jax.ops.dispatch import recorded_choices
from based_jax.ops.hopper import attention as hopper_attention
from pallas_kernels.hopper import attention_turns, attention_walk, mosaic


def call_of(T=256, K=64, V=64, dtype=jnp.bfloat16, B=2, H=2):
    q, v = (jnp.zeros((B, T, H, size), dtype) for size in (K, V))
    return AttentionCall(q, q, v, T, jnp.ones((B, T), jnp.int32))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (call_of(dtype=jnp.float32), "bfloat16 or float16, and are float32"),
        (call_of(V=264), "at most 256, and are 64 and 264"),
        (call_of(B=0), "a token"),
    ],
)
def test_refusals_name_the_value(call, words):
    with gpus():
        assert words in hopper_attention.supports(call)
        assert hopper_attention.supports(call_of(K=70, V=256, dtype=jnp.float16)) is None


def test_turns_are_for_narrow_heads():
    with gpus():
        assert "at most 80, and are 128 and 64" in hopper_attention.supports_turns(call_of(K=128))
        assert hopper_attention.supports_turns(call_of(K=70, V=80)) is None


def test_other_devices_are_refused():
    with gpus("NVIDIA A100-SXM4-80GB"):
        assert "A100" in hopper_attention.supports(call_of())


@pytest.fixture
def interpreted(monkeypatch):
    """Run kernels in Pallas' interpreter, which looks for races, and takes products' reads for those of registers."""
    replace_products(monkeypatch)
    multiply = mosaic.multiply

    def read_as_copies_write(*operands):
        multiply(*operands)
        plgpu.commit_smem()

    monkeypatch.setattr(mosaic, "multiply", read_as_copies_write)
    monkeypatch.setattr(mosaic, "load_global", lambda ref, layout: ref[...])
    monkeypatch.setattr(plgpu, "set_max_registers", lambda *args, **options: None)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        yield


# (T, K, V, dtype): tiles that are not filled; heads that are filled up, wide ones; more tiles than are in flight.
CASES = [
    (200, 40, 24, "bfloat16"),
    (70, 130, 130, "bfloat16"),
    (130, 70, 70, "float16"),
    (300, 256, 256, "bfloat16"),
    (400, 128, 128, "bfloat16"),
    (700, 64, 64, "bfloat16"),
]


@parametrize_some("T, K, V, dtype", CASES, CASES[:2])
def test_they_equal_the_oracle(T, K, V, dtype, normal, packed_ids, out_and_grads, close, interpreted):
    q, k, v, cotangent = (normal(2, T, 1, size, dtype=dtype) for size in (K, K, V, V))
    ids = packed_ids(T)[1:3]  # many documents, and padding before one

    def tiles(q, k, v):
        return hopper_attention.compute(AttentionCall(q, k, v, T, segments.numbered(ids)))

    def oracle(q, k, v):
        return softmax.attention(q, k, v, segment_ids=ids, impl="oracle")

    found, wanted = (out_and_grads(call, (q, k, v), cotangent) for call in (tiles, oracle))
    close(found, wanted, "bfloat16")
    assert all(not np.asarray(x[ids == 0]).any() for x in jax.tree.leaves(found))
    assert not get_races().races_found


@parametrize_some("T, K, V", [(300, 40, 24), (500, 80, 80)], [(300, 40, 24)])
def test_blocks_that_take_several_tiles_equal_the_oracle(
    T, K, V, normal, packed_ids, out_and_grads, close, interpreted, monkeypatch
):
    """Two blocks take three tiles of each head one by one, or four of them by pairs."""
    from pallas_kernels.hopper import attention_turns

    monkeypatch.setattr(attention_turns, "MULTIPROCESSORS", 2)
    q, k, v, cotangent = (normal(2, T, 1, size, dtype="bfloat16") for size in (K, K, V, V))
    ids = packed_ids(T)[1:3]

    def turns(q, k, v):
        return hopper_attention.compute_by_turns(AttentionCall(q, k, v, T, segments.numbered(ids)))

    def oracle(q, k, v):
        return softmax.attention(q, k, v, segment_ids=ids, impl="oracle")

    found, wanted = (out_and_grads(call, (q, k, v), cotangent) for call in (turns, oracle))
    close(found, wanted, "bfloat16")
    assert all(not np.asarray(x[ids == 0]).any() for x in jax.tree.leaves(found))
    assert not get_races().races_found


def loss(q, k, v, ids, impl="auto"):
    return jnp.sum(softmax.attention(q, k, v, segment_ids=ids, impl=impl).astype(jnp.float32) ** 2)


@parametrize_some("K", [70, 128, 256], [70])
def test_packed_documents_lower_for_an_h100(K):
    """Under a mesh each device runs the kernels on its own rows and heads."""
    call = call_of(K=K, V=K, B=4, H=4)
    with gpus(shape=(2, 2), names=("data", "tensor")), recorded_choices() as choices:
        traced = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).trace(*call[:3], call.segment_ids)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert list(choices["attention"]) == ["hopper_turns" if K <= 80 else "hopper_tiles"]
    kernels = [line for line in text.splitlines() if "mosaic_gpu" in line]
    width = -(-K // 16) * 16
    assert len(kernels) == 3 and all(f"tensor<2x256x2x{width}xbf16>" in line for line in kernels)


def test_lanes_lower_for_an_h100():
    lanes = [jnp.stack([x, x]) for x in (*call_of()[:3], call_of().segment_ids)]
    with gpus():
        text = jax.jit(jax.vmap(jax.grad(loss, (0, 1, 2)))).trace(*lanes).lower(lowering_platforms=("cuda",)).as_text()
    assert all(f"attention_turns_{name}" in text for name in ("forward", "query_gradients", "key_gradients"))


def test_a_warpgroup_that_lags_takes_each_of_its_turns(normal, interpreted, monkeypatch):
    """One is through with a tile, and at the next, before the other has ended it: no turn may be given twice."""

    def lagging(walk, part, n):
        free(walk, part, n)
        pl.when(walk.group == 0)(lambda: jax.debug.callback(lambda: time.sleep(0.02), ordered=False))

    free = attention_walk.Walk.free
    monkeypatch.setattr(attention_turns, "MULTIPROCESSORS", 1)
    monkeypatch.setattr(attention_turns.TurnWalk, "free", lagging)
    q, k, v = (normal(1, 640, 1, 16, dtype="bfloat16") for _ in range(3))
    found = hopper_attention.compute_by_turns(AttentionCall(q, k, v, 640, None))
    np.testing.assert_allclose(
        np.asarray(found, np.float32), np.asarray(softmax.attention(q, k, v, impl="oracle"), np.float32), atol=2e-2
    )
