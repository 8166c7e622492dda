"""What is told of a program that was compiled ahead of time: one row of facts, and the same for a reader."""

import dataclasses
import importlib.metadata
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from based_jax import parallel
from based_jax.aot import collectives, compiling, costs
from based_jax.aot.compiling import Buffer, Compiled, DoesNotFit, Memory
from based_jax.aot.hlo import Instruction, Program
from based_jax.aot.kernels import KernelRuns, kernels
from based_jax.aot.programs import Lowered
from based_jax.aot.roofline import Roofline, fsdp_bytes, known_device, link_seconds, network_seconds, roofline
from based_jax.aot.schedule import Scheduled, scheduled
from based_jax.aot.topology import Topology
from based_jax.errors import UserError
from based_jax.train.opening import whole_lines

ON_CHIP = {"tpu": (1, 2, 3, 4, 5, 6)}
"""Memory spaces that are not HBM, by platform."""
LIBRARIES = ("jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "jax-cuda12-plugin")
TRAFFIC_KEPT, TRAFFIC_SHOWN = 20, 4
MIB, GIGA = 1 << 20, 1e9


@dataclasses.dataclass(frozen=True)
class Report:
    """What a compiled program needs and takes on each device, and how long that would take: an estimate.

    Attributes:
      topology, mesh: what it was compiled for.
      lowered: the program.
      memory: of a device; `largest` are the arrays that take most of it.
      flops, passes: of matrix products; `passes` with those in fp32 as often as the device makes them.
      memory_bytes: read from and written to HBM.
      traffic: its bytes by pass, layer and operation.
      moved: what devices exchange.
      roofline: the times.
      scheduled: the time by the program's schedule, of GPUs; None of TPUs.
      needed_bytes: what they would have to exchange for weights and gradients alone.
      kernels: by their names those that run, and what is copied for them.
      rematerialized: operations whose arrays the compiler copies to all devices.
      silent_kernels, unknown_loops: what FLOPs and bytes leave out, or count once.
      compile_seconds: on this host.
    """

    topology: Topology
    mesh: Mesh
    lowered: Lowered
    memory: Memory
    largest: list[Buffer]
    flops: float
    passes: float
    memory_bytes: float
    traffic: dict[str, float]
    moved: list[collectives.Moved]
    roofline: Roofline
    scheduled: Scheduled | None
    needed_bytes: float
    kernels: dict[str, KernelRuns]
    rematerialized: list[str]
    silent_kernels: int
    unknown_loops: list[str]
    compile_seconds: float

    @property
    def exchanged_bytes(self) -> float:
        """What a device sends in a step."""
        return sum(x.bytes for x in self.moved)

    @property
    def tokens_per_second(self) -> float:
        """Of all devices, if nothing overlaps."""
        return self.lowered.tokens / self.roofline.total

    def mfu(self, seconds: float) -> float:
        """Return model FLOP utilisation of a step of so many seconds."""
        peak = self.mesh.size * known_device(self.topology).peak_bf16_flops
        return self.lowered.model_flops / (seconds * peak)

    def check(self) -> None:
        """Check what no program may do.

        Raises:
          DoesNotFit: it needs more memory than a device has.
          UserError: the compiler copies arrays to all devices.
        """
        there = known_device(self.topology).hbm_bytes
        if self.memory.peak > there:
            largest = ", ".join(f"{x.array} ({x.bytes / MIB:,.0f} MiB)" for x in self.largest)
            needs = f"{self.memory.peak / MIB:,.0f} MiB of the {there / MIB:,.0f} MiB that a device has"
            raise DoesNotFit(f"The program does not fit: it needs {needs}; its largest buffers are {largest}.")
        if self.rematerialized:
            raise UserError(
                f"The compiler copies arrays whole to all devices ({compiling.REMATERIALIZED}) at"
                f" {len(self.rematerialized)} operations: {'; '.join(self.rematerialized[:3])}."
            )

    def _by_schedule(self) -> dict[str, float]:
        found = self.scheduled
        return {} if found is None else {"schedule_seconds": found.total, "exposed_seconds": found.exposed}

    def row(self) -> dict[str, Any]:
        """Return the facts as JSON has them."""
        (bound, seconds), total = self.roofline.bound, self.roofline.total
        return {
            "device": self.topology.device_kind,
            "topology": self.topology.name,
            "slices": self.topology.slices,
            "mesh": {axis: size for axis, size in self.mesh.shape.items() if size > 1},
            "tokens": self.lowered.tokens,
            "memory": self.memory._asdict(),
            "largest_buffers": [buffer._asdict() for buffer in self.largest],
            "flops": self.flops,
            "model_flops": self.lowered.model_flops / self.mesh.size,
            "memory_bytes": self.memory_bytes,
            "traffic": dict(list(self.traffic.items())[:TRAFFIC_KEPT]),
            "exchanged": [dataclasses.asdict(x) for x in self.moved],
            "exchanged_bytes": self.exchanged_bytes,
            "fsdp_bytes": self.needed_bytes,
            "seconds": dataclasses.asdict(self.roofline),
            "bound": bound,
            "estimate": {
                "bound_seconds": seconds,
                "sum_seconds": total,
                "tokens_per_second": self.tokens_per_second,
                "bound_mfu": self.mfu(seconds),
                "sum_mfu": self.mfu(total),
                **self._by_schedule(),
            },
            "whole": [x._asdict() for x in parallel.whole_parameters(self.lowered.params, self.mesh)],
            "whole_small_bytes": sum(parallel.small_parameters(self.lowered.params, self.mesh)),
            "kernels": {name: runs._asdict() for name, runs in self.kernels.items()},
            "rematerialized": self.rematerialized,
            "silent_kernels": self.silent_kernels,
            "unknown_loops": self.unknown_loops,
            "compile_seconds": round(self.compile_seconds, 1),
            "versions": _versions(),
        }


def report(compiled: Compiled, lowered: Lowered, topology: Topology, mesh: Mesh, dtype: str) -> Report:
    """Return the report of a compiled program, whose products are in `dtype`."""
    program = Program(compiled.text)
    on_chip = ON_CHIP["tpu"] if topology.on_tpu else ()
    found, flops = collectives.collectives(program), costs.flops(program)
    # Where kernels do not say theirs, the model's products are made at the least.
    least = lowered.model_flops / mesh.size if costs.silent_kernels(program) else 0.0
    passes = max(costs.flops(program, passes=topology.on_tpu), least)
    traffic = costs.traffic_by_scope(program, on_chip)
    moved_bytes = sum(traffic.values())
    return Report(
        topology=topology,
        mesh=mesh,
        lowered=lowered,
        memory=compiled.memory,
        largest=compiling.largest_buffers(program, on_chip),
        flops=flops,
        passes=passes,
        memory_bytes=moved_bytes,
        traffic=traffic,
        moved=collectives.by_axis(found, mesh),
        roofline=roofline(passes, moved_bytes, found, mesh, topology),
        scheduled=None if topology.on_tpu else _scheduled(program, mesh, topology),
        needed_bytes=_needed(lowered, mesh, dtype),
        kernels=kernels(program),
        rematerialized=compiled.rematerialized,
        silent_kernels=costs.silent_kernels(program),
        unknown_loops=program.unknown_loops,
        compile_seconds=compiled.seconds,
    )


def _scheduled(program: Program, mesh: Mesh, topology: Topology) -> Scheduled:
    """Return the time by a program's schedule, at the vendor's rates."""
    device = known_device(topology)

    def exchanged(x: Instruction) -> float:
        found = collectives.of_instruction(program, x, x.collective or "")
        return link_seconds(found, mesh, topology, device) + network_seconds(found, mesh, device)

    computed = costs.seconds_by_instruction(program, device.peak_bf16_flops, device.hbm_bytes_per_second)
    return scheduled(program, computed, exchanged)


def table(name: str, report: Report) -> str:
    """Return a report as text."""
    memory, device = report.memory, known_device(report.topology)
    (bound, seconds), total, times = report.roofline.bound, report.roofline.total, report.roofline
    lines = [
        f"{name} on {report.mesh.size} x {report.topology.device_kind}, {_mesh(report.mesh)}: of each device",
        f"  memory     {_mib(memory.peak)} of {_mib(device.hbm_bytes)}: arguments {_mib(memory.arguments)}, outputs"
        f" {_mib(memory.outputs)} ({_mib(memory.aliased)} in their place), temporaries {_mib(memory.temporaries)}, code"
        f" {_mib(memory.code)}",
        f"  compute    {report.flops / 1e12:.3f} TFLOP, {report.lowered.model_flops / report.mesh.size / 1e12:.3f} of"
        f" them the model's: {_ms(times.compute)}",
        f"  HBM        {report.memory_bytes / GIGA:.2f} GB read and written: {_ms(times.memory)}",
        *(f"    {place:42} {count / GIGA:9.3f} GB" for place, count in list(report.traffic.items())[:TRAFFIC_SHOWN]),
        f"  exchange   {report.exchanged_bytes / GIGA:.3f} GB sent: {_ms(times.links)} on links,"
        f" {_ms(times.network)} on the network{_beside_needed(report)}",
        *(f"    {x.kind:18} {'+'.join(x.axes):12} {x.count:7,} times {x.bytes / GIGA:9.3f} GB" for x in report.moved),
        f"  estimate   {bound} bounds a step at {_ms(seconds)} (MFU {report.mfu(seconds):.1%}); nothing overlapped it"
        f" takes {_ms(total)}: {report.tokens_per_second:,.0f} tokens/s, MFU {report.mfu(total):.1%}",
        *_by_schedule(report),
        *_kernels(report),
        *(f"  {line}" for line in whole_lines(report.lowered.params, report.mesh)),
        *_left_out(report),
    ]
    return "\n".join(lines)


def _by_schedule(report: Report) -> list[str]:
    if (found := report.scheduled) is None:
        return []
    beside = f"{_ms(found.exposed)} of the exchange beside nothing"
    return [f"  schedule   {_ms(found.total)}, exchange beside what stands until it is waited for: {beside}"]


def _kernels(report: Report) -> list[str]:
    def told(name: str, of: KernelRuns) -> str:
        copies = f", copies of {of.copied_bytes / GIGA:.3f} GB for them" if of.copies else ""
        return f"{name} {of.runs:,} times{copies}"

    found = "; ".join(told(*item) for item in report.kernels.items())
    return [f"  kernels    {found}"] if found else []


def _left_out(report: Report) -> list[str]:
    lines = []
    if report.silent_kernels:
        calls = f"{report.silent_kernels:,} calls of kernels, which do not say theirs"
        lines.append(f"  left out   FLOPs of {calls}: compute is that of the model's at the least")
    if report.unknown_loops:
        lines.append(f"  left out   all turns but one of {len(report.unknown_loops)} loops of unknown length")
    return lines


def _needed(lowered: Lowered, mesh: Mesh, dtype: str) -> float:
    if not lowered.microbatches:
        return 0.0
    return fsdp_bytes(lowered.params, mesh, jnp.dtype(dtype).itemsize, lowered.microbatches)


def _beside_needed(report: Report) -> str:
    if not report.needed_bytes:
        return ""
    times = report.exchanged_bytes / report.needed_bytes
    return f"; {times:.2f} times the {report.needed_bytes / GIGA:.3f} GB of weights and gradients"


def _mesh(mesh: Mesh) -> str:
    return ",".join(f"{axis}:{size}" for axis, size in mesh.shape.items() if size > 1) or "one device"


def _mib(count: float) -> str:
    return f"{count / MIB:,.0f} MiB"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.2f} ms"


def _versions() -> dict[str, str]:
    found = {}
    for library in LIBRARIES:
        try:
            found[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
