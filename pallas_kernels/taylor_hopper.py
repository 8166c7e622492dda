"""Taylor linear attention on Hopper: the forward pass and the sums of pieces of a sequence (see `ops/taylor.py`).

One block takes one head of one piece of a sequence, chunk by chunk of 64 tokens. Its first warpgroup keeps the state
in registers, S^T (V, 160) of packed features (`taylor_packing.py`), and publishes it in bf16 before it adds a chunk.
The two others take turns with the chunks: scores straight from q k^T inside the chunk, phi(q) S for what lies before.

The normaliser needs no features: sum_j p_ij over earlier tokens is the quadratic form of [q, 1] with the Gram matrix
of [k, 1], which is kept in fp32 and read as the sum of two bf16 matrices. z is fp32 throughout.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic
from pallas_kernels.mosaic import TILE
from pallas_kernels.taylor_packing import FEATURE_DIM, PACKED_DIM, SCALE, expand

C = TILE
GRAM_DIM = 32
STAGES = 6
"""Chunks in flight; even, so that a slot always meets the same output warpgroup and its phases stay in step."""
AHEAD = STAGES - 2
"""Chunks fetched before they are added: the slots of the last two may still be read."""


class _State:
    """What a warpgroup needs to add chunks of keys and values to S^T and to the Gram matrix of [k, 1]."""

    def __init__(self, k_tile, v_tile, phi_tile, keys_tile, filled):
        self.k_tile, self.v_tile, self.phi_tile, self.keys_tile, self.filled = (
            k_tile,
            v_tile,
            phi_tile,
            keys_tile,
            filled,
        )

    @staticmethod
    def scratch(value_dim: int, arrivals: int) -> list:
        """Return the shared memory of the constructor's arguments; `arrivals` copies fill a slot."""
        return [
            mosaic.swizzled((STAGES, C, FEATURE_DIM)),
            mosaic.swizzled((STAGES, C, value_dim)),
            mosaic.swizzled((2, C, PACKED_DIM)),
            mosaic.swizzled((2, C, C)),
            plgpu.Barrier(num_arrivals=arrivals, num_barriers=STAGES),
        ]

    def empty(self):
        """Return zero sums in registers."""
        return mosaic.zeros((self.v_tile.shape[2], PACKED_DIM)), mosaic.zeros((C, GRAM_DIM))

    def begin(self) -> None:
        """Write the column of ones beside the keys, and the first chunk."""
        ones = jnp.where(mosaic.iota((C, C), 1) == FEATURE_DIM, 1.0, 0.0)
        for turn in range(2):
            self.keys_tile.at[turn][...] = ones.astype(self.keys_tile.dtype)
        self._write(0)

    def _write(self, n) -> None:
        slot, turn = lax.rem(n, STAGES), lax.rem(n, 2)
        plgpu.barrier_wait(self.filled.at[slot])
        keys = mosaic.load(self.k_tile.at[slot])
        self.keys_tile.at[turn, :, pl.ds(0, FEATURE_DIM)][...] = keys
        self.phi_tile.at[turn][...] = expand(keys, query=False)

    def add(self, n, count, carry, fetch):
        """Return the sums with chunk n, which is committed; under its products fetch and expand what follows."""

        def issue(accumulators):
            state, gram = accumulators
            slot, turn = lax.rem(n, STAGES), lax.rem(n, 2)
            keys = self.keys_tile.at[turn]
            plgpu.wgmma(state, self.v_tile.at[slot].T, self.phi_tile.at[turn])
            plgpu.wgmma(gram, keys.T, keys.at[:, pl.ds(0, GRAM_DIM)])
            pl.when(n + AHEAD < count)(lambda: fetch(n + AHEAD))
            pl.when(n + 1 < count)(lambda: self._write(n + 1))

        return lax.optimization_barrier(pl.run_state(issue)(tuple(map(plgpu.ACC.init, carry))))


