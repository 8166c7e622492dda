"""What a run says before its first step: on what it trains, what, and how."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from based_jax import parallel, placement
from based_jax.train.compile import TrainProgram
from based_jax.train.tasks import Source


def opening_lines(program: TrainProgram, source: Source, choices: Mapping[str, Iterable[str]]) -> list[str]:
    """Return a line each on devices, mesh, parameters, data and implementations.

    Args:
      program: what is trained, and on which mesh.
      source: of its batches.
      choices: the implementations that each operation takes (`dispatch.recorded_choices`).
    """
    devices, rows_over = program.mesh.devices, parallel.row_devices(program.mesh)
    params = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(program.abstract_state.params))
    return [
        f"devices: {devices.size} x {devices.flat[0].device_kind}",
        f"mesh: {', '.join(f'{axis} {size}' for axis, size in program.mesh.shape.items())}",
        f"batch: {program.config.batch_size} rows, {program.config.batch_size // rows_over} a device",
        f"parameters: {params:,}",
        *whole_lines(program.abstract_state.params, program.mesh),
        *source.summary,
        *(f"{operation}: {', '.join(names)}" for operation, names in choices.items()),
    ]


def whole_lines(params: Any, mesh: Mesh) -> list[str]:
    """Return a line for each large parameter that devices along a mesh axis hold alike, and one for all small ones."""
    lines = [
        f"not divided over {x.axis}: {x.devices} devices hold the same {x.bytes / 2**20:,.1f} MiB each of '{x.path}'"
        for x in parallel.whole_parameters(params, mesh)
    ]
    if small := parallel.small_parameters(params, mesh):
        each = f"of less than {placement.SMALL_BYTES / 2**10:g} KiB a layer"
        lines.append(f"not divided over fsdp: {len(small)} parameters {each}, {sum(small) / 2**20:,.1f} MiB together")
    return lines
