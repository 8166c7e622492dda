"""The 153 features of a key or a query by single lanes, two a lane, and what lies beside them in a state.

A feature is a product of two components, which a lane picks by the feature's number; tiles know no such picking. Lane l
has the slots l and 32 + l, some of them with another lane, which hold the rows of a state as tiles of 16 meet them:

    slot 0 .. 143       rows 0 .. 143
    slot 144 .. 159     rows 137 .. 152: the last tile ends with the last row, and of those that it shares with the one
                        before, slots 144 .. 150, features are 0 and nothing is written
"""

import functools
import math
from collections.abc import Callable, Sequence

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
FIRST_SLOTS = 0, SLOTS - LANES
"""Of the first lane."""
PER_LANE = plgpu.Layout.WG_STRIDED((LANES,), vec_size=1)
"""The layout of one value a lane."""
Slots = tuple[jax.Array, jax.Array]
"""Values of the first and of the second slot of each lane."""


def features(x) -> list[Slots]:
    """Return phi of each row of x (N, 16), in global or shared memory."""
    rows = range(x.shape[0])
    found = _by_lanes(lambda slots, x: [slot.feature(x, n) for n in rows for slot in slots], 2 * len(rows))(x)
    return list(zip(found[::2], found[1::2], strict=True))


def read_rows(ref) -> Slots:
    """Return one value of each row from global memory (153)."""
    first, second = _by_lanes(lambda slots, ref: [slot.read(ref) for slot in slots], 2)(ref)
    return first, second


