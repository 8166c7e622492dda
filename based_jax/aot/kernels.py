"""Which kernels a compiled program runs, and what it copies into another layout for them."""

import collections
from collections.abc import Iterator
from typing import NamedTuple

from based_jax.aot import costs
from based_jax.aot.hlo import FUSIONS, Instruction, Program

MOVES = frozenset(("copy", "transpose"))
"""What changes a layout; alone in a fusion with `RENAMES` it does so too."""
RENAMES = frozenset(("bitcast", "reshape", "get-tuple-element", "tuple", "parameter", "opt-barrier"))


class KernelRuns(NamedTuple):
    """How often a kernel runs, and in all of its runs the copies of arguments and results, and their bytes.

    A copy is of an array that is given to the kernel in another layout than it was made, or taken from it; to another
    memory in the same layout is none.
    """

    runs: int = 0
    copies: int = 0
    copied_bytes: float = 0.0


def kernels(program: Program) -> dict[str, KernelRuns]:
    """Return the kernels of a program by their names, without what XLA appends to these."""
    found: dict[str, KernelRuns] = collections.defaultdict(KernelRuns)
    users = _users(program)
    for x, times, _ in program.runs:
        if x.kind != "custom-call" or not costs.is_kernel(x):
            continue
        copies = {copy.name: copy for copy in (*_copied(program, x), *_copied_on(users, program, x))}.values()
        moved = sum(result.padded_bytes for copy in copies for result in copy.results)
        of, name = found[_name(x)], _name(x)
        found[name] = KernelRuns(of.runs + times, of.copies + times * len(copies), of.copied_bytes + times * moved)
    return dict(sorted(found.items()))


def _name(x: Instruction) -> str:
    return x.name.partition(".")[0]


def _users(program: Program) -> dict[str, list[Instruction]]:
    users: dict[str, list[Instruction]] = collections.defaultdict(list)
    for lines in program.computations.values():
        for x in lines:
            for name in set(x.operands):
                users[name].append(x)
    return users


def _copied(program: Program, x: Instruction) -> Iterator[Instruction]:
    """Yield the copies that make what an instruction takes."""
    for name in dict.fromkeys(x.operands):
        made = program.by_name.get(name)
        if made is None:
            continue
        if _is_copy(program, made):
            yield made
        elif made.kind in RENAMES and made.kind != "tuple":
            yield from _copied(program, made)


def _copied_on(users: dict[str, list[Instruction]], program: Program, x: Instruction) -> Iterator[Instruction]:
    """Yield the copies of what an instruction makes."""
    for user in users[x.name]:
        if _is_copy(program, user):
            yield user
        elif user.kind in RENAMES and user.kind != "tuple":
            yield from _copied_on(users, program, user)


def _is_copy(program: Program, x: Instruction) -> bool:
    if x.kind in FUSIONS:
        kinds = {y.kind for name in x.called for y in program.computations.get(name, ())}
        return bool(kinds & MOVES) and kinds <= MOVES | RENAMES
    if x.kind not in MOVES:
        return False
    [of, *_], [result] = program.operands(x), x.results
    return (of.shape, of.minor_to_major, of.tile) != (result.shape, result.minor_to_major, result.tile)
