"""Matrix states with one decay a head, by chunks on tensor cores, in Pallas' Triton kernels (see `ops/one_decay.py`).

JAX 0.11 calls Pallas' Triton backend deprecated; where it is gone, `ops/one_decay.py` refuses.

With the state S before a chunk of C tokens, c_t the sum of its log-decays up to token t, and w_ts = exp(c_t - c_s):

    O = scale (P U + diag(exp c) Q S)                 P_ts = (q_t . k_s) w_ts, s <= t
    S' = exp(c_C) S + (diag(exp(c_C - c)) K)^T U

where U are the values V of gated linear attention, or what the delta rule makes of them (arXiv 2406.06484, section
3.2; 2412.06464, section 3.3):

    U = T diag(beta) (V - diag(exp c) K S)            T = (I + L)^-1       L_ts = beta_t (k_t . k_s) w_ts, s < t

`inverses` solves every chunk's T, `forward` walks over the chunks with S in registers, `reverse` walks back with the
gradient of S, and `gradients` takes those of all tokens, again each chunk for itself:

    dU = P^T dO + diag(exp(c_C - c)) K dS'            dP = dO U^T
    dS = exp(c_C) dS' + (diag(exp c) Q)^T dO          and, for the delta rule, - (diag(exp c) K)^T dV
    Y = T^T dU       dV = diag(beta) Y       dL = -Y U^T

Arrays are (B, T, H, .), T a multiple of `CHUNK`, K a power of two from 16 to 128, V a multiple of `WIDTH`: a program of
`forward` and `reverse` takes so many columns of a state. Products are of q's dtype with fp32 sums, T's in TF32 x 3.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

Type = jax.ShapeDtypeStruct

CHUNK, BLOCK, WIDTH = 64, 16, 64
STRIP_WARPS = 4
NEVER = -1e30
EXACT: Any = lax.DotAlgorithmPreset.TF32_TF32_F32_X3


def inverses(k, c, beta) -> jax.Array:
    """Return T of every chunk, (B, T, H, CHUNK) in k's dtype, its rows where their tokens are.

    By forward substitution over blocks of 16 tokens; in those on the diagonal over halves of 2, 4, 8 and 16.
    """

    def body(k_ref, c_ref, beta_ref, t_ref):
        at = [pl.ds(i * BLOCK, BLOCK) for i in range(CHUNK // BLOCK)]
        ks, cs, betas = ([ref[block] for block in at] for ref in (k_ref, c_ref, beta_ref))
        row, column = _places(BLOCK)

        def lower(i, j):
            decay = _decay(cs[i], cs[j], row > column if i == j else None)
            return betas[i][:, None] * _dot(ks[i], ks[j], (1, 1)) * decay

        found = {}
        for i, rows in enumerate(at):
            *left, near = (lower(i, j) for j in range(i + 1))
            inverse = jnp.where(row == column, 1.0, 0.0)
            for half in (1, 2, 4, 8):
                below = jnp.where((row // half % 2 == 1) & (column // half == row // half - 1), near, 0.0)
                inverse = inverse - (below if half == 1 else _exact(_exact(inverse, below), inverse))
            found[i, i] = inverse
            for j in range(i):
                right = sum(_exact(left[n], found[n, j]) for n in range(j, i))
                found[i, j] = -_exact(inverse, right)
            for j, columns in enumerate(at):
                t_ref[rows, columns] = found.get((i, j), jnp.zeros_like(inverse)).astype(t_ref.dtype)

    [t] = Cut.of(k, k).by_chunk(body, "inverses", 1, [k, c, beta], [Type((*k.shape[:3], CHUNK), k.dtype)])
    return t


class Delta(NamedTuple):
    """What the delta rule takes beside the rest: rates (B, T, H) in fp32, and `inverses`."""

    beta: jax.Array
    t: jax.Array


def forward(q, k, v, c, state, delta: Delta | tuple[()] = (), *, scale: float, with_starts: bool) -> list[jax.Array]:
    """Return o like v, the state after the last token and, where asked for, those before every chunk.

    Args:
      q, k: (B, T, H, K).
      v: (B, T, H, V) in their dtype.
      c: (B, T, H) fp32, sums of log-decays since the beginning of the chunk.
      state: (B, H, K, V) fp32.
    """
    cut = Cut.of(k, v)

    def body(q_ref, k_ref, c_ref, *refs):
        delta_refs, (v_ref, state_ref, o_ref, last_ref, *starts_refs) = refs[: len(delta)], refs[len(delta) :]

        def step(n, S):
            here = pl.ds(n * CHUNK, CHUNK)
            q, k, c, u = q_ref[here], k_ref[here], c_ref[here], v_ref[here]
            for ref in starts_refs:
                ref[n] = S.astype(ref.dtype)
            before, (since, until, all_of_it) = S.astype(q.dtype), _decays(c)
            if delta_refs:
                beta_ref, t_ref = delta_refs
                right = beta_ref[here][:, None] * (u.astype(jnp.float32) - since * _dot(k, before))
                u = _dot(t_ref[here], right.astype(q.dtype)).astype(q.dtype)
            p = (_dot(q, k, (1, 1)) * _decay(c, c, _pairs(CHUNK, lax.ge))).astype(q.dtype)
            o_ref[here] = (scale * (_dot(p, u) + since * _dot(q, before))).astype(o_ref.dtype)
            return all_of_it * S + _dot(k, _times(until, u), (0, 0))

        last_ref[...] = lax.fori_loop(0, cut.chunks, step, state_ref[...])

    states = [Type(state.shape, jnp.float32), *[cut.states(v.dtype)] * with_starts]
    return cut.by_strip(body, "forward", [q, k, c, *delta], [v], [state], [Type(v.shape, v.dtype)], states)


def reverse(q, k, c, do, dlast, delta: Delta | tuple[()] = (), *, scale: float) -> list[jax.Array]:
    """Return dU, or Y for the delta rule, the gradients of the states after every chunk, and of that before the first.

    The first is like do.
    """
    cut = Cut.of(k, do)

    def body(q_ref, k_ref, c_ref, *refs):
        delta_refs, (do_ref, dlast_ref, y_ref, ends_ref, dstate_ref) = refs[: len(delta)], refs[len(delta) :]

        def step(back, dS):
            n = cut.chunks - 1 - back
            here = pl.ds(n * CHUNK, CHUNK)
            q, k, c = q_ref[here], k_ref[here], c_ref[here]
            after, (since, until, all_of_it) = dS.astype(q.dtype), _decays(c)
            ends_ref[n] = after
            do = _times(scale, do_ref[here])
            p = (_dot(k, q, (1, 1)) * _decay(-c, -c, _pairs(CHUNK, lax.le))).astype(q.dtype)  # transposed
            y = _dot(p, do) + until * _dot(k, after)
            dS = all_of_it * dS + _dot(q, _times(since, do), (0, 0))
            if delta_refs:
                beta_ref, t_ref = delta_refs
                y = _dot(t_ref[here], y.astype(q.dtype), (0, 0))
                dS = dS - _dot(k, (since * beta_ref[here][:, None] * y).astype(q.dtype), (0, 0))
            y_ref[here] = y.astype(y_ref.dtype)
            return dS

        dstate_ref[...] = lax.fori_loop(0, cut.chunks, step, dlast_ref[...])

    states = [cut.states(do.dtype), Type(dlast.shape, jnp.float32)]
    return cut.by_strip(body, "reverse", [q, k, c, *delta], [do], [dlast], [Type(do.shape, do.dtype)], states)


def gradients(q, k, v, c, starts, do, y, ends, delta: Delta | tuple[()] = (), *, scale: float) -> list[jax.Array]:
    """Return dq, dk, dc in fp32 and, for the delta rule, dv, and dbeta in fp32.

    Args:
      starts: of `forward`.
      y, ends: of `reverse`.
    """

    def body(q_ref, k_ref, v_ref, c_ref, starts_ref, do_ref, y_ref, ends_ref, *refs):
        delta_refs, (dq_ref, dk_ref, dc_ref, *delta_results) = refs[: len(delta)], refs[len(delta) :]
        k, c = k_ref[...], c_ref[...]
        since, until, all_of_it = _decays(c)

        def strip(n, sums):
            (dp, dq, dk, kept), corrections = sums
            columns = pl.ds(n * WIDTH, WIDTH)
            S, dS, u = starts_ref[:, columns], ends_ref[:, columns], v_ref[:, columns]
            if delta_refs:
                beta, y = delta_refs[0][...][:, None], y_ref[:, columns]
                dl, dbeta, lost = corrections
                read = since * _dot(k, S)
                error = u.astype(jnp.float32) - read
                u = _dot(delta_refs[1][...], (beta * error).astype(k.dtype)).astype(k.dtype)
                dv = beta * y.astype(jnp.float32)
                delta_results[0][:, columns] = dv.astype(v_ref.dtype)
                dk = dk - since * _dot(dv.astype(k.dtype), S, (1, 1))
                dbeta = dbeta + jnp.sum(y.astype(jnp.float32) * error, axis=1)
                corrections = dl - _dot(y, u, (1, 1)), dbeta, lost + jnp.sum(dv * read, axis=1)
            dk = dk + until * _dot(u, dS, (1, 1))
            do = _times(scale, do_ref[:, columns])
            kept = kept + jnp.sum(S.astype(jnp.float32) * dS.astype(jnp.float32))
            return (dp + _dot(do, u, (1, 1)), dq + _dot(do, S, (1, 1)), dk, kept), corrections

        square, vector = jnp.zeros((CHUNK, CHUNK), jnp.float32), jnp.zeros(CHUNK, jnp.float32)
        none = square, jnp.zeros(k.shape, jnp.float32), jnp.zeros(k.shape, jnp.float32), jnp.float32(0)
        zeros = none, (square, vector, vector) if delta_refs else ()
        (dp, dq, dk, kept), corrections = lax.fori_loop(0, v_ref.shape[1] // WIDTH, strip, zeros)

        q, dq = q_ref[...], since * dq  # loaded only here, for the registers
        leaving = jnp.sum(dk * k.astype(jnp.float32), axis=1)
        if delta_refs:
            dl, dbeta, lost = corrections
            leaving = leaving + lost
        dc = jnp.sum(dq * q.astype(jnp.float32), axis=1) - leaving
        dp = dp * _decay(c, c, _pairs(CHUNK, lax.ge))
        moved = dp * _dot(q, k, (1, 1))
        dp = dp.astype(q.dtype)
        dq_ref[...] = (dq + _dot(dp, k)).astype(dq_ref.dtype)
        dk = dk + _dot(dp, q, (0, 0))
        if delta_refs:
            dl, like = dl * _decay(c, c, _pairs(CHUNK, lax.gt)), _dot(k, k, (1, 1))
            delta_results[1][...] = dbeta + jnp.sum(dl * like, axis=1)
            dl = delta_refs[0][...][:, None] * dl
            moved, dc = moved + dl * like, dc - lost
            dl = dl.astype(q.dtype)
            dk = dk + _dot(dl, k) + _dot(dl, k, (0, 0))
        dk_ref[...] = dk.astype(dk_ref.dtype)
        whole = jnp.sum(leaving) + all_of_it * kept
        dc_ref[...] = dc + jnp.sum(moved, axis=1) - jnp.sum(moved, axis=0) + jnp.where(_is_last(), whole, 0.0)

    cut, arguments = Cut.of(k, v), [q, k, v, c, starts, do, y, ends, *delta]
    results = [Type(x.shape, x.dtype) for x in (q, k, c, *((v, c) if delta else ()))]
    return cut.by_chunk(body, "gradients", 8 if cut.keys > 64 else 4, arguments, results)  # more keep all in registers


class Cut(NamedTuple):
    """B, T, H, K and V of a call, and the blocks of its arrays that a program is given."""

    batch: int
    time: int
    heads: int
    keys: int
    values: int

    @classmethod
    def of(cls, k, v) -> "Cut":
        """Return that of (B, T, H, K) keys and (B, T, H, V) values."""
        batch, time, heads, keys = k.shape
        return cls(batch, time, heads, keys, v.shape[-1])

    @property
    def chunks(self) -> int:
        """Of a sequence."""
        return self.time // CHUNK

    def states(self, dtype) -> Type:
        """Return the type of a state for every chunk."""
        return Type((self.batch, self.heads, self.chunks, self.keys, self.values), dtype)

    def by_chunk(
        self, body: Callable, name: str, warps: int, arguments: Sequence, results: Sequence[Type]
    ) -> list[jax.Array]:
        """Run a program for each chunk of each head, with that chunk of (B, T, H, ...) or (B, H, chunks, K, V)."""

        def head(i):
            return lax.div(i, jnp.int32(self.chunks))

        def chunk(i):
            return lax.rem(i, jnp.int32(self.chunks))

        def block(x) -> pl.BlockSpec:
            if len(x.shape) == 5:
                return _block((None, None, None, *x.shape[3:]), lambda b, i: (b, head(i), chunk(i)))
            return _block((None, CHUNK, None, *x.shape[3:]), lambda b, i: (b, chunk(i), head(i)))

        blocks = [*map(block, arguments)], [*map(block, results)]
        return _call(body, name, warps, (self.batch, self.heads * self.chunks), arguments, results, *blocks)

    def by_strip(
        self, body: Callable, name: str, whole: Sequence, wide: Sequence, states: Sequence, *results: Sequence[Type]
    ) -> list[jax.Array]:
        """Run a program for each strip of `WIDTH` columns of each head's states.

        Args:
          whole: (B, T, H, ...), of which a program gets all tokens of its head.
          wide: (B, T, H, V), of which it gets its columns of them.
          states: (B, H, K, V) or (B, H, chunks, K, V), likewise.
          results: types like the wide arrays, then types like states.
        """
        strips = self.values // WIDTH

        def head(i):
            return lax.div(i, jnp.int32(strips))

        def strip(i):
            return lax.rem(i, jnp.int32(strips))

        def of_whole(x) -> pl.BlockSpec:
            return _block((None, self.time, None, *x.shape[3:]), lambda b, i: (b, 0, head(i)))

        def of_wide(x) -> pl.BlockSpec:
            return pl.BlockSpec((None, self.time, None, WIDTH), lambda b, i: (b, 0, head(i), strip(i)))

        def of_states(x) -> pl.BlockSpec:
            kept = x.shape[2:-1]
            zeros = (0,) * len(kept)
            return pl.BlockSpec((None, None, *kept, WIDTH), lambda b, i: (b, head(i), *zeros, strip(i)))

        made, made_states = results
        inputs = [*map(of_whole, whole), *map(of_wide, wide), *map(of_states, states)]
        outputs = [*map(of_wide, made), *map(of_states, made_states)]
        grid = self.batch, self.heads * strips
        return _call(body, name, STRIP_WARPS, grid, [*whole, *wide, *states], [*made, *made_states], inputs, outputs)


def _block(shape: tuple, place: Callable) -> pl.BlockSpec:
    """Return the block at a place of the first dimensions, and all of the others."""
    return pl.BlockSpec(shape, lambda *at: (*place(*at), *(0,) * (len(shape) - 3)))


def _call(body, name, warps, grid, arguments, results, inputs, outputs) -> list[jax.Array]:
    axes = jax.typeof(arguments[0]).manual_axis_type  # of `jax.shard_map`; all arguments vary alike
    results = [Type(x.shape, x.dtype, manual_axis_type=axes) for x in results]
    return pl.pallas_call(
        body,
        grid=grid,
        in_specs=inputs,
        out_specs=outputs,
        out_shape=results,
        compiler_params=triton.CompilerParams(num_warps=warps, num_stages=1),
        name=f"one_decay_{name}",
    )(*arguments)


def _dot(a, b, contracted: tuple[int, int] = (1, 0), precision=None) -> jax.Array:
    """Return the fp32 product over one dimension of each."""
    a_dimension, b_dimension = contracted
    dimensions = ((a_dimension,), (b_dimension,)), ((), ())
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def _exact(a, b) -> jax.Array:
    return _dot(a, b, precision=EXACT)


def _times(factor, x) -> jax.Array:
    """Return the product in x's dtype.

    Factors go to the operand that is not transposed in a product: what is transposed but was not loaded so, Triton has
    multiplied wrongly on Hopper GPUs (triton-lang/triton#6124). `gradients` cannot avoid it.
    """
    return (factor * x.astype(jnp.float32)).astype(x.dtype)


def _places(size: int) -> list[jax.Array]:
    """Return the row and the column of every element of a square."""
    return [lax.broadcasted_iota(jnp.int32, (size, size), dimension) for dimension in range(2)]


def _pairs(size: int, compare: Callable) -> jax.Array:
    """Return which pairs of a row and a column compare so."""
    return compare(*_places(size))


def _decay(seen, until, pairs=None) -> jax.Array:
    """Return exp(seen_t - until_s) of pairs of tokens, 0 of the others."""
    difference = seen[:, None] - until[None, :]
    return jnp.exp(difference if pairs is None else jnp.where(pairs, difference, NEVER))


def _decays(c) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return what each token sees of the state before the chunk, what is left of each at its end, and of that state."""
    whole = jnp.sum(jnp.where(_is_last(), c, 0.0))
    return jnp.exp(c)[:, None], jnp.exp(whole - c)[:, None], jnp.exp(whole)


def _is_last() -> jax.Array:
    return lax.iota(jnp.int32, CHUNK) == CHUNK - 1
