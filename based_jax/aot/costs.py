"""What each device computes and moves in a compiled program, loops as often as they run.

FLOPs are those of matrix products and of kernels that say theirs. Bytes are what instructions read from main memory and
write to it, in whole tiles: what stays on the chip (VMEM, by its memory space) is free, a slice of an array costs the
slice, and an update in place the update.
"""

import collections
import math
import re
from collections.abc import Callable, Iterator

import numpy as np

from based_jax.aot.hlo import ASYNCHRONOUS_FUSION, FUSION, ArrayType, Instruction, Program

KERNEL_FLOPS = re.compile(r'\\?"flops\\?":\s*\\?"?(\d+)')
KERNEL_CALLS = "tpu_custom_call", "mosaic_gpu", "triton_kernel_call", "cudnn"
PASSES = {"highest": 6, "high": 3}
"""Products in bf16 that a TPU makes for one in fp32, by its precision."""

VALUES = "parameter", "constant", "iota", "partition-id", "replica-id"
NAMES = "tuple", "get-tuple-element", "bitcast", "after-all", "add-dependency", "opt-barrier", "domain", "async-update"
CALLS = "while", "conditional", "call"
NO_TRAFFIC = frozenset([*VALUES, *NAMES, *CALLS])
FREE_CALLS = "AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound", "AsyncCollective", "SliceBitcast"
BLOCK = re.compile(r"block_\d+/(.+)")
BESIDE_BLOCKS = re.compile(r"\b(head|embed|optimizer|norm|stack)(?:_\d+)?\b")
"""Parts of a model and its step; a stack is what a scan over its blocks adds to them."""
TRACED = "while", "body", "cond", "checkpoint", "eval_jaxpr", "closed_call", "rematted_computation"
"""Names in a scope that tracing adds."""
SLICES = "slice", "dynamic-slice", "gather"
RENAMES = "bitcast", "reshape"


def flops(program: Program, passes: bool = False) -> float:
    """Return the FLOPs of one device; with `passes`, fp32 products as often as a TPU's precision makes them."""
    return sum(run.times * instruction_flops(program, run.instruction, passes) for run in program.runs)


def instruction_flops(program: Program, x: Instruction, passes: bool = False) -> float:
    """Return the FLOPs of one run of an instruction."""
    if x.kind == "custom-call":
        found = KERNEL_FLOPS.search(x.rest)
        return float(found[1]) if found else 0.0
    if x.kind not in ("dot", "convolution"):
        return 0.0
    operands = program.operands(x)
    count = _dot_flops(x, operands) if x.kind == "dot" else _convolution_flops(x, operands)
    wide = passes and all(operand.dtype == "f32" for operand in operands)
    return count * (_passes(x) if wide else 1)


def silent_kernels(program: Program) -> int:
    """Return how many kernels run that say no FLOPs, each as often as it does."""
    kernels = [run for run in program.runs if run.instruction.kind == "custom-call" and is_kernel(run.instruction)]
    return sum(run.times for run in kernels if not KERNEL_FLOPS.search(run.instruction.rest))


def memory_bytes(program: Program, on_chip: tuple[int, ...] = ()) -> float:
    """Return the bytes that one device reads from main memory and writes to it; `on_chip` are the other spaces."""
    return sum(count for _, count in traffic(program, on_chip))


def traffic(program: Program, on_chip: tuple[int, ...] = ()) -> Iterator[tuple[Instruction, float]]:
    """Yield each instruction that moves bytes of main memory, and how many in all of its runs."""
    counter = _Traffic(program, on_chip)
    seen: set[str | None] = set()
    for x, times, fusion in program.runs:
        if fusion is None and x.kind not in NO_TRAFFIC:
            yield x, times * counter.bytes(x)
        elif fusion is not None and x.chain not in (None, *seen):
            seen.add(x.chain)
            yield x, times * counter.bytes(x)


def seconds_by_instruction(
    program: Program, flops_per_second: float, bytes_per_second: float
) -> Callable[[Instruction], float]:
    """Return `(instruction) -> seconds` of one run: of its products or of its bytes, whatever takes longer."""
    counter = _Traffic(program, ())

    def products(x: Instruction) -> float:
        fused = [y for name in x.called for y in program.computations.get(name, ())] if x.kind == FUSION else []
        return instruction_flops(program, x) + sum(map(products, fused))

    def seconds(x: Instruction) -> float:
        if x.kind in NO_TRAFFIC:
            return 0.0
        return max(products(x) / flops_per_second, counter.bytes(x) / bytes_per_second)

    return seconds


