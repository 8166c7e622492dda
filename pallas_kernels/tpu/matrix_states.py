"""Matrix states that decay, by chunks of tokens on matrix units: gated linear attention, delta rule, low rank forms.

With the state S before a chunk of C tokens, and c_t the sum of its log-decays up to token t, one a head or one a
channel of keys (arXiv 2312.06635, section 4; 2406.06484, section 3.2; 2510.26692, section 3):

    O = scale (P U + Q S)         P_ts = sum_i q_ti k_si exp(c_ti - c_si), s <= t         Q_t = exp(c_t) q_t
    S' = exp(c_C) S + K^T U       K_t = exp(c_C - c_t) k_t

where U are the values V of gated linear attention. Those of the delta rule are what is left of V when a key has read
the state and the tokens before, as far as its rate goes, with P of k in the place of q, and without a token's own pair:

    (I + diag(beta) L) U = diag(beta) (V - A S)           L_ts = sum_i k_ti k_si exp(c_ti - c_si), s < t
                                                          A_t = exp(c_t) k_t

What a transition of diagonal plus low rank writes beside V, under keys b, is what its keys a read of the state before
each token (arXiv 2503.14456, section 4), with M of b as N is of k:

    (I - M) U = N V + A S          N_ts = sum_i a_ti k_si exp(c_(t-1)i - c_si), s < t          A_t = exp(c_(t-1)) a_t

`forward` walks over the chunks with S in VMEM. `reverse` walks back with its gradient: it makes each chunk anew from
the state before it, and JAX the gradients of that. No exponent is above 0, and none is a difference of sums
(`decays.py`). A state lies with V on sublanes and K on lanes, where decays of channels are.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import split
from pallas_kernels.tpu import decays
from pallas_kernels.tpu.inverses import solve
from pallas_kernels.tpu.products import columns, product

MAX_CHUNK_TOKENS, MIN_CHUNK_TOKENS = 128, 16
MAX_HEADS, MAX_HEADS_BY_CHANNEL = 4, 2
"""Of a program, whose work is unrolled for the scheduler to interleave, of states of `UNIT_STATE` elements: more of
them take fewer bundles a head, and longer to compile."""
UNIT_STATE, FP32_UNITS = 128 * 128, 3
VMEM_BYTES = 60 << 20


class Tokens(NamedTuple):
    """What tokens bring. A number a head lies with tokens on lanes, as projections can write it.

    Attributes:
      q, k: (B, H, T, K) bf16 or fp32.
      v: (B, H, T, V) in their dtype.
      log_decay: at most 0, fp32: (B, H, T, K), or (B, H, 1, T) where a head has one.
      beta: (B, H, 1, T) fp32, the rates of the delta rule, or None.
      a, b: like k, what each token reads of the state before it, and where it writes that to, or None; log-decays are
        of channels then.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    log_decay: jax.Array
    beta: jax.Array | None = None
    a: jax.Array | None = None
    b: jax.Array | None = None


class Plan(NamedTuple):
    """How the work on heads of all rows is cut."""

    batch: int
    heads: int
    time: int
    keys: int
    values: int
    dtype: jnp.dtype
    by_channel: bool

    @classmethod
    def of(cls, tokens: Tokens) -> "Plan":
        """Return that of these tokens."""
        (batch, heads, time, keys), values = tokens.k.shape, tokens.v.shape[3]
        by_channel = tokens.log_decay.shape == tokens.k.shape
        return cls(batch, heads, time, keys, values, tokens.v.dtype, by_channel)

    @property
    def chunk(self) -> int:
        """Tokens of a chunk, of which T is a multiple."""
        return chunk_tokens(self.time)

    @property
    def chunks(self) -> int:
        """Of a sequence."""
        return self.time // self.chunk

    @property
    def group(self) -> int:
        """Heads of a program."""
        units = -(-self.keys * self.values // UNIT_STATE) * (FP32_UNITS if self.dtype == jnp.float32 else 1)
        most = (MAX_HEADS_BY_CHANNEL if self.by_channel else MAX_HEADS) // units
        return next((n for n in range(most, 1, -1) if self.heads % n == 0), 1)

    @property
    def groups(self) -> int:
        """Of heads."""
        return self.heads // self.group

    @property
    def grid(self) -> tuple[int, int, int]:
        """Rows, groups of heads, and chunks one after another."""
        return self.batch, self.groups, self.chunks

    def of_tokens(self, x, chunk_at) -> pl.BlockSpec:
        """Return a program's block of an array of `Tokens`."""
        if x.shape[2] == 1:
            return pl.BlockSpec((1, self.group, 1, self.chunk), lambda row, group, n: (row, group, 0, chunk_at(n)))
        return pl.BlockSpec((1, self.group, self.chunk, x.shape[3]), lambda row, group, n: (row, group, chunk_at(n), 0))

    def of_state(self) -> pl.BlockSpec:
        """Return a program's block of states (B, H, V, K)."""
        return pl.BlockSpec((1, self.group, self.values, self.keys), lambda row, group, n: (row, group, 0, 0))

    def of_chunk_state(self, chunk_at) -> pl.BlockSpec:
        """Return a program's block of states (B, H, chunks, V, K)."""
        block = 1, self.group, 1, self.values, self.keys
        return pl.BlockSpec(block, lambda row, group, n: (row, group, chunk_at(n), 0, 0))

    def of_table(self, table) -> pl.BlockSpec:
        """Return the whole of a table."""
        return pl.BlockSpec(table.shape, lambda row, group, n: (0, 0))

    def launch(self, body, name: str, arguments, in_specs, results, out_specs):
        """Run a program for each group of heads of a row, which goes on with each chunk."""
        varying = jax.typeof(arguments[-1]).manual_axis_type
        return pl.pallas_call(
            body,
            out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=varying) for x in results],
            grid=self.grid,
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=[pltpu.VMEM((self.group, self.values, self.keys), jnp.float32)],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
            ),
            name=name,
        )(*arguments)


