"""The Hopper kernels as far as a CPU can tell: packing, pieces, refusals, and that they lower for an H100."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.devices import gpus
from jax.sharding import AxisType, PartitionSpec

from based_jax.ops import taylor
from based_jax.ops.calls import LinearAttentionCall
from based_jax.ops.hopper import taylor as hopper_taylor
from based_jax.ops.hopper import taylor_pieces
from pallas_kernels.hopper import taylor_packing


def _arrays(shape=(2, 2048, 16), k=16, v=64, dtype=jnp.bfloat16):
    return tuple(jnp.zeros((*shape, dim), dtype) for dim in (k, k, v))


def _call(*args, **options):
    return LinearAttentionCall(*_arrays(*args, **options))


def _packed(x: np.ndarray) -> np.ndarray:
    """Return the unweighted features that `taylor_packing.columns` promises."""
    values = {taylor_packing.CONSTANT: lambda m, n: np.ones_like(x[..., m])}
    values[taylor_packing.LINEAR] = lambda m, n: x[..., m]
    values[taylor_packing.PRODUCT] = lambda m, n: x[..., m] * x[..., n]
    values[taylor_packing.EMPTY] = lambda m, n: np.zeros_like(x[..., m])
    return np.stack([values[kind](m, n) for kind, m, n in taylor_packing.columns().tolist()], axis=-1)


def test_every_feature_is_packed_once():
    table = taylor_packing.columns().tolist()
    products = [tuple(sorted((m, n))) for kind, m, n in table if kind == taylor_packing.PRODUCT]
    assert sorted(products) == sorted((m, n) for n in range(16) for m in range(n + 1))
    assert sorted(m for kind, m, _ in table if kind == taylor_packing.LINEAR) == list(range(16))
    assert sum(kind == taylor_packing.CONSTANT for kind, _, _ in table) == 1


def test_packed_state_is_the_sum_of_packed_features(rng):
    k, v = rng.normal(size=(2, 5, 3, 16)), rng.normal(size=(2, 5, 3, 64))

    @jax.jit
    def packed_and_back(k, v):
        state = jnp.einsum("bthe,bthv->bhev", taylor.taylor_features(k), v)
        sums = hopper_taylor.pack_state(state)
        return state, sums, hopper_taylor.unpack_state(sums, jnp.zeros((2, 3)))

    with_ones = np.append(v, np.ones_like(v[..., :1]), -1)
    state, sums, again = jax.device_get(packed_and_back(np.float32(k), np.float32(with_ones)))
    packed, moments = (x.reshape(2, 3, 64, -1) for x in np.split(sums, [160], axis=2))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    close(packed, np.einsum("bthv,bthe->bhve", v, _packed(k)))
    close(moments[:, :, :16], np.einsum("bthm,bthn->bhmn", k, k))
    close(moments[:, :, 16], k.sum(axis=1))
    close(moments[:, :, 17, 0], k.shape[1])
    assert not moments[:, :, 18:].any() and not moments[:, :, 17, 1:].any()
    close(again, state, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("feature_dim, value_dim", [pytest.param(8, 64, marks=pytest.mark.long), (16, 112), (5, 200)])
def test_other_widths_are_those_of_the_kernels(rng, monkeypatch, feature_dim, value_dim):
    def kernels(q, k, v, state, segment_ids):
        width, parts = v.shape[3], -(-v.shape[3] // 64)
        assert q.shape[3] == 16 and (width == 64 or (width > 64 and width % 16 == 0))
        state = None if state is None else hopper_taylor._join_values(state, parts, width)
        o, after = taylor.taylor_attention(q, k, v, state=state, impl="oracle")
        return o, hopper_taylor._split_values(after, parts)

    monkeypatch.setattr(hopper_taylor, "_attention", kernels)
    shapes = (2, 7, 3, feature_dim), (2, 7, 3, feature_dim), (2, 7, 3, value_dim)
    first, second = ([jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes] for _ in range(2))
    oracle = jax.jit(functools.partial(taylor.taylor_attention, impl="oracle"))
    for state in (None, oracle(*first)[1]):
        got = jax.jit(hopper_taylor.compute)(LinearAttentionCall(*second, state))
        wanted = oracle(*second, state=state)
        for x, y in zip(got, wanted, strict=True):
            np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(
    "call, words",
    [
        (_call(dtype=jnp.float32), "bfloat16"),
        (_call(k=24), "K must be at most 16, and is 24"),
        (_call((2, 0, 16)), "a token"),
    ],
)
def test_refusals_name_the_value(call, words):
    with gpus():
        assert words in hopper_taylor.supports(call)
        assert hopper_taylor.supports(_call()) is None


@pytest.mark.parametrize(
    "kind, runs", [("NVIDIA GH200 480GB", True), ("NVIDIA A100-SXM4-80GB", False), ("NVIDIA B200", False)]
)
def test_only_hopper_gpus(kind, runs):
    with gpus(kind):
        reason = hopper_taylor.supports(_call())
    assert reason is None if runs else kind in reason


def test_a_mesh_with_explicit_axes_needs_shard_map():
    call = _call()
    with gpus(shape=(2,), axes=AxisType.Explicit):
        assert "shard_map" in hopper_taylor.supports(call)
    for axes in (AxisType.Manual, AxisType.Auto):
        with gpus(shape=(2,), axes=axes):
            assert hopper_taylor.supports(call) is None


@pytest.mark.parametrize(
    "shape, pieces, with_state, packed",
    [
        ((8, 2048, 16), 1, False, False),
        pytest.param((1, 4097, 4), 16, True, True, marks=pytest.mark.long),
    ],
)
def test_lowers_for_an_h100(shape, pieces, with_state, packed):
    arrays, ids = _arrays(shape), jnp.ones(shape[:2], jnp.int32) if packed else None
    assert taylor_pieces.number_of_pieces(shape[0] * shape[2], -(-shape[1] // 64)) == pieces
    state = (jnp.zeros((shape[0], shape[2], 153, 65)),) if with_state else ()

    def loss(q, k, v, state=None):
        o, after = taylor.taylor_attention(q, k, v, state=state, segment_ids=ids)
        return o.astype(jnp.float32).sum() + after.sum()

    with gpus():
        gradients = jax.jit(jax.grad(loss, argnums=tuple(range(3 + with_state))))
        text = gradients.trace(*arrays, *state).lower(lowering_platforms=("cuda",)).as_text()
    assert [name for name in ("taylor_forward", "taylor_dq", "taylor_dkv") if name not in text] == []
    assert ("taylor_sums" in text) == (with_state or pieces > 1)


def _gradients(arrays, impl="hopper_chunks"):
    def loss(q, k, v):
        o, _ = taylor.taylor_attention(q, k, v, impl=impl)
        return o.astype(jnp.float32).sum()

    return jax.grad(loss, argnums=(0, 1, 2))(*arrays)


@pytest.mark.long
def test_lowers_under_vmap():
    """In pieces, without documents and states."""
    with gpus():
        traced = jax.jit(lambda *arrays: jax.vmap(lambda *xs: _gradients(xs))(*arrays)).trace(*_arrays((2, 1, 4100, 1)))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "taylor_dkv" in text and "taylor_sums" in text


def test_lowers_under_shard_map_over_batch_and_heads():
    """In one piece, with documents and states."""
    time = 15
    spec, state_spec = PartitionSpec("data", None, "heads"), PartitionSpec("data", "heads")
    arrays, state = _arrays((4, time, 4)), jnp.zeros((4, 4, 153, 65))

    def gradients(q, k, v, state, ids):
        def call(*x):
            return taylor.taylor_attention(*x[:3], state=x[3], segment_ids=ids, impl="hopper_chunks")

        return jax.vjp(call, q, k, v, state)[1]((v, state))

    with gpus(shape=(2, 2)):
        specs = (*(spec,) * 3, state_spec)
        sharded = jax.shard_map(gradients, in_specs=(*specs, PartitionSpec("data")), out_specs=specs)
        traced = jax.jit(sharded).trace(*arrays, state, jnp.ones((4, time), jnp.int32))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "taylor_dkv" in text and f"2x{time}x2x64xbf16" in text