def forward(q, k, v, state=None, gram=None, *, pieces: int):
    """Return o (B, T, H, V) and z (B, H, T rounded up to 64).

    q and k are (B, T, H, 16), v is (B, T, H, 64), all bf16, T >= 64. `state` (B H pieces, 64, 160) and `gram`
    (B H pieces, 64, 32) are what each piece starts from, fp32, as `sums` returns them; without them `pieces` is 1.
    Tokens past T are read as zeros and not written.
    """
    batch, time, heads, value_dim = v.shape
    chunks = pl.cdiv(time, C)
    dtype = v.dtype

    given = () if state is None else (state, gram)

    def body(q_ref, k_ref, v_ref, *rest):
        initial_refs, (o_ref, z_ref, *scratch) = rest[: len(given)], rest[len(given) :]
        k_tile, v_tile, filled = scratch[0], scratch[1], scratch[4]
        q_tile, ones_tile, state_tile, gram_tile, o_tile, z_tile, ready, free, started = scratch[5:]
        group = lax.axis_index("warpgroup")
        block = lax.axis_index("block")
        row, head, begin, count = _place(block, heads, chunks, pieces)

        def fetch(n):
            slot = lax.rem(n, STAGES)
            tokens = pl.ds((begin + n) * C, C)
            for source, tile in ((k_ref, k_tile), (v_ref, v_tile), (q_ref, q_tile)):
                plgpu.copy_gmem_to_smem(source.at[row, tokens, head], tile.at[slot], filled.at[slot])

        @pl.when(group == 0)
        def keep_state():
            sums = _State(*scratch[:5])
            for n in range(AHEAD):
                pl.when(n < count)(functools.partial(fetch, n))
            weights = _gram_weights()

            def step(n, carry):
                state, gram = carry
                turn = lax.rem(n, 2)
                pl.when(n >= 2)(lambda: plgpu.barrier_wait(free.at[turn]))
                state_tile.at[turn][...] = state.astype(dtype)
                weighted = gram * weights
                high = weighted.astype(dtype)
                gram_tile.at[turn, 0][...] = high
                gram_tile.at[turn, 1][...] = (weighted - high.astype(jnp.float32)).astype(dtype)
                plgpu.commit_smem()
                plgpu.barrier_arrive(ready.at[turn])
                return sums.add(n, count, carry, fetch)

            sums.begin()
            if given:
                carry = tuple(plgpu.load(ref.at[block], layout=mosaic.WGMMA, optimized=False) for ref in initial_refs)
            else:
                carry = sums.empty()
            lax.fori_loop(0, count, step, carry)

        @pl.when(group > 0)
        def write_outputs():
            mine = group - 1
            first = jnp.where(mosaic.iota((C, FEATURE_DIM), 1) == 0, 1.0, 0.0)
            pl.when(mine == 0)(lambda: ones_tile.__setitem__(..., first.astype(dtype)))
            plgpu.commit_smem()
            plgpu.barrier_arrive(started)
            plgpu.barrier_wait(started)
            causal = mosaic.iota((C, C), 0) >= mosaic.iota((C, C), 1)

            def step(i, _):
                n = 2 * i + mine
                slot = lax.rem(n, STAGES)
                plgpu.barrier_wait(filled.at[slot])
                queries = q_tile.at[slot]

                def scores(accumulator):
                    plgpu.wgmma(accumulator, queries, k_tile.at[slot].T)
                    x = mosaic.load(queries)
                    return x, expand(x, query=True), accumulator[...]

                x, phi, s = lax.optimization_barrier(pl.run_scoped(scores, plgpu.ACC((C, C), jnp.float32)))
                plgpu.barrier_wait(ready.at[mine])

                def read(form, o):
                    for tile, start in ((queries, 0), (ones_tile, FEATURE_DIM)):
                        for part in range(2):
                            plgpu.wgmma(form, tile, gram_tile.at[mine, part, pl.ds(start, FEATURE_DIM)])
                    for e, width in ((0, 64), (64, 64), (128, 32)):
                        plgpu.wgmma(o, phi[:, e : e + width], state_tile.at[mine, :, pl.ds(e, width)].T)
                    p = jnp.where(causal, 1.0 + s * (SCALE + s * (0.5 * SCALE * SCALE)), 0.0)
                    plgpu.wgmma(o, p.astype(dtype), v_tile.at[slot])
                    return p.sum(axis=1), form[...], o[...]

                z, form, o = lax.optimization_barrier(
                    pl.run_scoped(read, plgpu.ACC((C, GRAM_DIM), jnp.float32), plgpu.ACC((C, value_dim), jnp.float32))
                )
                z = z + (form[:, :FEATURE_DIM] * x.astype(jnp.float32)).sum(axis=1)
                z = z + (form[:, FEATURE_DIM:] * first).sum(axis=1)
                plgpu.barrier_arrive(free.at[mine])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                o_tile.at[mine][...] = (o * mosaic.across(1.0 / z, o.shape)).astype(dtype)
                z_tile.at[mine][...] = z
                plgpu.commit_smem()
                tokens = pl.ds((begin + n) * C, C)
                plgpu.copy_smem_to_gmem(o_tile.at[mine], o_ref.at[row, tokens, head])
                plgpu.copy_smem_to_gmem(z_tile.at[mine], z_ref.at[row, head, tokens])

            lax.fori_loop(0, lax.div(count + 1 - mine, 2), step, None)
            plgpu.wait_smem_to_gmem(0)

    out_type = [
        jax.ShapeDtypeStruct(v.shape, dtype),
        jax.ShapeDtypeStruct((batch, heads, chunks * C), jnp.float32),
    ]
    scratch = [
        *_State.scratch(value_dim, arrivals=3),
        mosaic.swizzled((STAGES, C, FEATURE_DIM)),
        mosaic.swizzled((C, FEATURE_DIM)),
        mosaic.swizzled((2, value_dim, PACKED_DIM)),
        mosaic.swizzled((2, 2, C, GRAM_DIM)),
        mosaic.swizzled((2, C, value_dim)),
        plgpu.SMEM((2, C), jnp.float32),
        plgpu.Barrier(num_arrivals=1, num_barriers=2),
        plgpu.Barrier(num_arrivals=1, num_barriers=2),
        plgpu.Barrier(num_arrivals=2),
    ]
    return plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=scratch,
        grid=(batch * heads * pieces,),
        grid_names=("block",),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        kernel_name="taylor_forward",
    )(q, k, v, *given)


