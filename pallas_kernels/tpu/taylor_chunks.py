"""What the passes of Taylor attention on TPUs share: how work is cut, which tokens of a chunk see each other, products.

Tokens lie on lanes: q and k are (B, H, K, T), v and o (B, H, V, T). A program takes a chunk of some heads of a row.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import split

MAX_HEADS = 8
"""Of a program."""
MAX_STATE_BYTES, LANES, STATE_BUFFERS = 8 << 20, 128, 4
"""Of a program's states in VMEM, of which it holds two blocks that come and two that go; where a kernel has 16 MiB."""
SUM_ROWS = 16
"""Beside values, a tile of bf16: of the state the first holds the normaliser."""


class Documents(NamedTuple):
    """Packed documents.

    Attributes:
      numbers: (B, 1, T) int32, rising along a row; 0 at padding.
      held: (B, chunks + 1) int32, that of the state before each chunk, and after the last.
    """

    numbers: jax.Array
    held: jax.Array


class Plan(NamedTuple):
    """B, H and T, a head's state, how many tokens a program takes, and whether from the last to the first."""

    rows: int
    heads: int
    time: int
    state: tuple[int, int]
    chunk: int
    reverse: bool = False

    @classmethod
    def of(cls, v: jax.Array, state: jax.ShapeDtypeStruct, chunk: int, reverse: bool = False) -> "Plan":
        """Return the plan for values (B, H, V, T) and states (B, H, ., .)."""
        (rows, heads, _, time), (*_, sublanes, lanes) = v.shape, state.shape
        return cls(rows, heads, time, (sublanes, lanes), chunk, reverse)

    @property
    def heads_of_program(self) -> int:
        """Return how many heads a program takes."""
        sublanes, lanes = self.state
        of_head = STATE_BUFFERS * 4 * sublanes * -(-lanes // LANES) * LANES
        most = min(MAX_HEADS, max(1, MAX_STATE_BYTES // of_head))
        return next(n for n in range(most, 0, -1) if self.heads % n == 0)

    @property
    def chunks(self) -> int:
        """Return how many chunks a row has."""
        return self.time // self.chunk

    def place(self, step):
        """Return the number of the chunk that a program takes."""
        return self.chunks - 1 - step if self.reverse else step

    def of_tokens(self, x) -> pl.BlockSpec:
        """Return a program's block of (B, H, ., T)."""
        block = 1, self.heads_of_program, x.shape[2], self.chunk
        return pl.BlockSpec(block, lambda row, group, step, *_: (row, group, 0, self.place(step)))

    def of_state(self, x) -> pl.BlockSpec:
        """Return a program's block of (B, H, ., .)."""
        block = 1, self.heads_of_program, *x.shape[2:]
        return pl.BlockSpec(block, lambda row, group, step, *_: (row, group, 0, 0))

    def of_numbers(self) -> pl.BlockSpec:
        """Return a program's block of the documents' numbers."""
        return pl.BlockSpec((1, 1, self.chunk), lambda row, group, step, *_: (row, 0, self.place(step)))

    def by_head(self, *blocks) -> list[list]:
        """Return each head's part of a program's blocks."""
        return [[block.at[0, head] for block in blocks] for head in range(self.heads_of_program)]

    def call(
        self,
        of_head: Callable[[list, "Links"], Iterator[None]],
        arrays,
        state,
        documents: Documents | None,
        token_results,
        state_result,
        *,
        name: str,
        tokens: int,
        keys_dimension: int = 0,
    ):
        """Run `of_head(refs, links)` for each head of a program, a stage behind the one before.

        Args:
          of_head: given a head's parts of the arrays, of the results, and of the state as it is before the chunk.
          arrays: (B, H, ., T).
          state: that before the first chunk, None for the empty one.
          documents: None for one a row.
          token_results: like `arrays`.
          state_result: like `state`.
          name: of the kernel.
          tokens: of a row, besides those that fill it up.
          keys_dimension: of `Links.inside`.
        """
        first = [] if state is None else [state]
        numbers, held = ([], []) if documents is None else ([documents.numbers], [documents.held])
        sizes = [len(x) for x in (held, arrays, first, numbers, token_results)]
        results = [*token_results, state_result]

        def run(*refs):
            held, inputs, first, numbers, outputs, [running] = split(refs, *sizes)
            begin(running, first)
            links = Links.of(self, tokens, numbers, held, keys_dimension=keys_dimension)
            staggered([of_head(parts, links) for parts in self.by_head(*inputs, *outputs, running)])

        grid = pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(held),
            grid=(self.rows, self.heads // self.heads_of_program, self.chunks),
            in_specs=[*map(self.of_tokens, arrays), *map(self.of_state, first), *(self.of_numbers() for _ in numbers)],
            out_specs=[*map(self.of_tokens, token_results), self.of_state(state_result)],
        )
        return pl.pallas_call(
            run,
            out_shape=results,
            grid_spec=grid,
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
            name=name,
        )(*held, *arrays, *first, *numbers)


class Links(NamedTuple):
    """Which tokens of a chunk see which, and the state.

    Attributes:
      inside: (keys, queries), or turned over, whether a query sees a key of the chunk.
      reads: (1, chunk) fp32, 1 where a query sees the state before the chunk and else 0, or 1.0 where all do.
      writes: the same of keys that are added to the state.
      keeps: whether what was in the state before stays, None where it always does.
    """

    inside: jax.Array
    reads: jax.Array | float
    writes: jax.Array | float
    keeps: jax.Array | None

    @classmethod
    def of(cls, plan: Plan, tokens: int, numbers, held, *, keys_dimension: int = 0) -> "Links":
        """Return those of a program, of rows with so many tokens besides what fills them up."""
        shape, place = (plan.chunk, plan.chunk), plan.place(pl.program_id(2))
        key, query = (lax.broadcasted_iota(jnp.int32, shape, i) for i in (keys_dimension, 1 - keys_dimension))
        if numbers:
            row, of_row = pl.program_id(0), numbers[0][0].astype(jnp.float32)
            [before, after] = (held[0][row, place + i] for i in (0, 1))
            numbers_of_lanes = jnp.broadcast_to(of_row, shape)
            alike = (numbers_of_lanes == numbers_of_lanes.T) & (numbers_of_lanes != 0.0)
            reads, writes = ((of_row == x.astype(jnp.float32)).astype(jnp.float32) for x in (before, after))
            return cls((key <= query) & alike, reads, writes, before == after)
        writes = 1.0
        if tokens < plan.time:
            at = place * plan.chunk + lax.broadcasted_iota(jnp.int32, (1, plan.chunk), 1)
            writes = (at < tokens).astype(jnp.float32)
        return cls(key <= query, 1.0, writes, None)

    def kept(self, state: jax.Array) -> jax.Array:
        """Return what stays of a state."""
        return state if self.keeps is None else jnp.where(self.keeps, state, 0.0)


def staggered(heads: list[Iterator[None]]) -> None:
    """Run what each head has to do, each a stage behind the head before, so that products of one fill waits of others.

    libtpu's schedule follows the order of the program: one head after the other takes 4 to 25 % more bundles.
    """
    under_way: list[Iterator[None]] = []
    while heads or under_way:
        if heads:
            under_way.append(heads.pop(0))
        under_way = [head for head in under_way if next(head, under_way) is None]


def masked(x: jax.Array, present: jax.Array | float) -> jax.Array:
    """Return x where tokens are present, and 0 elsewhere."""
    return x if isinstance(present, float) else x * present


def dot(a: jax.Array, b: jax.Array, a_dimension: int = 1, b_dimension: int = 0) -> jax.Array:
    """Return the sum over these dimensions of two matrices, fp32."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    dimensions = (((a_dimension,), (b_dimension,)), ((), ()))
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def sum_rows(tokens: int, dtype, *rows: jax.Array | float) -> jax.Array:
    """Return (SUM_ROWS, tokens) that begins with these rows (1, tokens), and has zeros below."""
    place = lax.broadcasted_iota(jnp.int32, (SUM_ROWS, tokens), 0)
    x = jnp.zeros(place.shape, jnp.float32)
    for i, row in enumerate(rows):
        x = jnp.where(place == i, row, x)
    return x.astype(dtype)


def rest(x: jax.Array, dtype) -> jax.Array:
    """Return what is left of x fp32 when it is rounded to a dtype."""
    return x - x.astype(dtype).astype(jnp.float32)


def begin(state, first) -> None:
    """Write the first state of a row, or zeros."""

    @pl.when(pl.program_id(2) == 0)
    def write():
        state[...] = first[0][...] if first else jnp.zeros(state.shape, jnp.float32)


def like(x: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.ShapeDtypeStruct:
    """Return the type of a result that varies over the devices that an argument varies over."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(x).manual_axis_type)
