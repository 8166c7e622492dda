"""Whole training steps of a config on random tokens: how fast they are, what they use, and where their time goes."""

import dataclasses
import itertools
import os
import time
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from based_jax import compilation, devices, flops, parallel
from based_jax.aot import collectives, costs
from based_jax.aot.hlo import Program
from based_jax.bench import clocks, rows, step_profile
from based_jax.bench.memory import peak_bytes, program_bytes
from based_jax.bench.runner import Runner
from based_jax.errors import UserError
from based_jax.nn.block import remat_of
from based_jax.nn.loss import loss_sums
from based_jax.ops import dispatch
from based_jax.train.compile import TrainProgram, train_program
from based_jax.train.run import Facts, TrainConfig

BATCHES_ON_DEVICE = 4
"""That the steps take in turn: data are no part of their time."""
PROFILED_STEPS = 3
MOCKED_TOPOLOGY = "JAX_MOCK_GPU_TOPOLOGY"
"""JAX's variable by which one GPU runs its share of a step over several, as "1x2x1" of one of two: all but what these
exchange, so that what it computes means nothing.
"""


class CompiledStep(NamedTuple):
    """A step that is ready to run.

    Attributes:
      step: `(state, batch) -> (state, metrics)`.
      products: FLOPs of the step on all devices, those made again too.
      choices: by operation the implementations that it took.
      seconds: to trace, to lower and to compile it.
      is_warm: whether it was read from the disk instead of compiled.
    """

    step: jax.stages.Compiled
    products: float
    choices: dict[str, list[str]]
    seconds: dict[str, float]
    is_warm: bool


def measure(config: TrainConfig, steps: int, documents: int = 1, profiled: bool = True) -> dict[str, Any]:
    """Return the row of a config: median time of a step, tokens/s, MFU, HFU, MBU, memory, what compiling took.

    Args:
      config: the run; its mesh is of all devices.
      steps: how many are timed, one after the other as in the training loop, the device never waiting for the host.
      documents: of equal length that each row of tokens is packed of; 1 for rows without ids of documents.
      profiled: whether a breakdown of the time on a GPU is part of the row.

    Raises:
      UserError: there are no steps or too many documents, or the config cannot be trained here.
    """
    if steps < 1:
        raise UserError(f"steps is {steps}; it is at least 1.")
    program = train_program(config, parallel.make_mesh(config.mesh))
    host_batches = [random_batch(program.config, i, documents) for i in range(BATCHES_ON_DEVICE)]
    compiled = compile_step(program, host_batches[0])
    batches = [_placed(program, batch) for batch in host_batches]
    runner = Runner(compiled.step, program.initial_state(), batches)
    with clocks.recorded(program.mesh.devices.flat[0]) as clock:
        seconds = runner.median_seconds(steps)
    peak = peak_bytes()  # a profile takes memory as well
    text = step_profile.program_of(compiled.step.as_text() or "")
    breakdown = step_profile.profile(runner.take, text, PROFILED_STEPS) if profiled else None
    return {
        **_sizes(program, batches[0], steps, documents),
        **_speed(program, compiled, text, batches[0]["inputs"].shape, seconds),
        **_exchange(program, text),
        **_compilation(compiled),
        **clock,
        "program_bytes": program_bytes(compiled.step),
        "peak_bytes": peak,
        "impls": compiled.choices,
        "breakdown": breakdown,
        **rows.facts(),
    }


def compile_programs(config: TrainConfig, documents: int = 1) -> float:
    """Compile what `measure` runs of a config, and return the seconds that it took; nothing runs.

    A process with the same folder of compiled programs reads them from there.

    Raises:
      UserError: as of `measure`.
    """
    begin = time.perf_counter()
    program = train_program(config, parallel.make_mesh(config.mesh))
    compile_step(program, random_batch(program.config, 0, documents))
    program.jitted_init.lower(jax.random.key(config.seed)).compile()
    return time.perf_counter() - begin


def random_batch(config: TrainConfig, seed: int, documents: int) -> parallel.HostBatch:
    """Return rows of random tokens, each followed by its label, with ids of documents if there are several.

    Raises:
      UserError: a row has fewer tokens than documents.
    """
    length = config.data.longest_test
    if not 1 <= documents <= length:
        raise UserError(f"documents is {documents}; it is at least 1, and at most {length}, the tokens of a row.")
    ids = np.random.default_rng(seed).integers(config.model.vocab_size, size=(config.batch_size, length + 1))
    batch = {"inputs": ids[:, :-1].astype(np.int32), "labels": ids[:, 1:].astype(np.int32)}
    if documents > 1:
        numbers = 1 + np.arange(length, dtype=np.int32) * documents // length
        batch["segment_ids"] = np.broadcast_to(numbers, batch["inputs"].shape)
    return batch