def chunk_tokens(time: int) -> int:
    """Return the tokens of a chunk of a sequence: a power of two, and no more than needed for a short one."""
    return min(MAX_CHUNK_TOKENS, max(MIN_CHUNK_TOKENS, 1 << (time - 1).bit_length()))


@functools.partial(jax.jit, static_argnames=("scale", "with_starts"))
def forward(tokens: Tokens, state, *, scale: float, with_starts: bool):
    """Return o like v, the state (B, H, V, K) fp32 after the last token, and where asked for those before every chunk.

    T is a multiple of `chunk_tokens(T)`, the state like that which is returned; those of chunks are (B, H, chunks, V,
    K) in the tokens' dtype.
    """
    plan, given = Plan.of(tokens), [x for x in tokens if x is not None]
    table = decays.table(plan.chunk, plan.by_channel)
    starts = jax.ShapeDtypeStruct((plan.batch, plan.heads, plan.chunks, plan.values, plan.keys), plan.dtype)
    results = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (tokens.v, state)]

    def body(table_ref, state_ref, *refs):
        blocks, [o_ref, last_ref, *starts_ref, running] = split(refs, len(given))
        n = pl.program_id(2)

        @pl.when(n == 0)
        def begin():
            running[...] = state_ref[0]

        states = [running[head] for head in range(plan.group)]
        for ref in starts_ref:
            for head, S in enumerate(states):
                ref[0, head, 0] = S.astype(ref.dtype)
        outputs, states = chunk(plan, scale, table_ref[...], Block.read(blocks, tokens), states)
        for head, (o, S) in enumerate(zip(outputs, states, strict=True)):
            o_ref[0, head] = o.astype(o_ref.dtype)
            running[head] = S

        @pl.when(n == plan.chunks - 1)
        def end():
            last_ref[0] = running[...]

    def at(n):
        return n

    in_specs = [plan.of_table(table), plan.of_state(), *(plan.of_tokens(x, at) for x in given)]
    out_specs = [plan.of_tokens(tokens.v, at), plan.of_state(), *[plan.of_chunk_state(at)] * with_starts]
    results += [starts] * with_starts
    return plan.launch(body, "matrix_states_forward", [table, state, *given], in_specs, results, out_specs)


@functools.partial(jax.jit, static_argnames=("scale",))
def reverse(tokens: Tokens, starts, do, dlast, *, scale: float):
    """Return the gradients of the tokens, like them, and of the state before the first.

    Args:
      tokens: of `forward`.
      starts: the states before every chunk that it returned.
      do: the gradient of o.
      dlast: the gradient of the state after the last token.
    """
    plan, given = Plan.of(tokens), [x for x in tokens if x is not None]
    table = decays.table(plan.chunk, plan.by_channel)

    def body(table_ref, dlast_ref, starts_ref, do_ref, *refs):
        blocks, targets, [dstate_ref, running] = split(refs, len(given), len(given))
        n = pl.program_id(2)

        @pl.when(n == 0)
        def begin():
            running[...] = dlast_ref[0]

        heads = range(plan.group)
        states = [starts_ref[0, head, 0].astype(jnp.float32) for head in heads]
        _, pullback = jax.vjp(functools.partial(chunk, plan, scale, table_ref[...]), Block.read(blocks, tokens), states)
        gradients = [do_ref[0, head].astype(jnp.float32) for head in heads], [running[head] for head in heads]
        dblock, dstates = pullback(gradients)
        dblock.write(targets)
        for head, dS in enumerate(dstates):
            running[head] = dS

        @pl.when(n == plan.chunks - 1)
        def end():
            dstate_ref[0] = running[...]

    def at(n):
        return plan.chunks - 1 - n

    by_token = [plan.of_tokens(x, at) for x in given]
    in_specs = [plan.of_table(table), plan.of_state(), plan.of_chunk_state(at), plan.of_tokens(do, at), *by_token]
    results = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (*given, dlast)]
    arguments = [table, dlast, starts, do, *given]
    return plan.launch(body, "matrix_states_reverse", arguments, in_specs, results, [*by_token, plan.of_state()])