def traffic_by_scope(program: Program, on_chip: tuple[int, ...] = ()) -> dict[str, float]:
    """Return the bytes of main memory by pass, layer and operation, as "backward mlp/project", the most first.

    What has no such place, as copies that the compiler adds, goes by its kind.
    """
    total: dict[str, float] = collections.defaultdict(float)
    for x, count in traffic(program, on_chip):
        total[place_of(program, x)] += count
    return dict(sorted(total.items(), key=lambda item: -item[1]))


def place_of(program: Program, x: Instruction) -> str:
    """Return the pass, layer and operation that an instruction is of, or its kind."""
    scope = program.scopes[x.name]
    found = BLOCK.search(scope) or BESIDE_BLOCKS.search(scope)
    if found is None:
        return x.kind
    names = [name for name in found[1].split("/") if name not in TRACED and "(" not in name]
    again = "recomputed" if "rematted_computation" in scope else None
    which = again or ("backward" if "transpose(" in scope else "forward")
    return f"{which} {'/'.join(names[:2])}"


class _Traffic:
    """The bytes of main memory that instructions move."""

    def __init__(self, program: Program, on_chip: tuple[int, ...]):
        self.program, self.on_chip = program, on_chip

    def bytes(self, x: Instruction) -> float:
        if x.kind == FUSION:
            return self._fused_reads(x) + self._fused_writes(x.called[0], x.results)
        if x.kind == ASYNCHRONOUS_FUSION:  # its type names what it takes and a number of its own besides
            return self._fused_reads(x) + self._fused_writes(x.called[0], x.results[len(x.operands) : -1])
        if _is_free(x) and not x.chain:
            return 0.0
        if x.kind in ("slice-start", "dynamic-slice-start", "copy-start"):
            return self._transfer(x)
        if x.kind in SLICES:
            return 2 * self._size(x.results)
        if x.kind == "dynamic-update-slice":
            return 2 * self._size(self._types(x.operands[1:2]))
        if x.kind == "scatter":
            return 3 * self._size(self._types(x.operands[-1:]))
        if x.kind.endswith("-done"):
            return 0.0
        if x.kind == "custom-call":  # a kernel may take parts of an array as several of its arguments
            return self._size(self._types(list(dict.fromkeys(map(self._original, x.operands))))) + self._size(x.results)
        written = x.results[1:2] if x.kind.endswith("-start") else x.results
        return self._size(self.program.operands(x)) + self._size(written)

    def _original(self, name: str) -> str:
        """Return what a bitcast, or one of one, is of."""
        made = self.program.by_name.get(name)
        return name if made is None or made.kind != "bitcast" else self._original(made.operands[0])

    def _transfer(self, x: Instruction) -> float:
        """Return the bytes of an asynchronous copy, of which the smaller end is all that moves."""
        ends = [*self.program.operands(x)[:1], *(r for r in x.results if r.shape and r.dtype != "u32")]
        off_chip = [end for end in ends if end.space not in self.on_chip]
        both = len(off_chip) == len(ends)
        return min(end.padded_bytes for end in ends) * (2 if both else bool(off_chip))

    def _fused_reads(self, x: Instruction) -> float:
        return sum(self._read(x.called[0], i, name) for i, name in enumerate(x.operands))

    def _read(self, computation: str, index: int, operand: str) -> float:
        """Return the bytes that a fused computation reads of an operand: all, or the slices of it that are used."""
        types = self._types([operand])
        whole = self._size(types)
        if whole == 0:
            return 0.0
        parameter = self._parameter(computation, index)
        return whole if parameter is None else min(whole, self._used(computation, parameter, whole))

    def _used(self, computation: str, name: str, whole: float) -> float:
        found = 0.0
        for user in self.program.computations[computation]:
            if name not in user.operands:
                continue
            if user.kind in SLICES and user.operands[0] == name:
                found += sum(r.padded_bytes for r in user.results)
            elif user.kind in RENAMES:
                found += self._used(computation, user.name, whole)
            elif user.kind == FUSION:
                inner = self._parameter(user.called[0], user.operands.index(name))
                found += whole if inner is None else self._used(user.called[0], inner, whole)
            elif not (_is_free(user) or (user.kind == "dynamic-update-slice" and user.operands[0] == name)):
                return whole
        return found

    def _fused_writes(self, computation: str, results: tuple[ArrayType, ...]) -> float:
        root = self.program.root(computation)
        if _is_free(root) and root.kind != "tuple":
            return 0.0
        parts = [self.program.by_name[name] for name in root.operands] if root.kind == "tuple" else [root]
        if len(parts) != len(results):
            return self._size(results)
        return sum(self._written(part, result) for part, result in zip(parts, results, strict=True))

    def _written(self, x: Instruction, result: ArrayType) -> float:
        if x.kind == "parameter" or _is_free(x):
            return 0.0
        if x.kind in RENAMES:
            return self._written(self.program.by_name[x.operands[0]], result)
        if x.kind == FUSION and len(x.results) == 1:
            return self._written(self.program.root(x.called[0]), result)
        if x.kind == "dynamic-update-slice" and result.space not in self.on_chip:
            return sum(t.padded_bytes for t in self._types(x.operands[1:2]))
        return self._size([result])

    def _parameter(self, computation: str, index: int) -> str | None:
        lines = self.program.computations[computation]
        return next((x.name for x in lines if x.kind == "parameter" and x.rest.startswith(f"{index})")), None)

    def _types(self, names: list[str]) -> list[ArrayType]:
        return [r for name in names if name in self.program.by_name for r in self.program.by_name[name].results]

    def _size(self, types) -> float:
        return sum(x.padded_bytes for x in types if x.space not in self.on_chip)


