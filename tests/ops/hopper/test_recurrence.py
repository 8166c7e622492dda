"""The matrix recurrence's Hopper kernels as far as a CPU can tell: refusals, lowering for an H100, the interpreter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.devices import gpus
from helpers.documents import numbered
from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import get_races
from jax.experimental.pallas import mosaic_gpu as plgpu

from based_jax.errors import UserError
from based_jax.ops import delta_rule, gated_linear_attention
from based_jax.ops.calls import MatrixStateCall
from based_jax.ops.delta_rule import dplr


def _zeros(B=2, T=64, H=2, K=64, V=64, dtype="bfloat16"):
    q, v, wide = jnp.zeros((B, T, H, K), dtype), jnp.zeros((B, T, H, V), dtype), jnp.zeros((B, T, H, K))
    return q, q, v, wide, wide, wide


@pytest.mark.parametrize(
    "options, words",
    [
        ({"dtype": "float16"}, "bfloat16 or float32, and is float16"),
        ({"K": 192}, "at most 128, and is 192"),
        ({"B": 0}, r"empty, and q is \(0, 64, 2, 64\)"),
    ],
)
def test_refusals_name_the_value(options, words):
    with gpus(), pytest.raises(UserError, match=words):
        dplr(*_zeros(**options), impl="hopper_steps")


def _gradients(*args, ids=None):
    def loss(*args):
        o, last = dplr(*args, segment_ids=ids, impl="hopper_steps")
        return o.astype(jnp.float32).sum() + last.sum()

    return jax.grad(loss, argnums=range(6))(*args)


@pytest.mark.parametrize(
    "sizes",
    [
        {"B": 3, "T": 61, "K": 24, "V": 48, "dtype": "float32"},
        pytest.param({"K": 128, "V": 192}, marks=pytest.mark.long),
        pytest.param({"V": 128}, marks=pytest.mark.long),
    ],
)
def test_lowers_for_an_h100(sizes):
    arguments = _zeros(**sizes)
    ids = jnp.ones(arguments[0].shape[:2], jnp.int32)
    with gpus():
        call = jax.jit(lambda *args: _gradients(*args, ids=ids)).trace(*arguments)
        text = call.lower(lowering_platforms=("cuda",)).as_text()
    assert "recurrence_reverse" in text and "recurrence_again" in text


@pytest.mark.parametrize("lanes", [pytest.param(True, marks=pytest.mark.long), False])
def test_lowers_in_lanes_and_on_a_mesh(lanes):
    with gpus(shape=(2, 2), names=("data", "tensor")) if not lanes else gpus():
        call, arguments = _gradients, _zeros()
        if lanes:
            call, arguments = jax.vmap(call), [jnp.stack([x] * 3) for x in arguments]
        text = jax.jit(call).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert "recurrence_reverse" in text


@pytest.fixture
def interpreted(monkeypatch):
    """Run kernels in Pallas' interpreter, which looks for races; it knows no reshaped memory."""
    from pallas_kernels.hopper import recurrence as forward
    from pallas_kernels.hopper import recurrence_backward as backward

    def load_columns(ref, shape, layout):
        return ref[...].astype(jnp.float32).reshape(shape)

    def save_columns(ref, x):
        ref[...] = x.reshape(ref.shape).astype(ref.dtype)

    monkeypatch.setattr(forward, "load_columns", load_columns)
    for module in (forward, backward):
        monkeypatch.setattr(module, "save_columns", save_columns)
        monkeypatch.setattr(module, "load_global", lambda ref, layout: ref[...])
        monkeypatch.setattr(module, "await_warp", lambda: None)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        yield


@pytest.mark.parametrize(
    "B, T, H, K, V, low_rank, packed, dtype, tolerance",
    [
        pytest.param(2, 21, 2, 32, 32, True, True, "float32", 5e-6, marks=pytest.mark.long),
        (1, 9, 2, 32, 32, True, True, "float32", 5e-6),
        (1, 16, 4, 24, 64, False, False, "bfloat16", 5e-3),
        pytest.param(3, 8, 1, 64, 48, True, False, "float32", 5e-6, marks=pytest.mark.long),
        pytest.param(1, 9, 1, 128, 160, False, True, "float32", 5e-6, marks=pytest.mark.long),
        pytest.param(1, 8, 1, 128, 96, True, False, "bfloat16", 5e-3, marks=pytest.mark.long),
    ],
)
def test_kernels_equal_the_oracle(
    normal, packed_ids, out_and_grads, interpreted, B, T, H, K, V, low_rank, packed, dtype, tolerance
):
    ids = jax.device_put(numbered(np.asarray(packed_ids(T))[1 : 1 + B])) if packed else None
    q, k, v = (normal(B, T, H, size, dtype=dtype) for size in (K, K, V))
    direction = np.asarray(normal(B, T, H, K))
    direction = direction / np.linalg.norm(direction, axis=-1, keepdims=True)
    wide = [-np.square(normal(B, T, H, K)), normal(B, H, K, V)]
    wide += [-direction, direction / (1 + np.exp(normal(B, T, H, 1)))] if low_rank else []
    table = delta_rule.DPLR_IMPLEMENTATIONS if low_rank else gated_linear_attention.IMPLEMENTATIONS
    do, dlast = normal(B, T, H, V), normal(B, H, K, V)

    def run(impl, q, k, v):
        def compute(q, k, v, g, state, a=None, b=None):
            state = state if packed else None
            call = MatrixStateCall(q, k, v, g, a=a, b=b, scale=0.3, state=state, segment_ids=ids)
            return table[impl].compute(call)

        return out_and_grads(compute, (q, k, v, *wide), (np.asarray(do, v.dtype), dlast))

    expected = run("oracle", *(np.asarray(x, np.float32) for x in (q, k, v)))
    for ours, right in zip(jax.tree.leaves(run("hopper_steps", q, k, v)), jax.tree.leaves(expected), strict=True):
        ours, right = (np.asarray(y, np.float64) for y in (ours, right))
        assert np.linalg.norm(ours - right) <= tolerance * np.linalg.norm(right)
    assert not get_races().races_found
