"""RWKV-4's Hopper kernels as far as a CPU can tell: refusals, lowering for an H100, and the interpreter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.devices import gpus
from helpers.documents import numbered
from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import get_races
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AxisType

from based_jax import parallel
from based_jax.errors import UserError
from based_jax.ops import wkv4 as op
from based_jax.ops.calls import Wkv4Call, WkvState
from based_jax.ops.hopper import wkv4 as hopper
from based_jax.ops.wkv4 import wkv4


def _zeros(B=2, T=64, D=256, dtype="bfloat16"):
    return *(jnp.zeros((B, T, D), dtype) for _ in "kv"), -jnp.ones(D), jnp.zeros(D)


@pytest.fixture
def short_tiles(monkeypatch):
    """Unroll over four tokens, not over sixteen, which takes as much longer to trace."""
    from pallas_kernels.hopper import wkv4 as forward
    from pallas_kernels.hopper import wkv4_backward as backward

    for module, name in (
        (forward, "TILE_TOKENS"),
        (backward, "TILE_TOKENS"),
        (hopper, "TOKEN_MULTIPLE"),
    ):
        monkeypatch.setattr(module, name, 4)


@pytest.mark.parametrize(
    "options, words",
    [({"dtype": "float16"}, "bfloat16 or float32, and is float16"), ({"B": 0}, "and are 0")],
)
def test_refusals_name_the_value(options, words):
    with gpus(), pytest.raises(UserError, match=words):
        wkv4(*_zeros(**options), impl="hopper_steps")


def test_a_mesh_with_explicit_axes_needs_shard_map():
    call, supports = Wkv4Call(*_zeros()), op.IMPLEMENTATIONS["hopper_steps"].supports
    with gpus(shape=(2,), axes=AxisType.Explicit):
        assert "shard_map" in supports(call)


def _lowered(mesh, ids=None, **options):
    def loss(*args):
        wkv, last = wkv4(*args, segment_ids=ids)
        return wkv.astype(jnp.float32).sum() + last[0].sum()

    with mesh:
        traced = jax.jit(jax.grad(loss, argnums=range(4))).trace(*_zeros(**options))
        return traced.lower(lowering_platforms=("cuda",)).as_text()


def test_lowers_for_an_h100(short_tiles):
    assert "wkv4_backward" in _lowered(gpus(), jnp.ones((2, 61), jnp.int32), T=61, D=200, dtype="float32")


@pytest.mark.long
def test_whole_tiles_lower_for_an_h100():
    assert "wkv4_backward" in _lowered(gpus())


def test_each_device_has_its_rows_and_channels(short_tiles):
    text = _lowered(gpus(shape=(2, 1, 2), names=parallel.AXES))
    kernels = [line for line in text.splitlines() if "mosaic_gpu" in line]
    assert any("1x64x4x32xbf16" in line for line in kernels) and not any("x8x32x" in line for line in kernels)


@pytest.mark.parametrize(
    "blocks, time, pieces", [(128, 2048, 1), (64, 2048, 1), (33, 300, 1), (33, 2048, 8), (8, 32768, 32), (1, 700, 2)]
)
def test_pieces_fill_the_chip(blocks, time, pieces):
    with gpus():
        assert hopper.number_of_pieces(blocks, time) == pieces


@pytest.fixture
def interpreted(monkeypatch):
    """Run kernels in Pallas' interpreter, which looks for races; it knows no inline functions."""
    from pallas_kernels.hopper import wkv4 as kernels

    monkeypatch.setattr(kernels, "load_global", lambda ref, layout: ref[...])
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        yield


CASES = [
    pytest.param(21, 130, "float32", True, 1, 2e-6, marks=pytest.mark.long),
    (11, 40, "float32", True, 2, 2e-6),
    (8, 32, "bfloat16", False, 1, 5e-3),
    pytest.param(32, 128, "bfloat16", False, 1, 5e-3, marks=pytest.mark.long),
    pytest.param(32, 128, "bfloat16", False, 2, 5e-3, marks=pytest.mark.long),
]


@pytest.mark.parametrize("time, channels, dtype, packed, pieces, tolerance", CASES)
def test_kernels_equal_the_oracle(
    monkeypatch,
    normal,
    packed_ids,
    out_and_grads,
    short_tiles,
    interpreted,
    time,
    channels,
    dtype,
    packed,
    pieces,
    tolerance,
):
    """Channels from those that keep all to those that keep nothing, with keys up to 70."""
    monkeypatch.setattr(hopper, "number_of_pieces", lambda blocks, time: pieces)
    rows = slice(1, 3)  # of the packed ones
    ids = jax.device_put(numbered(np.asarray(packed_ids(time))[rows])) if packed else None
    sizes = jnp.linspace(1, 20, channels, dtype=dtype)[None, None], 1
    k, v = (normal(2, time, channels, dtype=dtype) * size for size in sizes)
    rates = -jnp.logspace(-6, 4, channels), normal(channels)
    state = normal(2, channels), np.abs(normal(2, channels)) + 0.1, normal(2, channels)
    dwkv, dnum, dden = normal(2, time, channels), normal(2, channels), normal(2, channels)

    def run(impl, k, v):
        def call(k, v, decay, bonus, *state):
            given = WkvState(*state) if packed else None
            compute = op.IMPLEMENTATIONS[impl].compute
            wkv, (num, den, top) = compute(Wkv4Call(k, v, decay, bonus, given, ids))
            return wkv, num * jnp.exp(top), den * jnp.exp(top)

        sums = [np.asarray(x) * np.float32(np.exp(-40.0)) for x in (dnum, dden)]  # which have e^70 in them
        return out_and_grads(call, (k, v, *rates, *state), (np.asarray(dwkv, v.dtype), *sums))

    expected = run("oracle", *(np.asarray(x, np.float32) for x in (k, v)))
    for ours, right in zip(jax.tree.leaves(run("hopper_steps", k, v)), jax.tree.leaves(expected), strict=True):
        ours, right = (np.asarray(y, np.float64) for y in (ours, right))
        assert np.linalg.norm(ours - right) <= tolerance * np.linalg.norm(right)
    assert not get_races().races_found
