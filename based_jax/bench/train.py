"""Whole training steps of a config on the devices at hand: how fast they are, and how much memory they take."""

import time
from collections.abc import Sequence
from typing import Any

import jax

from based_jax import parallel
from based_jax.bench import rows
from based_jax.errors import UserError
from based_jax.train.compile import train_program
from based_jax.train.run import Facts, TrainConfig

BATCHES_ON_DEVICE = 4
"""That the steps take in turn: data are no part of their time."""
UNTIMED_STEPS = 2


def measure(config: TrainConfig, steps: int) -> dict[str, Any]:
    """Return the row of a config: time of a step, tokens/s, MFU, memory of a device, seconds to compile.

    Args:
      config: the run; its mesh is of all devices.
      steps: how many are timed, one after the other as in the training loop, the host never waiting in between.

    Raises:
      UserError: there are no steps, or the config cannot be trained here.
    """
    if steps < 1:
        raise UserError(f"steps is {steps}; it is at least 1.")
    program = train_program(config, parallel.make_mesh(config.mesh))
    config = program.config
    feed = parallel.Feed(program.mesh, config.batch_size)
    source = config.data.open(config.batch_size, feed.rows)
    found = [source.batch(i) for i in range(BATCHES_ON_DEVICE)]
    begin = time.perf_counter()
    step = program.lower_step(found[0]).compile()
    compile_seconds = time.perf_counter() - begin
    batches = [feed.arrays(batch) for batch in found]
    seconds = seconds_of_a_step(step, program.initial_state(), batches, steps)
    memory = {"program_bytes": program_bytes(step), "peak_bytes": peak_bytes()}
    speed = _speed(config, batches[0]["inputs"].size, seconds)
    counts = {"devices": program.mesh.size, "steps": steps}
    return counts | speed | {"compile_seconds": round(compile_seconds, 2)} | memory | rows.facts()


def seconds_of_a_step(
    step: jax.stages.Compiled, state: Any, batches: Sequence[parallel.GlobalBatch], steps: int
) -> float:
    """Return the mean time of so many steps, after some that are not timed."""

    def take(state, count: int):
        for i in range(count):
            state, metrics = step(state, batches[i % len(batches)])
        jax.block_until_ready(metrics)
        return state

    state = take(state, UNTIMED_STEPS)
    begin = time.perf_counter()
    take(state, steps)
    return (time.perf_counter() - begin) / steps


def _speed(config: TrainConfig, tokens: int, seconds: float) -> dict[str, Any]:
    """Return the row's sizes and how fast steps of so many tokens and seconds are."""
    seq_len = tokens // config.batch_size
    sizes = {"batch_size": config.batch_size, "seq_len": seq_len, "milliseconds": round(1e3 * seconds, 3)}
    return sizes | Facts.of(config, seq_len=seq_len).row(tokens / seconds)


def program_bytes(compiled: jax.stages.Compiled) -> int | None:
    """Return what a compiled step needs on a device: arguments, results that are not the donated ones, temporaries."""
    memory = compiled.memory_analysis()
    if memory is None:
        return None
    sizes = memory.argument_size_in_bytes, memory.output_size_in_bytes, memory.temp_size_in_bytes
    return sum(sizes) - memory.alias_size_in_bytes


def peak_bytes() -> int | None:
    """Return the most that was in use on a device of this process since it began; None where it is not counted."""
    found = [device.memory_stats() or {} for device in jax.local_devices()]
    return max((x["peak_bytes_in_use"] for x in found if "peak_bytes_in_use" in x), default=None)


def line(row: dict[str, Any]) -> str:
    """Return a row in one line of print."""
    shape = f"({row['batch_size']},{row['seq_len']}) on {row['devices']} x {row['device']}"
    used = f", MFU {row['mfu']:.3f}" if "mfu" in row else ""
    memory = [row[name] for name in ("program_bytes", "peak_bytes")]
    step, peak = ("-" if x is None else f"{x / 2**20:.0f} MiB" for x in memory)
    speed = f"{row['milliseconds']:.2f} ms a step, {row['tokens_per_second']:.0f} tokens/s{used}"
    return f"{shape}: {speed}; {step} for a step, {peak} at most; compiled in {row['compile_seconds']:.1f} s"