def sums(k, v, *, pieces: int):
    """Return what each piece adds to S^T (B H pieces, 64, 160) and to the Gram matrix (B H pieces, 64, 32), fp32.

    The Gram matrix is that of [k, 1, 0...]: rows and columns 0 to 16 of it are not zero. Its last entry counts tokens,
    those that fill up the last chunk included.
    """
    batch, time, heads, value_dim = v.shape
    chunks = pl.cdiv(time, C)

    def body(k_ref, v_ref, state_ref, gram_ref, *scratch):
        k_tile, v_tile, filled = scratch[0], scratch[1], scratch[4]
        sums = _State(*scratch)
        block = lax.axis_index("block")
        row, head, begin, count = _place(block, heads, chunks, pieces)

        def fetch(n):
            slot = lax.rem(n, STAGES)
            for source, tile in ((k_ref, k_tile), (v_ref, v_tile)):
                plgpu.copy_gmem_to_smem(source.at[row, pl.ds((begin + n) * C, C), head], tile.at[slot], filled.at[slot])

        def step(n, carry):
            plgpu.commit_smem()
            return sums.add(n, count, carry, fetch)

        for n in range(AHEAD):
            pl.when(n < count)(functools.partial(fetch, n))
        sums.begin()
        state, gram = lax.fori_loop(0, count, step, sums.empty())
        state_ref.at[block][...] = state
        gram_ref.at[block][...] = gram

    blocks = batch * heads * pieces
    return plgpu.kernel(
        body,
        out_type=[
            jax.ShapeDtypeStruct((blocks, value_dim, PACKED_DIM), jnp.float32),
            jax.ShapeDtypeStruct((blocks, C, GRAM_DIM), jnp.float32),
        ],
        scratch_types=_State.scratch(value_dim, arrivals=2),
        grid=(blocks,),
        grid_names=("block",),
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        kernel_name="taylor_sums",
    )(k, v)


def _place(block, heads: int, chunks: int, pieces: int):
    """Return a block's batch row, head, first chunk and number of chunks."""
    piece = lax.rem(block, pieces)
    begin = lax.div(piece * chunks, pieces)
    count = lax.div((piece + 1) * chunks, pieces) - begin
    return lax.div(block, pieces * heads), lax.rem(lax.div(block, pieces), heads), begin, count


def _gram_weights():
    """Return the factors (64, 32) that turn the Gram matrix of [k, 1] into the form of p = 1 + s + s^2/2."""
    rows, columns = (mosaic.iota((C, GRAM_DIM), d) for d in range(2))
    product = jnp.where(columns < FEATURE_DIM, 0.5 * SCALE * SCALE, SCALE)
    last = jnp.where(columns < FEATURE_DIM, 0.0, 1.0)
    return jnp.where(rows < FEATURE_DIM, product, last)
