"""Compilation with what the compiler says besides: that it does not fit, and that it copies an array to all devices."""

import contextlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

from based_jax.aot.hlo import Program
from based_jax.errors import UserError

REMATERIALIZED = "involuntary full rematerialization"
TOO_MUCH_MEMORY = "RESOURCE_EXHAUSTED"
SIZE = r"\(?([\d.]+[KMG]?)\)?"
USED_AND_THERE = re.compile(rf"{SIZE} exceeds available \w+ {SIZE}|Used {SIZE} of {SIZE}")
REPORTED = re.compile(r"^ *[\d.]+\w*\( *\d+%\); +([\d.]+\w+); +\d+; +\d+; +(?:\d+×)?(.*)$", re.MULTILINE)
"""A line of libtpu's report: sum of sizes, size, offset, number of values, shapes; two of its parts name the same."""
LARGEST_SHOWN = 5
WATCH = 'read -r alive || { cat "$1" >&2; rm -f "$1"; }'
"""Of a shell whose input ends with the process that it watches, unless that says so before."""
NO_BUFFERS = frozenset(("parameter", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "opt-barrier"))


class DoesNotFit(UserError):
    """A program that needs more memory than a device has."""


class Compiled(NamedTuple):
    """A compiled program.

    Attributes:
      text: of the program.
      memory: of a device.
      rematerialized: what the compiler said of arrays that it copies to all devices.
      seconds: to compile it.
    """

    text: str
    memory: "Memory"
    rematerialized: list[str]
    seconds: float


class Memory(NamedTuple):
    """Bytes of each device; `peak` is what a program needs there at once, its code too."""

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int
    peak: int


class Buffer(NamedTuple):
    """An array that a program makes on each device."""

    bytes: float
    array: str
    scope: str


def compiled(lowered: jax.stages.Lowered) -> Compiled:
    """Compile; what the compiler writes is kept from the terminal but for what is told here.

    Raises:
      DoesNotFit: a device has too little memory, as its compiler knows.
    """
    begin = time.perf_counter()
    lines: list[str] = []
    try:
        with captured_stderr(lines):
            executable = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if TOO_MUCH_MEMORY not in str(error):
            raise
        raise DoesNotFit(too_much([str(error), *lines])) from None
    copied = [_short(line) for line in lines if REMATERIALIZED in line.lower()]
    return Compiled(executable.as_text() or "", memory_of(executable), copied, time.perf_counter() - begin)


@contextlib.contextmanager
def captured_stderr(lines: list[str]) -> Iterator[None]:
    """Append the lines that this process writes to standard error, those of C++ too, when the context ends.

    Where the process dies in it, as of a failed check of the compiler's, they are written after all.
    """
    sys.stderr.flush()
    with tempfile.NamedTemporaryFile() as file, _written_if_killed(file.name):
        kept = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            lines.extend(file.read().decode(errors="replace").splitlines())


@contextlib.contextmanager
def _written_if_killed(path: str) -> Iterator[None]:
    """Have a process of its own write a file to standard error, and remove it, if this one dies in the context."""
    with subprocess.Popen(["sh", "-c", WATCH, "sh", path], stdin=subprocess.PIPE, start_new_session=True) as watcher:
        try:
            yield
        finally:
            watcher.communicate(b"alive\n")


def memory_of(executable: jax.stages.Compiled) -> Memory:
    """Return what a compiled program needs on each device."""
    found: Any = executable.memory_analysis()
    arguments, outputs, aliased = found.argument_size_in_bytes, found.output_size_in_bytes, found.alias_size_in_bytes
    temporaries, code = found.temp_size_in_bytes, found.generated_code_size_in_bytes
    peak = arguments + outputs - aliased + temporaries + code
    return Memory(arguments, outputs, aliased, temporaries, code, peak)


def largest_buffers(program: Program, on_chip: tuple[int, ...], most: int = LARGEST_SHOWN) -> list[Buffer]:
    """Return the largest different arrays that a program makes in main memory, those of its arguments left out."""
    found: dict[str, Buffer] = {}
    for run in program.runs:
        if run.fusion is None and run.instruction.kind not in NO_BUFFERS:
            for x in run.instruction.results:
                if x.space not in on_chip:
                    found.setdefault(str(x), Buffer(x.padded_bytes, str(x), run.instruction.scope))
    return sorted(found.values(), key=lambda buffer: -buffer.bytes)[:most]


def too_much(lines: list[str]) -> str:
    """Return one sentence on a program that does not fit, from what a compiler says of it."""
    text = "\n".join(lines)
    found = USED_AND_THERE.search(text)
    if not found:
        return lines[0]
    used, there = [part for part in found.groups() if part]
    of_hbm = text.partition("Memory Space: vmem")[0]
    largest = dict.fromkeys(f"{array} ({size})" for size, array in REPORTED.findall(of_hbm))
    named = f"; its largest buffers are {', '.join(list(largest)[:LARGEST_SHOWN])}" if largest else ""
    return f"The program does not fit: it takes {used} of the {there} that a device has{named}."


def _short(line: str) -> str:
    """Return the operation of a line of the compiler's."""
    found = re.search(r"for HLO operation:? (.*?)(?:, metadata|, sharding|$)", line)
    scope = re.search(r'op_name="([^"]*)"', line)
    return " ".join(part for part in (found[1] if found else line, scope[1] if scope else "") if part)
