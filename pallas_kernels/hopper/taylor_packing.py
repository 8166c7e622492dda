"""The 160 packed features of a 16-wide vector, expanded in registers without leaving a quad of lanes.

The second-order Taylor map has 136 distinct products x_m x_n, 16 linear features and a constant. In the WGMMA layout
the four lanes of a quad hold a row: lane t has the pairs of columns a_t = (2t, 2t+1) and b_t = (2t+8, 2t+9). With a^r
for the pair of lane t+r (mod 4), and ' for a pair's two values exchanged, ten slabs of 16 columns hold every product:

    0  a a, b b                the squares
    1  a a', b b'              only the even columns; the odd ones hold the constant (lane 0 of a) and zeros
    2  a a^1, b b^1      3  a a^1', b b^1'
    4  a a^2, b b^2      5  a a^2', b b^2'      lanes 0, 1; lanes 2, 3 hold the linear features a^2, b^2 and a, b
    6..9  a b^r, a b^r'        r = 0..3

Keys are packed as they are. Queries are scaled by c = 1/4 first, and their squares by 1/2: phi(q).phi(k) is then
1 + s + s^2/2 with s = c q.k, and every factor is a power of two, exact in bf16.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, math, nvvm

from pallas_kernels.hopper.mosaic import TILE_ROWS, WGMMA

FEATURE_DIM = 16
PACKED_DIM = 160
SCALE = FEATURE_DIM**-0.5

CONSTANT, LINEAR, PRODUCT, EMPTY = range(4)


def columns() -> np.ndarray:
    """Return (160, 3): each packed column's kind and the one or two components that it holds."""
    table = np.zeros((PACKED_DIM, 3), np.int32)
    table[:, 0] = EMPTY

    def put(slab: int, register: int, lane: int, half: int, kind: int, m: int = 0, n: int = 0) -> None:
        table[16 * slab + 8 * register + 2 * lane + half] = (kind, m, n)

    def a(lane: int, half: int) -> int:
        return 2 * (lane % 4) + half

    def b(lane: int, half: int) -> int:
        return 8 + a(lane, half)

    for lane in range(4):
        for register, pair in enumerate((a, b)):
            for half in range(2):
                put(0, register, lane, half, PRODUCT, pair(lane, half), pair(lane, half))
                put(2, register, lane, half, PRODUCT, pair(lane, half), pair(lane + 1, half))
                put(3, register, lane, half, PRODUCT, pair(lane, half), pair(lane + 1, 1 - half))
                if lane < 2:
                    put(4, register, lane, half, PRODUCT, pair(lane, half), pair(lane + 2, half))
                    put(5, register, lane, half, PRODUCT, pair(lane, half), pair(lane + 2, 1 - half))
                else:
                    put(4, register, lane, half, LINEAR, pair(lane + 2, half))
                    put(5, register, lane, half, LINEAR, pair(lane, half))
            put(1, register, lane, 0, PRODUCT, pair(lane, 0), pair(lane, 1))
        for r in range(4):
            for half in range(2):
                put(6 + r, 0, lane, half, PRODUCT, a(lane, half), b(lane + r, half))
                put(6 + r, 1, lane, half, PRODUCT, a(lane, half), b(lane + r, 1 - half))
    put(1, 0, 0, 1, CONSTANT)
    return table


