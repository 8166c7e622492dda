"""The selective scan's Hopper kernels as far as a CPU can tell: refusals, lowering for an H100, and the interpreter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.devices import gpus
from helpers.documents import numbered
from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import get_races
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AxisType, PartitionSpec

from based_jax.errors import UserError
from based_jax.ops import selective_scan as op
from based_jax.ops.calls import SelectiveScanCall
from based_jax.ops.selective_scan import selective_scan


def _zeros(B=2, T=64, D=256, N=16, dtype="bfloat16"):
    u, steps = jnp.zeros((B, T, D), dtype), jnp.zeros((B, T, D))
    return u, steps, -jnp.ones((D, N)), *(jnp.zeros((B, T, N), dtype) for _ in "BC")


@pytest.mark.parametrize(
    "options, words",
    [
        ({"dtype": "float16"}, "bfloat16 or float32, and is float16"),
        ({"D": 160}, "multiple of 64, and are 160"),
        ({"N": 12}, "8, 16, 24, 32 states, and has 12"),
        ({"B": 0}, "and are 0"),
    ],
)
def test_refusals_name_the_value(options, words):
    with gpus(), pytest.raises(UserError, match=words):
        selective_scan(*_zeros(**options), impl="hopper_steps")


def test_a_mesh_with_explicit_axes_needs_shard_map():
    call, supports = SelectiveScanCall(*_zeros()), op.IMPLEMENTATIONS["hopper_steps"].supports
    with gpus(shape=(2,), axes=AxisType.Explicit):
        assert "shard_map" in supports(call)
    with gpus(shape=(2,)):
        assert supports(call) is None


def _gradients(*arrays, ids=None):
    """Return those of u, dt, A, B, C and any bias of raw steps."""

    def loss(u, dt, A, B, C, bias=None):
        y, last = selective_scan(u, dt, A, B, C, bias=bias, segment_ids=ids)
        return y.astype(jnp.float32).sum() + last.sum()

    return jax.grad(loss, argnums=range(len(arrays)))(*arrays)


@pytest.mark.parametrize(
    "options, packed, lanes",
    [
        ({"T": 61, "D": 128, "N": 32, "dtype": "float32"}, True, None),
        pytest.param({}, False, 3, marks=pytest.mark.long),
    ],
)
def test_lowers_for_an_h100(options, packed, lanes):
    ids = jnp.ones((2, 61), jnp.int32) if packed else None
    arguments = _zeros(**options)
    call = lambda *args: _gradients(*args, ids=ids)  # noqa: E731
    if lanes:
        call, arguments = jax.vmap(call), [jnp.stack([x] * lanes) for x in arguments]
    with gpus():
        text = jax.jit(call).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert "selective_scan_backward" in text


@pytest.mark.parametrize("way", ["shard_map", pytest.param("lanes", marks=pytest.mark.long)])
def test_raw_steps_lower(way):
    """A and the bias are the same on all devices: their gradients are summed over them."""
    u, dt, *others = _zeros()
    arrays, data, everywhere = (u, dt.astype(u.dtype), *others, jnp.zeros(256)), PartitionSpec("data"), PartitionSpec()
    specs = data, data, everywhere, data, data, everywhere
    with gpus(shape=(2,) if way == "shard_map" else (1,)):
        if way == "shard_map":
            call = jax.shard_map(_gradients, in_specs=specs, out_specs=specs)
        else:
            call, arrays = jax.vmap(_gradients), [jnp.stack([x] * 3) for x in arrays]
        text = jax.jit(call).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    assert "selective_scan_backward" in text and text.count("all_reduce") >= 2 * (way == "shard_map")


@pytest.fixture
def interpreted(monkeypatch):
    """Run kernels in Pallas' interpreter, which looks for races; it knows neither reshaped nor overlapping memory."""
    from pallas_kernels.hopper import selective_scan as forward
    from pallas_kernels.hopper import selective_scan_backward as backward

    def load_channels(ref):
        return ref[...].astype(jnp.float32).reshape(forward.WARPS, -1, forward.LANE_CHANNELS)

    def save(ref, x):
        ref[...] = x.reshape(ref.shape).astype(ref.dtype)

    monkeypatch.setattr(forward, "load_channels", load_channels)
    for module in (forward, backward):
        monkeypatch.setattr(module, "save_channels", save)
        monkeypatch.setattr(module, "load_global", lambda ref, layout: ref[...])
        monkeypatch.setattr(module, "await_warp", lambda: None)
    monkeypatch.setattr(backward, "save_pair", save)
    monkeypatch.setattr(
        backward, "load_states", lambda ref: ref[...].reshape(*ref.shape[:2], -1, forward.LANE_CHANNELS)
    )
    monkeypatch.setattr(plgpu, "RefUnion", lambda *refs: refs)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        yield


@pytest.mark.parametrize(
    "time, channels, states, dtype, packed, raw, tolerance",
    [
        pytest.param(43, 128, 16, "float32", True, False, 2e-6, marks=pytest.mark.long),
        (16, 64, 8, "bfloat16", False, False, 5e-3),
        pytest.param(16, 256, 8, "bfloat16", False, False, 5e-3, marks=pytest.mark.long),
        (11, 128, 8, "float32", True, True, 2e-6),
        pytest.param(16, 256, 8, "bfloat16", False, True, 5e-3, marks=pytest.mark.long),
    ],
)
def test_kernels_equal_the_oracle(
    normal, packed_ids, out_and_grads, interpreted, time, channels, states, dtype, packed, raw, tolerance
):
    rows = slice(1, 3)  # of the packed ones
    ids = jax.device_put(numbered(np.asarray(packed_ids(time))[rows])) if packed else None
    u, B, C = (normal(2, time, size, dtype=dtype) for size in (channels, states, states))
    steps = np.asarray(normal(2, time, channels, dtype=dtype if raw else "float32"))
    steps = steps if raw else np.logaddexp(0, 2 * steps)
    A, bias = -np.exp(normal(channels, states)), [normal(channels, scale=3)] if raw else []
    state, dy, dlast = normal(2, channels, states), normal(2, time, channels), normal(2, channels, states)

    def run(impl, u, B, C, steps):
        def call(u, B, C, steps, A, state, *bias):
            given = SelectiveScanCall(u, steps, A, B, C, state if packed else None, ids, *bias)
            return op.IMPLEMENTATIONS[impl].compute(given)

        return out_and_grads(call, (u, B, C, steps, A, state, *bias), (np.asarray(dy, u.dtype), dlast))

    expected = run("oracle", *(np.asarray(x, np.float32) for x in (u, B, C, steps)))
    found = run("hopper_steps", u, B, C, steps)
    for ours, right in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        ours, right = (np.asarray(y, np.float64) for y in (ours, right))
        assert np.linalg.norm(ours - right) <= tolerance * np.linalg.norm(right)
    assert not get_races().races_found