def _dot_flops(x: Instruction, operands: list[ArrayType]) -> float:
    contracted = math.prod(operands[0].shape[i] for i in x.numbers("lhs_contracting_dims"))
    return 2 * math.prod(x.results[0].shape) * contracted


def _convolution_flops(x: Instruction, operands: list[ArrayType]) -> float:
    """Return the FLOPs of a convolution, without products with the zeros that pad and dilate it."""
    left, kernel, result = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", x.rest).groups()  # type: ignore[union-attr]
    window = dict(re.findall(r"(\w+)=([\w-]+)", _window(x)))
    pairs = 1
    for i in range(len(left) - 2):
        sizes = (operands[0].shape[left.index(str(i))], operands[1].shape[kernel.index(str(i))])
        pairs *= _pairs(*sizes, x.results[0].shape[result.index(str(i))], window, i)
    outputs = x.results[0].shape[result.index("b")] * x.results[0].shape[result.index("f")]
    return 2 * outputs * operands[1].shape[kernel.index("i")] * pairs


def _window(x: Instruction) -> str:
    found = re.search(r"window=\{([^}]*)\}", x.rest)
    return found[1] if found else ""


def _pairs(size: int, taps: int, outputs: int, window: dict[str, str], axis: int) -> int:
    """Return how many (output, tap) of one dimension meet an element of the input."""

    def option(name: str, default: str) -> str:
        return window[name].split("x")[axis] if name in window else default

    before = int(option("pad", "0_0").split("_")[0])
    stride, holes, spread = (int(option(name, "1")) for name in ("stride", "lhs_dilate", "rhs_dilate"))
    places = np.arange(outputs)[:, None] * stride + np.arange(taps)[None] * spread - before
    return int(np.sum((places >= 0) & (places <= (size - 1) * holes) & (places % holes == 0)))


def _passes(x: Instruction) -> int:
    found = re.search(r"operand_precision=\{(\w+)", x.rest)
    return PASSES.get(found[1], 1) if found else 1


def _is_free(x: Instruction) -> bool:
    """Return whether an instruction only hands on what it takes; the pieces of a collective in fusions do."""
    if x.kind == "custom-call":
        return any(name in x.rest for name in FREE_CALLS)
    return x.kind == "tuple" or x.chain is not None


def is_kernel(x: Instruction) -> bool:
    """Return whether an instruction is a kernel: what it computes XLA does not know."""
    return any(f'custom_call_target="{name}' in x.rest for name in KERNEL_CALLS)