class Block(NamedTuple):
    """A chunk's tokens in fp32, by head; a number a head (C, heads) of all heads at once."""

    q: list[jax.Array]
    k: list[jax.Array]
    v: list[jax.Array]
    log_decay: list[jax.Array]
    beta: list[jax.Array] | None
    a: list[jax.Array] | None
    b: list[jax.Array] | None

    @classmethod
    def read(cls, refs, tokens: Tokens) -> "Block":
        """Return what programs' blocks of `Tokens` hold."""
        held = map(read, refs)
        parts: list[Any] = [None if x is None else next(held) for x in tokens]
        return cls(*parts)

    def write(self, refs) -> None:
        """Write gradients of blocks."""
        for ref, parts in zip(refs, (parts for parts in self if parts is not None), strict=True):
            write(ref, parts)


def read(ref) -> list:
    """Return each head's part of a block, or numbers a head (C, heads)."""
    heads = [ref[0, n].astype(jnp.float32) for n in range(ref.shape[1])]
    return [jnp.concatenate(heads).T] if ref.shape[2] == 1 else heads


def write(ref, parts) -> None:
    """Write what `read` returns."""
    for n, part in enumerate(columns_as_rows(parts[0]) if ref.shape[2] == 1 else parts):
        ref[0, n] = part.astype(ref.dtype)


def columns_as_rows(x) -> list:
    """Return the columns of a matrix as matrices of a row."""
    return [x.T[n : n + 1] for n in range(x.shape[1])]


class Write(NamedTuple):
    """What a head's tokens add to its state: values (C, V) under keys (C, K)."""

    keys: jax.Array
    values: jax.Array


def chunk(plan: Plan, scale: float, table, block: Block, states: list) -> tuple[list, list]:
    """Return the outputs of a chunk's tokens and the states (V, K) after it, by head, given those before it."""
    dtype, by_head = plan.dtype, decays.of_heads(table, block.log_decay, plan.dtype)
    heads = list(zip(block.q, written(dtype, block, by_head, states), by_head, states, strict=True))

    def output(q, writes, decay, S):
        seen = product(decay.seen(q), S, (1, 1), dtype)
        return scale * sum((product(decay.pairs(q, k), v, (1, 0), dtype) for k, v in writes), seen)

    def after(writes, decay, S):
        return sum((product(v, decay.left(k), (0, 0), dtype) for k, v in writes), decay.kept(S) * S)

    return [output(*head) for head in heads], [after(*head) for _, *head in heads]


def written(dtype, block: Block, by_head: list[decays.Decays], states: list) -> list[list[Write]]:
    """Return what tokens write, by head."""
    if block.beta is not None:
        values = corrected(dtype, block, columns(block.beta[0]), by_head, states)
        return [[Write(*head)] for head in zip(block.k, values, strict=True)]
    own = [[Write(*head)] for head in zip(block.k, block.v, strict=True)]
    if block.a is None or block.b is None:
        return own
    values = read_before(dtype, block.a, block.b, own, by_head, states)
    return [[*writes, Write(*head)] for writes, *head in zip(own, block.b, values, strict=True)]


def corrected(dtype, block: Block, rates: list, by_head: list[decays.Decays], states: list) -> list:
    """Return what the delta rule writes, by head."""
    heads = list(zip(rates, block.k, block.v, by_head, states, strict=True))
    right = [beta * (v - product(decay.seen(k), S, (1, 1), dtype)) for beta, k, v, decay, S in heads]
    return solve([beta * decay.pairs(k, k, own=False) for beta, k, _, decay, _ in heads], right, dtype)


def read_before(dtype, a: list, b: list, own: list[list[Write]], by_head: list, states: list) -> list:
    """Return what keys a read of the state before their tokens, by head; tokens write it under b, and `own` besides."""
    right = [
        product(decay.pairs_before(a, k), v, (1, 0), dtype) + product(decay.seen_before(a), S, (1, 1), dtype)
        for a, [(k, v)], decay, S in zip(a, own, by_head, states, strict=True)
    ]
    lower = [-decay.pairs_before(a, b) for a, b, decay in zip(a, b, by_head, strict=True)]
    return solve(lower, right, dtype)
