"""The Hopper kernels on a CPU: Pallas' interpreter runs their copies, barriers and shared memory, and looks for races.

What the interpreter lacks is replaced (`interpreted.py`), and so are the two functions written in registers
(`taylor_packing.expand` and `pull_back`).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.interpreted import replace_products
from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import get_races
from jax.experimental.pallas import mosaic_gpu as plgpu

from based_jax.ops import taylor
from based_jax.ops.calls import LinearAttentionCall
from based_jax.ops.hopper import taylor as hopper_taylor
from based_jax.ops.hopper import taylor_pieces
from pallas_kernels.hopper import taylor as forward
from pallas_kernels.hopper import taylor_backward as backward
from pallas_kernels.hopper import taylor_packing, taylor_state


def _expand(x, *, query):
    """Return the slabs of `taylor_packing` in its notation: pairs a and b of each lane, those r lanes on, exchanged."""
    pairs = (x * taylor_packing.SCALE if query else x).reshape(-1, 2, 4, 2)
    on = [jnp.roll(pairs, -r, axis=2) for r in range(4)]
    exchanged = [y[..., ::-1] for y in on]
    slot, lane, half = (jax.lax.broadcasted_iota(jnp.int32, pairs.shape, axis) for axis in (1, 2, 3))
    constant = jnp.where((slot == 0) & (lane == 0), 1, 0).astype(pairs.dtype)
    a, b = pairs[:, :1], slice(1, 2)
    slabs = [
        (0.5 if query else 1) * pairs * pairs,
        jnp.where(half == 0, pairs * exchanged[0], constant),
        *(pairs * on[1], pairs * exchanged[1]),
        *(jnp.where(lane < 2, pairs * y, linear) for y, linear in ((on[2], on[2]), (exchanged[2], pairs))),
        *(a * jnp.concatenate([on[r][:, b], exchanged[r][:, b]], axis=1) for r in range(4)),
    ]
    return jnp.concatenate([slab.reshape(-1, 16) for slab in slabs], axis=1).astype(x.dtype)


def _pull_back(x, u):
    return jax.vjp(functools.partial(_expand, query=True), x.astype(jnp.float32))[1](u)[0] / taylor_packing.SCALE


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    replace_products(monkeypatch)
    for module in (taylor_state, forward, backward):
        monkeypatch.setattr(module, "expand", _expand)
    monkeypatch.setattr(backward, "pull_back", _pull_back)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        yield


def _relative(x, y):
    x, y = (np.asarray(z, np.float64) for z in (x, y))
    return np.linalg.norm(x - y) / np.linalg.norm(y)


@pytest.mark.parametrize(
    "shape, value_dim, chunks_per_piece, with_state, documents",
    [
        pytest.param(
            (1, 261, 1), 64, 2, True, ((0, 30), (1, 90), (2, 25), (0, 60), (3, 20), (4, 36)), marks=pytest.mark.long
        ),
        pytest.param((1, 100, 2), 112, 1, True, ((0, 10), (1, 40), (2, 8), (0, 20), (3, 22)), marks=pytest.mark.long),
        ((1, 100, 1), 64, 1, True, ((0, 10), (1, 40), (2, 8), (0, 20), (3, 9), (4, 13))),
        pytest.param((1, 70, 1), 80, 2, False, ((1, 70),), marks=pytest.mark.long),
    ],
)
def test_forward_and_gradients_are_the_oracle_s(
    rng, monkeypatch, shape, value_dim, chunks_per_piece, with_state, documents
):
    """Documents are numbers and how many tokens have each in turn, 0 for padding."""
    monkeypatch.setattr(taylor_pieces, "MIN_CHUNKS_PER_PIECE", chunks_per_piece)
    chunks = -(-shape[1] // 64)
    assert taylor_pieces.number_of_pieces(shape[0] * shape[2], chunks) == max(1, chunks // chunks_per_piece)
    ids = jax.device_put(np.int32([np.repeat(*np.asarray(documents).T)]))

    def arrays(dims):
        return [rng.normal(size=(*shape, dim)).astype(jnp.bfloat16) for dim in dims]

    inputs, [do] = arrays((16, 16, value_dim)), jax.device_put(arrays((value_dim,)))
    dstate = jax.device_put(rng.normal(size=(shape[0], shape[2], 153, value_dim + 1)).astype(np.float32) / 100)
    if with_state:
        before = jax.jit(lambda *qkv: taylor.taylor_attention(*qkv, impl="oracle")[1])
        inputs += [before(*arrays((16, 16, value_dim)))]

    def run(impl, inputs):
        def call(q, k, v, state=None):
            if impl == "kernels":
                return hopper_taylor.compute(LinearAttentionCall(q, k, v, state, ids))
            return taylor.taylor_attention(q, k, v, state=state, segment_ids=ids, impl=impl)

        (o, after), pull = jax.vjp(call, *inputs)
        if with_state:
            return o, after, *pull((do.astype(o.dtype), dstate))
        return o, *pull((do.astype(o.dtype), jnp.zeros_like(after)))

    run = jax.jit(run, static_argnums=0)
    wanted = run("oracle", [np.asarray(x, np.float32) for x in inputs])
    for got, right in zip(run("kernels", inputs), wanted, strict=True):
        assert _relative(got, right) < 5e-3
    assert not get_races().races_found


def test_wide_values_are_parts_of_which_the_last_is_filled_up(rng):
    q, k, v = (rng.normal(size=(1, 64, 1, dim)).astype(jnp.bfloat16) for dim in (16, 16, 80))
    got = jax.jit(lambda *x: hopper_taylor.compute(LinearAttentionCall(*x))[0])(q, k, v)
    right = jax.jit(lambda *qkv: taylor.taylor_attention(*qkv, impl="oracle")[0])(q, k, v)
    assert _relative(got, right) < 5e-3


def test_a_row_with_padding_inside_a_document_is_nan(rng):
    q, k, v = (rng.normal(size=(1, 64, 1, dim)).astype(jnp.bfloat16) for dim in (16, 16, 64))
    ids = np.repeat(np.int32([[1, 2, 0, 2]]), 16, axis=1)
    for x in jax.jit(hopper_taylor.compute)(LinearAttentionCall(q, k, v, None, ids)):
        assert np.isnan(np.asarray(x, np.float32)).all()
