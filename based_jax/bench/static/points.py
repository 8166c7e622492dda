"""Calls on chips in both forms, each compiled for a row, and rows compared with those kept before."""

import functools
import importlib.metadata
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding

from based_jax import devices
from based_jax.aot import costs, topology
from based_jax.aot.hlo import Program
from based_jax.aot.kernels import kernels as kernels_of
from based_jax.aot.report import ON_CHIP
from based_jax.bench import rows
from based_jax.bench.static import calls, passes, schedules
from based_jax.errors import UserError

SLICES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "v7x": "v7x:2x2x1"}
CORES = {"v5p": 2}
"""Over which the programs of one of JAX's devices are divided, where they are several."""
CALLS = calls.CALLS | passes.CALLS
FORMS = "tpu", "xla"
POINTS = {
    f"{call} {chip} {impl}": (call, chip, impl)
    for call in CALLS
    for chip in SLICES
    for impl in passes.FORMS.get(call, FORMS)
}
LARGEST_GROWTH = 1.1
"""Of a kernel's bundles, before it is told as a regression."""

CYCLES = re.compile(r'^ +(?:ROOT )?%\S+ = .*? (?:fusion|convolution)\(.*"estimated_cycles":"(\d+)"', re.MULTILINE)
COMPUTATION = re.compile(r"^(ENTRY )?%(\S+) \(.*\{\n((?:.*\n)*?)\}", re.MULTILINE)
LOOP = re.compile(r" while\(.*condition=%([^\s,]+), body=%([^\s,]+)")
TURNS = re.compile(r"= s32\[\]\S* constant\((\d+)\)")
COPIED = re.compile(r"= \w+\[([\d,]+)\]\S* copy\(")
VMEM = re.compile(r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"\d+","size":"(\d+)"')


def chosen(chips: Iterable[str], only: str = "") -> list[str]:
    """Return the points of chips whose name contains a text; UserError where there are none."""
    found = [name for name, (_, chip, _) in POINTS.items() if chip in chips and only in name]
    if not found:
        raise UserError(f"No point of {' '.join(chips)} has '{only}' in its name; their calls are {', '.join(CALLS)}.")
    return found


def row_of(name: str, dump: Path, *, is_kept: bool) -> dict[str, Any]:
    """Compile a point, whose schedules libtpu writes into a folder, and return its row.

    Where it is kept, it tells of the program whose layouts are free as well, which for a kernel is another one.
    """
    of, chip, impl = POINTS[name]
    call, device = CALLS[of](), topology.find(SLICES[chip]).devices[0]
    schedules.empty(dump)
    function = functools.partial(call.function, impl=impl)
    text = compiled_text(function, call.arguments, device, call.donated)
    entry = text[text.index("\nENTRY ") :]
    kernels = {name: schedules.of_kernel(dump, name) for name in call.cycles} if impl == "tpu" else {}
    in_kernels = sum(call.cycles[name](schedule) for name, schedule in kernels.items())
    cycles = in_kernels // CORES.get(chip, 1) if kernels else cycles_of_xla(text)
    spilled = sum(schedules.spills(dump, part) for part in kernels or [""])
    free = functools.partial(compiled_text, function, call.arguments, device, layout=Layout.AUTO)
    whole = _whole_program(Program(free() if kernels else text), bool(kernels)) if is_kept else {}
    copied = COPIED.findall(entry)
    known = devices.find(device.device_kind)
    assert known is not None and known.hbm_bytes_per_second is not None
    return {
        "point": name,
        "call": of,
        "chip": chip,
        "impl": impl,
        "state": call.state,
        "moved_bytes": call.moved_bytes,
        "hbm_microseconds": call.moved_bytes / known.hbm_bytes_per_second * 1e6,
        "cycles": cycles,
        "bundles_per_token_and_head": cycles / call.tokens / call.heads,
        "schedules": kernels or None,
        "spills": spilled,
        "vmem_bytes": max(map(int, VMEM.findall(text)), default=None),
        "copies": len(copied),
        "copied": ",".join(map(str, call.state)) in copied,
        **whole,
        "flops": call.flops,
        "device": device.device_kind,
        "versions": {library: importlib.metadata.version(library) for library in ("jax", "jaxlib", "libtpu")},
        **rows.origin(),
    }


def _whole_program(program: Program, has_kernels: bool) -> dict[str, Any]:
    return {
        "relayouts": sum(of.copies for of in kernels_of(program).values()) if has_kernels else None,
        "program_bytes": costs.memory_bytes(program, ON_CHIP["tpu"]),
        "program_flops": costs.flops(program),
    }


def compiled_text(
    function: Callable,
    arguments: Callable[[], tuple],
    device: jax.Device,
    donated: tuple[int, ...] = (),
    layout: Any = None,
) -> str:
    """Return what a call is compiled to for a device, that may write donated arguments.

    Arguments and results are laid out as a call's are by default, or as `layout` says.
    """
    mesh = Mesh(np.asarray([device]), ("data",))
    given = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, jax.P())),
        jax.eval_shape(arguments),
    )
    free = Format(layout, NamedSharding(mesh, jax.P()))
    options: dict[str, Any] = {} if layout is None else {"in_shardings": free, "out_shardings": free}
    with jax.set_mesh(mesh):
        return jax.jit(function, donate_argnums=donated, **options).trace(*given).lower().compile().as_text() or ""


def cycles_of_xla(text: str) -> int:
    """Return what its compiler expects of the operations of a program but copies, those of loops as often as they run.

    A loop that runs until its numbers say so does not count: one turn or none adds recent tokens to Taylor attention's
    state, and a point is of a token that adds nothing to it. Of what it calls and knows no cycles of, such as the
    inverses of a triangular solve, it expects none.
    """
    found = COMPUTATION.findall(text)
    bodies, [entry] = {name: body for _, name, body in found}, [body for is_entry, _, body in found if is_entry]

    def cycles(body: str) -> int:
        loops = ((map(int, TURNS.findall(bodies[end])), bodies[turn]) for end, turn in LOOP.findall(body))
        return sum(map(int, CYCLES.findall(body))) + sum(max(turns, default=0) * cycles(turn) for turns, turn in loops)

    return cycles(entry)


def line(row: dict[str, Any]) -> str:
    """Return a row as it is printed."""
    vmem = "-" if row["vmem_bytes"] is None else f"{row['vmem_bytes'] / 2**20:.1f} MiB"
    return (
        f"{row['point']}: {row['bundles_per_token_and_head']:.2f} bundles a token and head, "
        f"{row['spills']} spills, VMEM {vmem}, {row['copies']} copies"
    )


def regression(row: dict[str, Any], kept: Iterable[dict[str, Any]]) -> str | None:
    """Return how a kernel's row is worse than the one kept of the same point by more than `LARGEST_GROWTH`, or None."""
    [before] = [old for old in kept if old["point"] == row["point"]] or [row]
    old, new = (r["bundles_per_token_and_head"] for r in (before, row))
    if row["impl"] == "tpu" and new > LARGEST_GROWTH * old:
        return f"{row['point']}: {new:.2f} bundles a token and head, and were {old:.2f}"
    return None


def read(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file; UserError where there is none."""
    if not path.is_file():
        raise UserError(f"There are no rows at '{path}'.")
    return rows.read(path)


def keep(row: dict[str, Any], path: Path | None) -> None:
    """Write a row into a file, without a path into none: in the points' order, where that of its point was."""
    if path is None:
        return
    by_point = {old["point"]: old for old in rows.read(path)} | {row["point"]: row}
    with rows.replaced(path) as write:
        for point in POINTS:
            if point in by_point:
                write(by_point[point])