class _Quad:
    """Operations on registers that hold two bf16 each."""

    def __init__(self):
        self.i32 = ir.IntegerType.get_signless(32)
        self.pair = ir.VectorType.get((2,), ir.BF16Type.get())
        self.f32 = ir.F32Type.get()
        self.zero, self.one = (mgpu.c(value, self.f32) for value in (0.0, 1.0))
        self.lane = arith.andi(mgpu.utils.thread_idx(), self.const(3))
        self.first_half = arith.cmpi(arith.CmpIPredicate.ult, self.lane, self.const(2))
        self.first = arith.cmpi(arith.CmpIPredicate.eq, self.lane, self.const(0))
        self.sources = [arith.andi(arith.addi(mgpu.utils.thread_idx(), self.const(r)), self.const(3)) for r in range(4)]

    def const(self, value: int) -> ir.Value:
        return mgpu.c(value, self.i32)

    def bits(self, pair: ir.Value) -> ir.Value:
        return mgpu.utils.bitcast(pair, self.i32)

    def from_lane(self, bits: ir.Value, r: int) -> ir.Value:
        """Return the register of lane t + r (mod 4) of the quad."""
        if r == 0:
            return bits
        quad = 0x1C1F
        return nvvm.shfl_sync(self.const(0xFFFFFFFF), bits, self.sources[r], self.const(quad), nvvm.ShflKind.idx)

    def exchange(self, bits: ir.Value) -> ir.Value:
        """Return (y1, y0) of (y0, y1)."""
        return self._permute(bits, 0x1032)

    def first_alone(self, bits: ir.Value) -> ir.Value:
        """Return (y0, 0) of (y0, y1); not by a product with 0, which may be -0."""
        return arith.andi(bits, self.const(0xFFFF))

    def _permute(self, bits: ir.Value, selector: int) -> ir.Value:
        return llvm.inline_asm(self.i32, [bits], f"prmt.b32 $0, $1, $1, {selector};", "=r,r")

    def multiply(self, x: ir.Value, y: ir.Value) -> ir.Value:
        return self.bits(arith.mulf(mgpu.utils.bitcast(x, self.pair), mgpu.utils.bitcast(y, self.pair)))

    def halves(self, pair: ir.Value) -> list[ir.Value]:
        """Return the two values of a pair."""
        return [llvm.extractelement(pair, self.const(i)) for i in range(2)]

    def join(self, first: ir.Value, second: ir.Value) -> ir.Value:
        """Return the pair of two fp32 values."""
        pair = llvm.mlir_undef(ir.VectorType.get((2,), self.f32))
        for i, value in enumerate((first, second)):
            pair = llvm.insertelement(pair, value, self.const(i))
        return pair

    def widen(self, bits: ir.Value) -> list[ir.Value]:
        """Return the two bf16 values of a register in fp32: their bits, shifted up."""
        shifted = arith.shli(bits, self.const(16)), arith.andi(bits, self.const(0xFFFF0000))
        return [mgpu.utils.bitcast(y, self.f32) for y in shifted]

    def from_lane_fp32(self, value: ir.Value, r: int) -> ir.Value:
        """Return the fp32 value of lane t + r (mod 4) of the quad."""
        return mgpu.utils.bitcast(self.from_lane(mgpu.utils.bitcast(value, self.i32), r), self.f32)

    def fma(self, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
        return math.fma(x, y, z)

    def add(self, x: ir.Value, y: ir.Value) -> ir.Value:
        return arith.addf(x, y)

    def select(self, condition: ir.Value, x: ir.Value, y: ir.Value) -> ir.Value:
        return arith.select(condition, x, y)


ONES, HALVES, QUARTERS = 0x3F803F80, 0x3F003F00, 0x3E803E80


def expand(x: jax.Array, *, query: bool) -> jax.Array:
    """Return the packed features (64, 160) of a bf16 tile (64, 16), both in registers in the WGMMA layout."""

    @plgpu.inline_mgpu(
        arg_types=(WGMMA,), return_type=plgpu.ShapeDtypeStruct((TILE_ROWS, PACKED_DIM), jnp.bfloat16, layout=WGMMA)
    )
    def body(_, x):
        quad = _Quad()
        tiles = x.registers.reshape(2, 2)
        out = np.empty((PACKED_DIM // 8, 2), dtype=object)
        for row in range(2):
            a, b = (quad.bits(tiles[tile, row]) for tile in range(2))
            if query:
                a, b = (quad.multiply(y, quad.const(QUARTERS)) for y in (a, b))
            out[:, row] = _features(quad, a, b, query)
        registers = np.vectorize(lambda bits: mgpu.utils.bitcast(bits, quad.pair), otypes=[object])(out)
        shape = mgpu.WGMMA_LAYOUT.registers_shape((TILE_ROWS, PACKED_DIM))
        return mgpu.FragmentedArray(_registers=registers.reshape(shape), _layout=mgpu.WGMMA_LAYOUT, _is_signed=None)

    return body(x)


def _features(quad: _Quad, a: ir.Value, b: ir.Value, query: bool) -> list[ir.Value]:
    """Return the twenty registers of one row's slabs."""
    times, swap, ones = quad.multiply, quad.exchange, quad.const(ONES)
    a1, b1, a2, b2 = (quad.from_lane(y, r) for r in (1, 2) for y in (a, b))
    halved = (times(y, quad.const(HALVES)) if query else y for y in (a, b))
    squares = [times(y, half) for y, half in zip((a, b), halved, strict=True)]
    one = quad.select(quad.first, quad.const(0x3F800000), quad.const(0))
    a_inside, b_inside = (quad.first_alone(times(y, swap(y))) for y in (a, b))
    first_half = quad.first_half
    return [
        *squares,
        *(arith.ori(a_inside, one), b_inside),
        *(times(a, a1), times(b, b1)),
        *(times(a, swap(a1)), times(b, swap(b1))),
        *(times(quad.select(first_half, y, ones), y2) for y, y2 in ((a, a2), (b, b2))),
        *(times(y, quad.select(first_half, swap(y2), ones)) for y, y2 in ((a, a2), (b, b2))),
        *(times(a, y) for r in range(4) for br in [quad.from_lane(b, r)] for y in (br, swap(br))),
    ]


def pull_back(x: jax.Array, u: jax.Array) -> jax.Array:
    """Return J^T u / c (64, 16) in fp32, J the Jacobian of `expand(x, query=True)` for x (64, 16), u (64, 160) fp32.

    A lane multiplies its products' u by either factor; what belongs to components of lane t + r goes there by shuffles.
    """

    @plgpu.inline_mgpu(
        arg_types=(WGMMA, WGMMA),
        return_type=plgpu.ShapeDtypeStruct((TILE_ROWS, FEATURE_DIM), jnp.float32, layout=WGMMA),
    )
    def body(_, x, u):
        quad = _Quad()
        tiles = x.registers.reshape(2, 2)
        slabs = u.registers.reshape(PACKED_DIM // 16, 2, 2)
        out = np.empty((2, 2), dtype=object)
        for row in range(2):
            a, b = (quad.multiply(quad.bits(tiles[tile, row]), quad.const(QUARTERS)) for tile in range(2))
            out[:, row] = _gradients(quad, a, b, [[quad.halves(y) for y in slab] for slab in slabs[:, :, row]])
        shape = mgpu.WGMMA_LAYOUT.registers_shape((TILE_ROWS, FEATURE_DIM))
        return mgpu.FragmentedArray(_registers=out.reshape(shape), _layout=mgpu.WGMMA_LAYOUT, _is_signed=None)

    return body(x, u)


def _gradients(quad: _Quad, a: ir.Value, b: ir.Value, u: list) -> list[ir.Value]:
    """Return one row's two registers of J^T u / c, given c x in bf16 and u[slab][register][half] in fp32."""
    near_a, near_b = ([quad.widen(quad.from_lane(y, r)) for r in range(n)] for y, n in ((a, 3), (b, 4)))
    # to_a[r] is what this lane adds to the gradient of a^r.
    to_a, to_b = ([[quad.zero, quad.zero] for _ in range(n)] for n in (3, 4))

    def add(u, left, to_left, i, right, to_right, j):
        """Add the gradient of u times the product of left[i] and right[j]."""
        to_left[i] = quad.fma(u, right[j], to_left[i])
        to_right[j] = quad.fma(u, left[i], to_right[j])

    for register, near, to in ((0, near_a, to_a), (1, near_b, to_b)):
        add(u[1][register][0], near[0], to[0], 0, near[0], to[0], 1)
        for h in range(2):
            to[0][h] = quad.fma(u[0][register][h], near[0][h], to[0][h])
            add(u[2][register][h], near[0], to[0], h, near[1], to[1], h)
            add(u[3][register][h], near[0], to[0], h, near[1], to[1], 1 - h)
            # Lanes 2 and 3 hold linear features in slabs 4 and 5: of a^2 or b^2, and of a or b.
            own, far = (
                [quad.select(quad.first_half, y, linear) for y in ys]
                for ys, linear in ((near[0], quad.one), (near[2], quad.zero))
            )
            add(u[4][register][h], own, to[0], h, far, to[2], h)
            own, far = (
                [quad.select(quad.first_half, y, linear) for y in ys]
                for ys, linear in ((near[0], quad.zero), (near[2], quad.one))
            )
            add(u[5][register][h], own, to[0], h, far, to[2], 1 - h)
    for r in range(4):
        for h in range(2):
            add(u[6 + r][0][h], near_a[0], to_a[0], h, near_b[r], to_b[r], h)
            add(u[6 + r][1][h], near_a[0], to_a[0], h, near_b[r], to_b[r], 1 - h)
    results = []
    for to in (to_a, to_b):
        total = to[0]
        for r in range(1, len(to)):
            total = [quad.add(x, quad.from_lane_fp32(y, 4 - r)) for x, y in zip(total, to[r], strict=True)]
        results.append(quad.join(*total))
    return results