def compile_step(program: TrainProgram, batch: parallel.HostBatch) -> CompiledStep:
    """Return the step over batches like this one, with what compiling it took."""
    with compilation.counted_hits() as hits, dispatch.recorded_choices() as choices:
        stamps = [time.perf_counter()]
        traced = program.trace_step(batch)
        stamps.append(time.perf_counter())
        with jax.set_mesh(program.mesh):
            lowered = traced.lower()
        stamps.append(time.perf_counter())
        step = lowered.compile()
        stamps.append(time.perf_counter())
    stages = zip(("trace", "lower", "compile"), itertools.pairwise(stamps), strict=True)
    seconds = {name: end - begin for name, (begin, end) in stages}
    named = {operation: list(impls) for operation, impls in choices.items()}
    products = flops.matrix_products(traced.jaxpr.jaxpr) + 3 * _kernel_flops(program, batch)
    return CompiledStep(step, products, named, seconds, hits.count > 0)


def _kernel_flops(program: TrainProgram, batch: parallel.HostBatch) -> float:
    """Return the forward FLOPs that stand in kernels: what the model counts and its traced products do not have."""

    def forward(params: nnx.State, batch: Any) -> Any:
        return loss_sums(nnx.merge(program.graphdef, params), batch)

    with jax.set_mesh(program.mesh):
        abstract = program.abstract_batch(batch)
        traced = jax.make_jaxpr(forward)(program.abstract_state.params, abstract)
    rows, length = abstract["inputs"].shape
    counted = rows * length * Facts.of(program.config, seq_len=length).forward_flops
    return max(0.0, counted - flops.matrix_products(traced.jaxpr))


def _placed(program: TrainProgram, batch: parallel.HostBatch) -> parallel.GlobalBatch:
    feed = parallel.Feed(program.mesh, program.config.batch_size)
    return feed.arrays({name: x[feed.rows] for name, x in batch.items()})


def _sizes(program: TrainProgram, batch: parallel.GlobalBatch, steps: int, documents: int) -> dict[str, Any]:
    count, length = batch["inputs"].shape
    config = program.config
    return {
        "rows": count,
        "seq_len": length,
        "documents": documents,
        "microbatches": config.microbatches,
        "remat": remat_of(config.model.remat),
        "scan_layers": config.model.scan_layers,
        "devices": program.mesh.size,
        "mesh": {axis: size for axis, size in program.mesh.shape.items() if size > 1},
        "processes": jax.process_count(),
        **({"mocked_topology": mocked} if (mocked := os.environ.get(MOCKED_TOPOLOGY)) else {}),
        "steps": steps,
    }


def _speed(
    program: TrainProgram, compiled: CompiledStep, text: Program, shape: tuple[int, ...], seconds: float
) -> dict[str, Any]:
    """Return how fast steps over rows of this shape are, and what they use of the devices."""
    count, length = shape
    row = Facts.of(program.config, seq_len=length).row(count * length / seconds)
    kind, number = row["device"], program.mesh.size
    device = devices.find(kind)
    if device and device.peak_bf16_flops:
        row["hfu"] = compiled.products / seconds / (number * device.peak_bf16_flops)
    if device and device.hbm_bytes_per_second:
        row["mbu"] = costs.memory_bytes(text) / seconds / device.hbm_bytes_per_second
    own = {"tokens_per_second_per_device": row["tokens_per_second"] / number}
    return {"milliseconds": round(1e3 * seconds, 3), **row, **own}


def _exchange(program: TrainProgram, text: Program) -> dict[str, Any]:
    """Return what the compiled step has devices exchange: by kind and axes in bytes, and which arrays."""
    found = collectives.collectives(text)
    return {
        "exchanged": [dataclasses.asdict(x) for x in collectives.by_axis(found, program.mesh)],
        "exchanged_arrays": [dataclasses.asdict(x) for x in collectives.by_array(found, program.mesh)],
    }


def _compilation(compiled: CompiledStep) -> dict[str, Any]:
    parts = {f"{name}_seconds": round(x, 2) for name, x in compiled.seconds.items() if name != "compile"}
    return {**parts, "compile_seconds": round(sum(compiled.seconds.values()), 2), "compiled_before": compiled.is_warm}


def lines(row: dict[str, Any]) -> list[str]:
    """Return a row in lines of print."""
    mesh = "".join(f", {axis} {size}" for axis, size in row.get("mesh", {}).items())
    shape = f"({row['rows']},{row['seq_len']}) on {row['devices']} x {row['device']}{mesh}"
    used = "".join(f", {name.upper()} {row[name]:.3f}" for name in ("mfu", "hfu", "mbu") if name in row)
    step, peak = ("-" if row[x] is None else f"{row[x] / 2**20:.0f} MiB" for x in ("program_bytes", "peak_bytes"))
    clock = f", {row['sm_clock_mhz']:.0f} MHz at {row['watts']:.0f} W" if "watts" in row else ""
    speed = f"{row['milliseconds']:.2f} ms a step, {row['tokens_per_second']:.0f} tokens/s{used}{clock}"
    how = "read from the disk" if row["compiled_before"] else "compiled"
    first = f"{shape}: {speed}; {step} for a step, {peak} at most; {how} in {row['compile_seconds']:.1f} s"
    impls = ", ".join(f"{operation} {'+'.join(names)}" for operation, names in row["impls"].items())
    return [first, f"  {impls}", *(step_profile.lines(row["breakdown"]) if row["breakdown"] else [])]