def write_rows(ref, values: Sequence[jax.Array]) -> None:
    """Undo `read_rows`."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), PER_LANE, PER_LANE))
    def body(_, ref, *values):
        for slot, value in zip(_Slot.of_lane(_Lanes()), values, strict=True):
            slot.write(slot.lanes.element(value), ref)

    body(ref, *values)


def _by_lanes(body: Callable, count: int) -> Callable:
    """Return a function of a reference whose `body(slots, ref)` returns `count` fp32 values of each lane."""
    result = plgpu.ShapeDtypeStruct((LANES,), jnp.float32, layout=PER_LANE)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=[result] * count)
    def run(_, ref):
        lanes = _Lanes()
        return [lanes.array(value) for value in body(_Slot.of_lane(lanes), ref)]

    return run


class _Lanes:
    """Arithmetic of a lane, with integers and fp32."""

    def __init__(self):
        self.i32, self.f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()

    def lane(self) -> ir.Value:
        return arith.remui(mgpu.utils.thread_idx(), self.number(LANES))

    def number(self, value: int) -> ir.Value:
        return mgpu.c(value, self.i32)

    def real(self, value: float) -> ir.Value:
        return mgpu.c(value, self.f32)

    def add(self, x: ir.Value, number: int) -> ir.Value:
        return arith.addi(x, self.number(number))

    def subtract(self, x: ir.Value, y: ir.Value) -> ir.Value:
        return arith.subi(x, y)

    def triangle(self, x: ir.Value) -> ir.Value:
        """Return x (x + 1) / 2."""
        return arith.shrui(arith.muli(x, self.add(x, 1)), self.number(1))

    def within(self, x: ir.Value, least: int, most: int) -> ir.Value:
        """Return an integer, or the end of a range that it is beyond."""
        return arith.minsi(arith.maxsi(x, self.number(least)), self.number(most))

    def at_least(self, x: ir.Value, y: ir.Value) -> ir.Value:
        return arith.cmpi(arith.CmpIPredicate.sge, x, y)

    def equal(self, x: ir.Value, y: ir.Value) -> ir.Value:
        return arith.cmpi(arith.CmpIPredicate.eq, x, y)

    def select(self, condition: ir.Value, x: ir.Value, y: ir.Value) -> ir.Value:
        return arith.select(condition, x, y)

    def times(self, x: ir.Value, y: ir.Value) -> ir.Value:
        return arith.mulf(x, y)

    def load(self, ref: ir.Value, *place: ir.Value) -> ir.Value:
        """Return an element in fp32."""
        value = memref.load(ref, [arith.index_cast(ir.IndexType.get(), i) for i in place])
        return value if value.type == self.f32 else arith.extf(self.f32, value)

    def store(self, condition: ir.Value, value: ir.Value, ref: ir.Value, place: ir.Value) -> None:
        """Write an element where a condition holds."""
        with mgpu.utils.when(condition):
            memref.store(value, ref, [arith.index_cast(ir.IndexType.get(), place)])

    def array(self, value: ir.Value) -> mgpu.FragmentedArray:
        """Return a value of each lane as an array."""
        vector = mgpu.utils.bitcast(mgpu.utils.bitcast(value, self.i32), ir.VectorType.get((1,), self.f32))
        layout = mgpu.WGStridedFragLayout((LANES,), 1)
        return mgpu.FragmentedArray(_registers=np.array([vector], dtype=object), _layout=layout, _is_signed=None)

    def element(self, array: mgpu.FragmentedArray) -> ir.Value:
        """Undo `array`."""
        return mgpu.utils.bitcast(mgpu.utils.bitcast(array.registers.item(), self.i32), self.f32)


class _Slot:
    """One of a lane's two slots: the row of the state that it is of, and the components whose product is its feature.

    Features are those of `ops/taylor.py`: 1, then x_m, then x_m x_n for n <= m in the order of m, each with a factor.
    """

    def __init__(self, lanes: _Lanes, first: int):
        do = self.lanes = lanes
        slot = do.add(do.lane(), first)
        is_shared, is_own = (do.at_least(slot, do.number(x)) for x in (FIRST_SHARED, FIRST_OWN))
        self.row = do.select(is_shared, do.add(slot, EXPANDED_DIM - SLOTS), slot)
        self.is_own = do.select(is_shared, is_own, do.at_least(slot, do.number(0)))

    @classmethod
    def of_lane(cls, lanes: _Lanes) -> list["_Slot"]:
        """Return a lane's slots."""
        return [cls(lanes, first) for first in FIRST_SLOTS]

    @functools.cached_property
    def factors(self) -> tuple[ir.Value, ir.Value, ir.Value, ir.Value, ir.Value]:
        """Whether the feature has a component, and a second, these two, and what their product is multiplied by."""
        do = self.lanes
        is_linear, is_product = (do.at_least(self.row, do.number(x)) for x in (1, 1 + FEATURE_DIM))
        number, m = do.add(self.row, -1 - FEATURE_DIM), do.number(0)
        for bit in (8, 4, 2, 1):
            more = do.add(m, bit)
            m = do.select(do.at_least(number, do.triangle(more)), more, m)
        n = do.within(do.subtract(number, do.triangle(m)), 0, FEATURE_DIM - 1)
        scale = FEATURE_DIM**-0.5
        square = do.select(do.equal(m, n), do.real(scale * math.sqrt(0.5)), do.real(scale))
        factor = do.select(is_product, square, do.select(is_linear, do.real(math.sqrt(scale)), do.real(1.0)))
        first = do.select(is_product, m, do.within(do.add(self.row, -1), 0, FEATURE_DIM - 1))
        return is_linear, is_product, first, n, do.select(self.is_own, factor, do.real(0.0))

    def feature(self, x: ir.Value, token: int) -> ir.Value:
        """Return the feature of a row of x."""
        do, (is_linear, is_product, first, second, factor) = self.lanes, self.factors
        left, right = (do.load(x, do.number(token), place) for place in (first, second))
        left, right = do.select(is_linear, left, do.real(1.0)), do.select(is_product, right, do.real(1.0))
        return do.times(do.times(left, right), factor)

    def read(self, ref: ir.Value) -> ir.Value:
        """Return the row's value of a reference (153)."""
        return self.lanes.load(ref, self.row)

    def write(self, value: ir.Value, ref: ir.Value) -> None:
        """Undo `read`; slots that have a row together with others write nothing."""
        self.lanes.store(self.is_own, value, ref, self.row)
