"""Gradients of queries and keys that several heads share, as Mamba-2's C and B are (see `one_decay.py`).

Each head h has values, decays and states of its own. With dP_h = dO_h V_h^T w_h for the pairs t >= s of a chunk:

    dQ = sum_h diag(exp c_h) dO_h S_h^T + (sum_h dP_h) K
    dK = sum_h diag(exp(c_hC - c_h)) V_h dS_h'^T + (sum_h dP_h)^T Q

and dc_h is that of one head, where q . (dP_h K) and k . (dP_h^T Q) are the sums of dP_h Q K^T over rows and columns. So
K and Q are multiplied once for all heads of a program.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.triton.chunks import CHUNK_TOKENS, STRIP_WIDTH, Cut, Type, dot, launch
from pallas_kernels.triton.one_decay import along, at_last, both, decays, decays_between

MAX_HEADS_PER_PROGRAM, PROGRAM_WARPS = 8, 8
"""What a program makes of its heads XLA adds to that of others; in fewer warps its sums do not fit the registers."""


def gradients(q, k, v, c, starts, do, ends, *, scale: float) -> list[jax.Array]:
    """Return dq and dk of G groups of heads, and dc in fp32.

    Args:
      q, k: (B, T, G, K).
      v, do: (B, T, H, V).
      c: (B, T, H) fp32, sums of log-decays since the beginning of the chunk.
      starts, ends: (B, H, chunks, K, V), the states before every chunk and the gradients of those after it.
    """
    groups, plan = k.shape[2], _Plan.of(k, v)

    def body(c_ref, v_ref, do_ref, q_ref, k_ref, starts_ref, ends_ref, dq_ref, dk_ref, dc_ref):
        products = dot(q_ref[...], k_ref[...], (1, 1))

        def head(h, sums):
            (pairs, read, written), kept = plan.over_strips(h, v_ref, do_ref, starts_ref, ends_ref)
            q, k, c = q_ref[...], k_ref[...], c_ref[:, h]
            since, until, all_of_it = decays(c)
            pairs, read, written = scale * pairs * decays_between(c, lax.ge), scale * since * read, until * written
            weighed, of_end = pairs * products, along(written, k)
            of_pairs = jnp.sum(weighed, axis=1) - jnp.sum(weighed, axis=0)
            dc_ref[:, h] = along(read, q) + of_pairs - of_end + at_last(jnp.sum(of_end) + all_of_it * kept)
            return [total + x for total, x in zip(sums, (pairs, read, written), strict=True)]

        pairs, dq, dk = lax.fori_loop(0, plan.heads, head, plan.zeros())
        pairs = pairs.astype(q_ref.dtype)
        dq_ref[...] = (dq + dot(pairs, k_ref[...])).astype(dq_ref.dtype)
        dk_ref[...] = (dk + dot(pairs, q_ref[...], (0, 0))).astype(dk_ref.dtype)

    dq, dk, dc = plan.run(body, [c, v, do, q, k, starts, ends], groups)
    dq, dk = (_sum_over_programs(x, groups) for x in (dq, dk))
    return [dq, dk, dc.sum(3)]


def _sum_over_programs(x, groups: int) -> jax.Array:
    """Return the sums (B, T, G, K) of what the programs of each group have made."""
    return x.astype(jnp.float32).reshape(*x.shape[:2], groups, -1, x.shape[3]).sum(3).astype(x.dtype)


class _Plan(NamedTuple):
    """The sizes of a call, and how many heads of a group a program takes, for a chunk and a piece of its channels."""

    cut: Cut
    heads: int

    @classmethod
    def of(cls, k, v) -> "_Plan":
        cut = Cut.of(k, v)
        return cls(cut, math.gcd(cut.heads // k.shape[2], MAX_HEADS_PER_PROGRAM))

    def zeros(self) -> list[jax.Array]:
        """Return those of a chunk's pairs, and of what is read from and written to a state."""
        return [jnp.zeros((CHUNK_TOKENS, size), jnp.float32) for size in (CHUNK_TOKENS, self.cut.piece, self.cut.piece)]

    def over_strips(self, h, v_ref, do_ref, starts_ref, ends_ref) -> tuple[list[jax.Array], jax.Array]:
        """Return dO V^T, dO S^T, V dS^T and S . dS of a program's head h."""

        def strip(n, sums):
            columns = pl.ds(n * STRIP_WIDTH, STRIP_WIDTH)
            v, do = (ref[:, h, columns] for ref in (v_ref, do_ref))
            S, dS = (ref[h, :, columns] for ref in (starts_ref, ends_ref))
            totals, kept = sums
            found = dot(do, v, (1, 1)), dot(do, S, (1, 1)), dot(v, dS, (1, 1))
            return [total + x for total, x in zip(totals, found, strict=True)], kept + both(S, dS)

        zeros, strips = (self.zeros(), jnp.float32(0)), self.cut.values // STRIP_WIDTH
        return lax.fori_loop(0, strips, strip, zeros) if strips > 1 else strip(0, zeros)

    def run(self, body, arguments, groups: int) -> list[jax.Array]:
        """Return dq and dk of each program's heads, (B, T, H / heads, K), and dc of each piece, (B, T, H, pieces)."""
        cut, parts, pieces = self.cut, self.cut.heads // self.heads, self.cut.keys // self.cut.piece

        def spec(place: Callable, *block: int | None) -> pl.BlockSpec:
            def at(b, i):
                piece, part = lax.rem(i, jnp.int32(pieces)), lax.rem(lax.div(i, jnp.int32(pieces)), jnp.int32(parts))
                return b, *place(lax.div(i, jnp.int32(pieces * parts)), part, piece)

            return pl.BlockSpec((None, *block), at)

        def group(part):
            return lax.div(part, jnp.int32(parts // groups))

        numbers = spec(lambda chunk, part, _: (chunk, part), CHUNK_TOKENS, self.heads)
        values = spec(lambda chunk, part, _: (chunk, part, 0), CHUNK_TOKENS, self.heads, cut.values)
        keys = spec(lambda chunk, part, piece: (chunk, group(part), piece), CHUNK_TOKENS, None, cut.piece)
        states = spec(lambda chunk, part, piece: (part, chunk, piece, 0), self.heads, None, cut.piece, cut.values)
        made = spec(lambda chunk, part, piece: (chunk, part, piece), CHUNK_TOKENS, None, cut.piece)
        sums = spec(lambda chunk, part, piece: (chunk, part, piece), CHUNK_TOKENS, self.heads, None)
        grid = cut.batch, cut.chunks * parts * pieces
        results = [Type((cut.batch, cut.time, parts, cut.keys), arguments[3].dtype)] * 2 + [cut.sums_of_pieces()]
        inputs, outputs = [numbers, values, values, keys, keys, states, states], [made, made, sums]
        return launch(body, "shared_keys_gradients", PROGRAM_WARPS, 1, grid, arguments, results, inputs, outputs)
