"""How many bundles of instructions all programs of a call take, by the schedule that libtpu has made of one."""

import math
from typing import NamedTuple

import jax.numpy as jnp

from based_jax.ops.tpu.attention import BLOCK_TOKENS
from based_jax.ops.tpu.taylor import chunk_tokens


class Loop(NamedTuple):
    """Bundles of one turn of a loop in a program, and of those of the loops in it."""

    own: int
    inner: int


class Schedule(NamedTuple):
    """Bundles of a kernel that stand in no loop but that over programs, and its loops in their order."""

    straight: int
    loops: list[Loop]


def of_taylor_decode(
    schedule: Schedule, rows: int, heads: int, keys: int, values: int, room: int, state_dtype: str
) -> int:
    """Count the loops over features and over all recent tokens as often as they run, and no others."""
    from pallas_kernels.tpu import taylor_decode as kernels

    plan = kernels.Plan(rows, heads, 1, keys, values, room, jnp.dtype(state_dtype), jnp.dtype(jnp.bfloat16))
    turn = kernels.largest_divisor(plan.chunk, kernels.MAX_UNROLLED)
    of_features = max(loop.own for loop in schedule.loops if not loop.inner)
    of_tokens = schedule.loops[-2].own * room // kernels.MAX_UNROLLED_TOKENS
    of_chunks = plan.features // plan.chunk * schedule.straight
    return rows // plan.lanes * heads * (plan.features // turn * of_features + of_tokens + of_chunks)


def of_taylor_chunks(schedule: Schedule, rows: int, time: int, heads: int, state: tuple[int, int]) -> int:
    """Count a program for each chunk of some heads of a row, with so large a state."""
    from pallas_kernels.tpu.taylor_chunks import Plan

    assert not schedule.loops
    plan = Plan(rows, heads, time, state, chunk_tokens(time))
    return rows * heads // plan.heads_of_program * plan.chunks * schedule.straight


def of_matrix_state_step(schedule: Schedule, state: tuple[int, int, int, int]) -> int:
    """Count a program for the heads that it holds of a row."""
    from pallas_kernels.tpu import matrix_state_step as kernels

    assert not schedule.loops
    rows, heads, *_ = state
    return rows * heads // (kernels.heads_of_program(state) or heads) * schedule.straight


def of_matrix_states(
    schedule: Schedule,
    rows: int,
    heads: int,
    time: int,
    keys: int,
    values: int,
    by_channel: bool,
) -> int:
    """Count a program for each chunk of the heads that it holds of a row, in bf16."""
    from pallas_kernels.tpu import matrix_states as kernels

    assert not schedule.loops
    plan = kernels.Plan(rows, heads, time, keys, values, jnp.dtype(jnp.bfloat16), by_channel)
    return math.prod(plan.grid) * schedule.straight


def of_window_forward(schedule: Schedule, rows: int, time: int, heads: int, window: int) -> int:
    """Count a program for each block of tokens of the heads that it holds of a row, which are the turns of its loop."""
    from pallas_kernels.tpu import window as kernels

    plan = kernels.Plan.of(heads, time, window)
    turns = plan.heads // math.gcd(plan.heads, kernels.UNROLLED_HEADS)
    return rows * (heads // plan.heads) * (time // plan.tokens) * _looped(schedule, turns)


def of_window_gradients(schedule: Schedule, rows: int, time: int, heads: int, window: int) -> int:
    """Count a program for each block of tokens of the heads that it holds of a row, each a turn of its loop."""
    from pallas_kernels.tpu import window as kernels

    plan = kernels.Plan.of(heads, time, window)
    return rows * (heads // plan.heads) * (time // plan.tokens) * _looped(schedule, plan.heads)


def of_gated_short_conv(schedule: Schedule, rows: int, time: int, channels: int) -> int:
    """Count a program for each block of tokens of a row, whose loop is over registers of channels."""
    from pallas_kernels.tpu import gated_short_conv as kernels

    tokens = kernels.block_tokens(time, channels, jnp.dtype(jnp.bfloat16).itemsize)
    return rows * (time // tokens) * _looped(schedule, channels // kernels.LANES)


def of_norm(schedule: Schedule, rows: int, time: int, channels: int) -> int:
    """Count a program for each block of tokens of a row, whose loop is over parts of these."""
    from pallas_kernels.tpu import norm as kernels

    tokens = kernels.block_tokens(time, channels)
    return rows * -(-time // tokens) * _looped(schedule, tokens // kernels.PART_TOKENS)


def _looped(schedule: Schedule, turns: int) -> int:
    """Count a program with one loop, of which libtpu may write several parts."""
    return schedule.straight + turns * sum(loop.own + loop.inner for loop in schedule.loops)


def of_splash_attention(schedule: Schedule, rows: int, time: int, heads: int, window: int) -> int:
    """Count a program for each block of queries and each of the two of keys that it may see."""
    assert not schedule.loops and window <= BLOCK_TOKENS
    return rows * heads * time // BLOCK_TOKENS * 2 * schedule.straight
