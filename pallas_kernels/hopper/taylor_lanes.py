"""The 153 features of a key or a query by single lanes, two a lane, and what lies beside them in a state.

A feature is a product of two components, which a lane picks by the feature's number; tiles know no such picking. Lane l
has the slots l and LANES + l, of which `SLOTS` hold the rows of a state as tiles of `TILE_ROWS` rows meet them:

    slot 0 .. 143       rows 0 .. 143
    slot 144 .. 159     rows 137 .. 152: the last tile ends with the last row, and of those that it shares with the one
                        before, slots 144 .. 150, features are 0 and nothing is written
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, memref

from pallas_kernels.hopper.mosaic import WARP_LANES, WARPS

FEATURE_DIM, EXPANDED_DIM = 16, 153
TILE_ROWS = 16
LAST_TILE = EXPANDED_DIM - TILE_ROWS
"""The first row of the state's last tile."""
FIRST_SHARED = EXPANDED_DIM // TILE_ROWS * TILE_ROWS
SLOTS = FIRST_SHARED + TILE_ROWS
FIRST_OWN = FIRST_SHARED + SLOTS - EXPANDED_DIM
"""The first slot of the last tile, and its first one whose row no other tile has."""
LANES = WARPS * WARP_LANES
PER_LANE = plgpu.Layout.WG_STRIDED((LANES,), vec_size=1)
"""The layout of one value a lane."""
Slots = tuple[jax.Array, jax.Array]
"""Values of the first and of the second slot of each lane."""


def features(x) -> list[Slots]:
    """Return phi of each row of x (N, 16), in global or shared memory."""
    count = x.shape[0]

    def body(lanes: "_Lanes", x):
        slots = [_Slot(lanes, half) for half in range(2)]
        return [slot.feature(x, n) for n in range(count) for slot in slots]

    found = _by_lanes(body, 2 * count)(x)
    return list(zip(found[::2], found[1::2], strict=True))


def read_rows(ref) -> Slots:
    """Return one value of each row from global memory (153)."""
    return tuple(_by_lanes(lambda lanes, ref: [_Slot(lanes, half).read(ref) for half in range(2)], 2)(ref))


def write_rows(ref, values: Sequence[jax.Array]) -> None:
    """Undo `read_rows`."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), PER_LANE, PER_LANE))
    def body(_, ref, *values):
        for half, value in enumerate(values):
            _Slot(_Lanes(), half).write(value.registers.item(), ref)

    body(ref, *values)


def _by_lanes(body, count: int):
    """Return a function of references whose `body` returns `count` fp32 values of each lane."""
    result = plgpu.ShapeDtypeStruct((LANES,), jnp.float32, layout=PER_LANE)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=[result] * count)
    def run(_, ref):
        lanes = _Lanes()
        return [lanes.array(value) for value in body(lanes, ref)]

    return run


class _Lanes:
    """Arithmetic of a lane."""

    def __init__(self):
        self.i32, self.f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
        self.lane = arith.remui(mgpu.utils.thread_idx(), self.number(LANES))

    def number(self, value: int) -> ir.Value:
        return mgpu.c(value, self.i32)

    def real(self, value: float) -> ir.Value:
        return mgpu.c(value, self.f32)

    def at_least(self, value: ir.Value, least: int) -> ir.Value:
        return arith.cmpi(arith.CmpIPredicate.sge, value, self.number(least))

    def equal(self, x: ir.Value, y: ir.Value) -> ir.Value:
        return arith.cmpi(arith.CmpIPredicate.eq, x, y)

    def index(self, value: ir.Value) -> ir.Value:
        return arith.index_cast(ir.IndexType.get(), value)

    def load(self, ref: ir.Value, *place: ir.Value) -> ir.Value:
        """Return an element in fp32."""
        value = memref.load(ref, [self.index(i) for i in place])
        return value if value.type == self.f32 else arith.extf(self.f32, value)

    def array(self, value: ir.Value) -> mgpu.FragmentedArray:
        """Return a value of each lane as an array."""
        layout = mgpu.WGStridedFragLayout((LANES,), 1)
        vector = mgpu.utils.bitcast(value, self.i32)
        vector = mgpu.utils.bitcast(vector, ir.VectorType.get((1,), self.f32))
        return mgpu.FragmentedArray(_registers=np.array([vector], dtype=object), _layout=layout, _is_signed=None)


class _Slot:
    """One of a lane's two slots: its row, and the components whose product the row's feature is."""

    def __init__(self, lanes: _Lanes, half: int):
        do = self.do = lanes
        slot = arith.addi(do.lane, do.number(half * LANES))
        shared = do.at_least(slot, FIRST_SHARED)
        shift = arith.select(shared, do.number(SLOTS - EXPANDED_DIM), do.number(0))
        row = arith.minsi(arith.subi(slot, shift), do.number(EXPANDED_DIM - 1))
        own = arith.ori(
            arith.cmpi(arith.CmpIPredicate.slt, slot, do.number(FIRST_SHARED)),
            arith.andi(do.at_least(slot, FIRST_OWN), arith.cmpi(arith.CmpIPredicate.slt, slot, do.number(SLOTS))),
        )
        self.row, self.own = row, own

    def feature(self, x: ir.Value, token: int) -> ir.Value:
        """Return the feature of a row of x."""
        do, row = self.do, self.row
        is_product, is_linear = do.at_least(row, 1 + FEATURE_DIM), do.at_least(row, 1)
        number = arith.subi(row, do.number(1 + FEATURE_DIM))
        m = n = do.number(0)
        for first in range(1, FEATURE_DIM):
            beyond = do.at_least(number, first * (first + 1) // 2)
            m = arith.select(beyond, do.number(first), m)
            n = arith.select(beyond, do.number(first * (first + 1) // 2), n)
        n = arith.maxsi(arith.subi(number, n), do.number(0))
        linear = arith.maxsi(arith.subi(row, do.number(1)), do.number(0))
        first, second = arith.select(is_product, m, linear), n
        scale = FEATURE_DIM**-0.5
        square = arith.select(do.equal(m, n), do.real(scale * math.sqrt(0.5)), do.real(scale))
        factor = arith.select(is_product, square, arith.select(is_linear, do.real(math.sqrt(scale)), do.real(1.0)))
        factor = arith.select(self.own, factor, do.real(0.0))
        one = do.real(1.0)
        left = arith.select(is_linear, do.load(x, do.number(token), first), one)
        right = arith.select(is_product, do.load(x, do.number(token), second), one)
        return arith.mulf(arith.mulf(left, right), factor)

    def read(self, ref: ir.Value) -> ir.Value:
        return self.do.load(ref, self.row)

    def write(self, value: ir.Value, ref: ir.Value) -> None:
        if isinstance(value.type, ir.VectorType):
            value = mgpu.utils.bitcast(mgpu.utils.bitcast(value, self.do.i32), self.do.f32)
        with mgpu.utils.when(self.own):
            memref.store(value, ref, [self.do.index(self.row)])
