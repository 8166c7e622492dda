"""The gated short convolution: its forms against the oracle, and the Hopper kernels as far as a CPU can tell."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from devices import gpus
from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import get_races
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AxisType, PartitionSpec

from based_jax.errors import UserError
from based_jax.ops import gated_conv
from based_jax.ops.conv import short_conv
from based_jax.ops.gated_conv import IMPLEMENTATIONS, gated_short_conv

FAST = [name for name, entry in IMPLEMENTATIONS.items() if entry.platform is None and name != "oracle"]


def caller(impl, ids=None, run=gated_short_conv):
    def call(x, kernel, bias=None, state=None):
        return run(x, kernel, bias=bias, state=state, segment_ids=ids, return_state=True, impl=impl)

    return call


@pytest.fixture
def draw(normal, packed_ids):
    """Return a source of (x, kernel, bias, state), cotangents and ids."""

    def inputs(T, W, D, dtype="float32", batch=6):
        args = normal(batch, T, 2 * D, dtype=dtype), normal(W, D), normal(2 * D), normal(batch, W, D, dtype=dtype)
        return args, (normal(batch, T, D, dtype=dtype), normal(batch, W, D, dtype=dtype)), packed_ids(T)

    return inputs


def test_oracle_is_the_formula(draw, close):
    (x, kernel, bias, state), _, ids = draw(20, 3, 5)
    u, gate = jnp.split(x + bias[None, None], 2, axis=-1)
    c, after = short_conv(u, kernel, state=state, segment_ids=ids, return_state=True, impl="oracle")
    got = jax.jit(caller("oracle", ids))(x, kernel, bias, state)
    close(got, (c / (1 + np.exp(-c)) * gate, after))


@pytest.mark.parametrize(
    "dtype, case",
    [("float32", (1, 3, 64)), ("float32", (65, 2, 5)), ("bfloat16", (65, 2, 5)), ("bfloat16", (40, 9, 4))],
    ids=str,
)
def test_every_form_equals_the_oracle(case, dtype, draw, out_and_grads, close):
    args, cotangents, ids = draw(*case, dtype=dtype)
    for call in (lambda impl: (caller(impl, ids), args), lambda impl: (caller(impl), args[:2])):
        expected = out_and_grads(*call("oracle"), cotangents)
        for impl in FAST:
            close(out_and_grads(*call(impl), cotangents), expected, dtype, what=impl)


@pytest.mark.parametrize("impl", FAST)
def test_pieces_equal_one_call(impl, draw, out_and_grads, close):
    (x, kernel, bias, _), cotangents, _ = draw(20, 3, 5, batch=2)
    ids = jnp.asarray([np.ones(20), np.arange(20) >= 6], jnp.int32)

    def in_pieces(x, kernel, bias):
        outputs, state = [], None
        for start, stop in ((0, 1), (1, 6), (6, 8), (8, 20)):
            y, state = caller(impl, ids[:, start:stop])(x[:, start:stop], kernel, bias, state)
            outputs.append(y)
        return jnp.concatenate(outputs, axis=1), state

    expected = out_and_grads(caller("oracle", ids), (x, kernel, bias), cotangents)
    close(out_and_grads(in_pieces, (x, kernel, bias), cotangents), expected)


@pytest.mark.parametrize(
    "shape, taps, dtype, words",
    [
        ((2, 16, 256), 3, "float32", "bfloat16"),
        ((2, 16, 256), 5, "bfloat16", "2 to 4 taps, and has 5"),
        ((2, 16, 192), 3, "bfloat16", "multiple of 128, and are 96"),
        ((2, 0, 256), 3, "bfloat16", "and are 0"),
    ],
)
def test_refusals_name_the_value(shape, taps, dtype, words):
    x, kernel = jnp.zeros(shape, dtype), jnp.zeros((taps, shape[2] // 2))
    with gpus(), pytest.raises(UserError, match=words):
        gated_short_conv(x, kernel, impl="hopper")


def test_a_mesh_with_explicit_axes_needs_shard_map():
    arguments = jnp.zeros((2, 16, 256), jnp.bfloat16), jnp.zeros((3, 128)), None, None, None
    supports = IMPLEMENTATIONS["hopper"].supports
    with gpus(shape=(2,), axes=AxisType.Explicit):
        assert "shard_map" in supports(*arguments)
    with gpus(shape=(2,)):
        assert supports(*arguments) is None


@pytest.mark.parametrize("time, channels, lanes", [(2048, 2048, None), (13, 384, 2)])
def test_lowers_for_an_h100(time, channels, lanes):
    x, kernel, bias = (
        jnp.zeros((2, time, 2 * channels), jnp.bfloat16),
        jnp.zeros((3, channels)),
        jnp.zeros(2 * channels),
    )
    ids = jnp.ones((2, time), jnp.int32)

    def loss(x, kernel, bias):
        return gated_short_conv(x, kernel, bias=bias, segment_ids=ids).astype(jnp.float32).sum()

    gradients, arguments = jax.grad(loss, argnums=(0, 1, 2)), (x, kernel, bias)
    if lanes:
        gradients, arguments = jax.vmap(gradients), [jnp.stack([y] * lanes) for y in arguments]
    with gpus():
        text = jax.jit(gradients).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert [name for name in ("gated_conv", "gated_conv_backward") if name not in text] == []


def test_lowers_under_shard_map():
    """Weights are the same on all devices: their gradients are summed over them."""

    def gradients(x, kernel):
        call = jax.grad(lambda *args: gated_short_conv(*args, impl="hopper").astype(jnp.float32).sum(), argnums=(0, 1))
        return call(x, kernel)

    data, everywhere = PartitionSpec("data"), PartitionSpec()
    with gpus(shape=(2,)):
        sharded = jax.shard_map(gradients, in_specs=(data, everywhere), out_specs=(data, everywhere))
        traced = jax.jit(sharded).trace(jnp.zeros((4, 16, 256), jnp.bfloat16), jnp.zeros((3, 128)))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "gated_conv_backward" in text and "all_reduce" in text


@pytest.mark.parametrize("time, channels, taps, packed", [(43, 256, 3, True), (24, 128, 2, False), (20, 128, 4, True)])
def test_kernels_equal_the_oracle(normal, packed_ids, out_and_grads, monkeypatch, time, channels, taps, packed):
    """In Pallas' interpreter, which looks for races."""
    from pallas_kernels import short_conv_hopper

    for part in ("FORWARD_PART", "BACKWARD_PART"):
        monkeypatch.setattr(short_conv_hopper, part, 16)
    rows = slice(1, 3)  # of the packed ones
    ids = packed_ids(time)[rows] if packed else None
    x, dy = (normal(2, time, k * channels, dtype="bfloat16") for k in (2, 1))
    wide = normal(taps, channels), normal(2 * channels), normal(2, taps, channels)

    def run(impl, x):
        def call(x, kernel, bias, state):
            return impl(x, kernel, bias, state if packed else None, ids)

        return out_and_grads(call, (x, *wide), dy.astype(x.dtype))

    expected = run(IMPLEMENTATIONS["oracle"].run, x.astype(jnp.float32))
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        got = run(gated_conv._hopper, x)
    for ours, right in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        ours, right = (np.asarray(y, np.float64) for y in (ours, right))
        assert np.linalg.norm(ours - right) <= 5e-3 * np.linalg.norm(right)
    assert not get_races().races_found
