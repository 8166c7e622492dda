"""The kernel that decodes with Taylor attention, as far as a CPU can tell: refusals, lowering, and the interpreter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.cases import parametrize_some
from helpers.devices import gpus
from helpers.interpreted import replace_products
from jax import lax
from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import get_races
from jax.experimental.pallas import mosaic_gpu as plgpu

from based_jax.errors import UserError
from based_jax.ops.decode_calls import RecentTokens, TaylorDecodeCall
from based_jax.ops.hopper import taylor_decode as hopper_taylor_decode
from based_jax.ops.taylor import taylor_attention, taylor_features
from based_jax.ops.taylor_decode import holding, initial_state, taylor_attention_decode, total
from pallas_kernels.hopper import taylor_decode, taylor_lanes


def _state_of(batch=2, heads=2, value_dim=64, feature_dim=16, dtype="bfloat16", **form):
    form = {"flush": 16} | form
    return initial_state(batch, heads, feature_dim, value_dim, dtype=jnp.dtype(dtype), **form)


def _zeros(tokens=1, batch=2, heads=2, value_dim=64, feature_dim=16, dtype="bfloat16"):
    return tuple(jnp.zeros((batch, tokens, heads, dim), dtype) for dim in (feature_dim, feature_dim, value_dim))


@pytest.mark.parametrize(
    "sizes, form, words",
    [
        ({}, {"flush": 1}, "the state must have recent tokens, and flush is 1"),
        ({"dtype": "float32"}, {}, "must be bfloat16; q is float32, recent keys are float32"),
        ({"feature_dim": 8}, {}, "K must be 16, and is 8"),
        ({"value_dim": 72}, {}, "V must be a multiple of 16 up to 512 for 1 tokens, and is 72"),
        ({"value_dim": 128, "tokens": 8}, {}, "up to 64 for 8 tokens, and is 128"),
        ({}, {"flush": 24}, "flush must be a multiple of 16, and is 24"),
    ],
)
def test_refusals_name_the_value(sizes, form, words):
    state = _state_of(**{name: x for name, x in sizes.items() if name != "tokens"}, **form)
    with gpus(), pytest.raises(UserError, match=words):
        taylor_attention_decode(*_zeros(**sizes), state, impl="hopper_steps")


@parametrize_some(
    "state_dtype, value_dim, tokens, mesh",
    [
        ("float32", 112, 1, {}),
        ("bfloat16", 64, 4, {}),
        ("int8", 64, 1, {"shape": (2, 2), "names": ("data", "tensor")}),
        ("float8_e4m3fn", 112, 1, {}),
    ],
    [("int8", 64, 1, {"shape": (2, 2), "names": ("data", "tensor")})],
)
def test_lowers_for_an_h100(state_dtype, value_dim, tokens, mesh):
    """Under a mesh each device has its rows and heads; every state is written where it lies."""
    qkv, state = _zeros(tokens, value_dim=value_dim), _state_of(value_dim=value_dim, state_dtype=state_dtype)

    def call(qkv, state):
        return taylor_attention_decode(*qkv, state, impl="hopper_steps")

    with gpus(**mesh):
        text = jax.jit(call).trace(qkv, state).lower(lowering_platforms=("cuda",)).as_text()
    [kernel] = [line for line in text.splitlines() if "@mosaic_gpu_v2" in line]
    assert f"tensor<{'1x1' if mesh else '2x2'}x153x{value_dim}x" in kernel
    assert kernel.count("#stablehlo.output_operand_alias") == len(jax.tree.leaves(state)) - 1


def _rows():
    """Return the row of each slot, and whether its feature is that of the row."""
    slot = lax.iota(jnp.int32, taylor_lanes.SLOTS)
    row = jnp.where(slot < taylor_lanes.FIRST_SHARED, slot, slot - taylor_lanes.SLOTS + taylor_lanes.EXPANDED_DIM)
    return row, (slot < taylor_lanes.FIRST_SHARED) | (slot >= taylor_lanes.FIRST_OWN)


def _picked(x, index):
    """Return x (N, C) at places (M) of its second axis; kernels hold no arrays of constants, so that none is taken."""
    at = index[:, None] == lax.broadcasted_iota(jnp.int32, (index.shape[0], x.shape[1]), 1)
    return jnp.sum(jnp.where(at[None], x[:, None], 0.0), axis=2)


def _halves(x):
    return tuple(x[first : first + taylor_lanes.LANES] for first in taylor_lanes.FIRST_SLOTS)


def _features(ref):
    x, (row, own) = ref[...].astype(jnp.float32), _rows()
    number, n = row - 17, lax.iota(jnp.int32, 16)
    m = jnp.maximum(jnp.sum(number[:, None] >= (n * (n + 1) // 2)[None], axis=1) - 1, 0)
    n = number - m * (m + 1) // 2
    products = _picked(x, m) * _picked(x, n) * jnp.where(m == n, 0.125**0.5 / 2, 0.25)[None]
    phi = jnp.where(row[None] >= 17, products, jnp.where(row[None] >= 1, _picked(x, row - 1) / 2, 1.0))
    return [_halves(x) for x in jnp.where(own[None], phi, 0.0)]


def _read_rows(ref):
    return _halves(_picked(ref[...][None], _rows()[0])[0])


def _write_rows(ref, values):
    x = jnp.concatenate([values[0], values[1][-taylor_lanes.FIRST_SLOTS[1] :]])
    ref[...] = jnp.concatenate([x[: taylor_lanes.FIRST_SHARED], x[taylor_lanes.FIRST_OWN :]])


class _ArraysOfLanes:
    """`taylor_lanes._Lanes` for all lanes at once, in numpy."""

    number, real, select = np.int32, np.float32, staticmethod(np.where)
    add, subtract, times, equal, at_least = np.add, np.subtract, np.multiply, np.equal, np.greater_equal

    def lane(self):
        return np.arange(taylor_lanes.LANES)

    def triangle(self, x):
        return x * (x + 1) // 2

    def within(self, x, least, most):
        return np.clip(x, least, most)

    def load(self, ref, *place):
        return ref[place]

    def store(self, condition, value, ref, place):
        ref[place[condition]] = value[condition]


def test_lanes_make_each_feature_and_have_each_row(normal, close):
    x, values = np.asarray(normal(2, 16)), np.arange(1.0, 154.0)
    phi = np.asarray(jax.jit(taylor_features)(x))[1]
    rows, is_own = map(np.asarray, _rows())
    written = np.zeros(153)
    for first, slot in zip(taylor_lanes.FIRST_SLOTS, taylor_lanes._Slot.of_lane(_ArraysOfLanes()), strict=True):
        at = slice(first, first + taylor_lanes.LANES)
        np.testing.assert_array_equal(slot.row, rows[at])
        close(slot.feature(x, 1), np.where(is_own, phi[rows], 0)[at])
        slot.write(slot.read(values), written)
    np.testing.assert_array_equal(written, values)
    tiles = rows.reshape(-1, taylor_lanes.TILE_ROWS)
    starts = np.minimum(np.arange(len(tiles)) * taylor_lanes.TILE_ROWS, taylor_lanes.LAST_TILE)
    np.testing.assert_array_equal(tiles, starts[:, None] + np.arange(taylor_lanes.TILE_ROWS))
    assert sorted(rows[is_own]) == list(range(153))


@pytest.fixture
def interpreted(monkeypatch):
    replace_products(monkeypatch)
    replaced = {
        "features": _features,
        "read_rows": _read_rows,
        "write_rows": _write_rows,
        "keep_plain": lambda *_: None,
    }
    for name, function in replaced.items():
        monkeypatch.setattr(taylor_decode, name, function)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        yield


@parametrize_some(
    "state_dtype, value_dim, counts, tokens",
    [
        ("float32", 48, (16, 5), 1),
        ("float32", 16, (14, 0), 3),
        ("bfloat16", 16, (16, 5), 1),
        ("int8", 16, (16, 5), 1),
        ("float8_e4m3fn", 16, (16, 5), 1),
    ],
    [("int8", 16, (16, 5), 1)],
)
def test_kernel_equals_the_xla_form(interpreted, normal, close, state_dtype, value_dim, counts, tokens):
    """A row that has no room and one that has; the interpreter looks for races."""
    sizes, flush = (2, tokens, 1), 16
    before = tuple(normal(2, 30, 1, dim) for dim in (16, 16, value_dim))
    qkv = tuple(normal(*sizes, dim, dtype="bfloat16") for dim in (16, 16, value_dim))
    recent = tuple(normal(2, 1, flush, dim, dtype="bfloat16") for dim in (16, value_dim))

    @jax.jit
    def start(before):
        empty = _state_of(heads=1, value_dim=value_dim, state_dtype=state_dtype)
        return holding(taylor_attention(*before, impl="oracle")[1], empty)

    state = start(before)._replace(recent=RecentTokens(*recent, jnp.asarray(counts, jnp.int32)))
    call = TaylorDecodeCall(*qkv, state.sums, state.recent[:2], state.recent.length)
    o, sums, (k, v), count = jax.jit(hopper_taylor_decode.compute)(call)
    after = state._replace(sums=sums, recent=RecentTokens(k, v, count))
    xla = jax.jit(lambda qkv, state: taylor_attention_decode(*qkv, state, impl="xla_steps"))
    for row in range(2):
        one = jax.tree.map(lambda x, row=row: x[row : row + 1], (qkv, state, o, after))
        wanted, wanted_after = xla(jax.tree.map(lambda x: x.astype(jnp.float32), one[0]), one[1])
        close(one[2], wanted, "bfloat16", tolerance=5e-3, what=f"row {row}")
        assert one[3].recent.length == wanted_after.recent.length
        close(total(one[3]), total(wanted_after), tolerance=1e-5, what=f"row {row}")
    assert not get_races().races_found
