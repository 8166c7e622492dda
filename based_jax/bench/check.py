"""Every kernel against its definition in fp64, on one GPU: results and gradients, one row a case.

What decodes has no gradients: its results, the states after it among them, are compared.

A case passes where each result's error (the norm of the difference over the norm of the oracle's) is below 5e-3, no
token's row is off by more than a quarter of its norm or of those about it, every element is finite though the memory
held NaN before, and a second run gives the same bits. A weight's gradient sums over rows, and its error is over the
norm that it would have if these did not cancel.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent import futures

import jax
import jax.numpy as jnp
import numpy as np

from based_jax.bench import cases, comparison, huge, rows, subprocesses
from based_jax.bench.catalogue import OPERATIONS
from based_jax.bench.catalogue.operation import Case
from based_jax.bench.comparison import by_rows, judged
from based_jax.errors import UserError, unknown
from based_jax.ops.dispatch import backend_of

CHECKED_COMPILE_THREADS = 2
"""Programs that a process compiles at the same time; Python works at one of them at a time."""
NAN_BUFFERS = 3
"""Of each size that a call will ask for."""


@dataclasses.dataclass(frozen=True)
class CaseSelection:
    """Which calls are checked.

    Attributes:
      only: a part of their names.
      quick: those of the quick set, and no huge ones.
      impl: by which implementation or backend's first, of the operations that have it; without one by all that run
        kernels of our own.

    Raises:
      UserError: no operation has that implementation.
    """

    only: str = ""
    quick: bool = False
    impl: str = ""

    def __post_init__(self):
        tables = [operation.table for operation in OPERATIONS.values()]
        known = {x for table in tables for key in table for x in (key, backend_of(key))}
        if self.impl and self.impl not in known:
            raise unknown("implementation", self.impl, known)

    def cases(self) -> list[Case]:
        """Return the cases, the huge ones apart."""
        found = cases.all_cases()
        if self.impl:
            found = [case.by(x) for case in found for x in OPERATIONS[case.operation].impls([self.impl])]
        return [x for x in dict.fromkeys(found) if self.only in str(x) and (x.quick or not self.quick)]

    def huge_cases(self) -> list[tuple[str, Callable[[int, str], dict], str]]:
        """Return names, functions of a seed and an implementation, and these."""
        operation = OPERATIONS["taylor_attention"]
        chosen = operation.impls([self.impl]) if self.impl else operation.kernels
        impls = [x for x in operation.kernels if x in chosen and not self.quick]
        found = [(f"{name} impl={impl}", call, impl) for impl in impls for name, call in huge.CASES.items()]
        return [x for x in found if self.only in x[0]]

    def words(self) -> list[str]:
        """Return the selection as arguments of the command."""
        return [f"--impl={self.impl}", f"--only={self.only}"] + ["--quick"] * self.quick


def checked(selection: CaseSelection, seed: int, processes: int, limit: float) -> Iterator[dict]:
    """Yield the rows of the selected cases, from processes or, where there are 0, from here, and of the huge ones."""
    chosen = selection.cases()
    if processes:
        yield from subprocesses.rows_of(chosen, processes, [*selection.words(), f"--seed={seed}"], limit)
    else:
        yield from (row | rows.facts() for row in rows_of(chosen, seed))
    # Last, and here: they take the GPU's whole memory, which the other processes have given back.
    for name, call, impl in selection.huge_cases():
        yield attempt(name, call, seed, impl) | rows.facts()


def print_part(selection: CaseSelection, seed: int, processes: int, number: int) -> None:
    """Print the rows of the cases that one of the processes checks, for the one that started it."""
    for row in rows_of(subprocesses.parts(selection.cases(), processes)[number], seed):
        print(json.dumps(row | rows.facts()), flush=True)


def rows_of(chosen: Iterable[Case], seed: int) -> Iterator[dict]:
    """Yield the row of each case; what fails in any way is a row, and does not end the others."""
    with futures.ThreadPoolExecutor(CHECKED_COMPILE_THREADS) as pool:
        programs: dict[tuple, futures.Future] = {}

        def ready(kind: str, compile: Callable, case: Case) -> futures.Future:
            if (kind, case) not in programs:
                programs[kind, case] = pool.submit(compile, case)
            return programs[kind, case]

        work = []
        for case in chosen:
            kernel = ready("kernel", compile_case, cases.same_program(case))
            work.append((case, kernel, ready("oracle", compile_oracle, cases.same_oracle(case))))
        for case, kernel, oracle in work:
            yield attempt(str(case), check, case, kernel, oracle, seed)


def attempt(what: str, call: Callable[..., dict], *arguments) -> dict:
    """Return the row of a case, of its refusal by the implementation, or of its failure."""
    begin = time.perf_counter()
    try:
        row = call(*arguments)
    except UserError as error:
        row = {"passed": False, "refused": str(error)}
    except Exception as error:
        row = {"passed": False, "failure": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"}
    return {"what": what} | row | {"seconds": round(time.perf_counter() - begin, 2)}


def compile_case(case: Case) -> jax.stages.Compiled:
    """Return the passes of a case, compiled."""
    ids = jax.ShapeDtypeStruct(case.places, jnp.int32) if case.documents else None
    passes = jax.jit(cases.passes_of(case, cases.function_of(case)))
    return passes.lower(cases.gradients_of(case), cases.arrays_of(case), ids).compile()


def compile_oracle(case: Case) -> jax.stages.Compiled:
    """Return the passes of a case's oracle, `by_rows` and compiled; the case is a `same_oracle` one."""
    with jax.enable_x64(True):
        wide = [
            {name: jax.ShapeDtypeStruct(x.shape, jnp.float64) for name, x in shapes(case).items()}
            for shapes in (cases.gradients_of, cases.arrays_of)
        ]
        ids = jax.ShapeDtypeStruct(case.places, jnp.int32)
        operation = OPERATIONS[case.operation]
        oracle = by_rows(cases.passes_of(case, operation.oracle(case)), operation.weights)
        return jax.jit(oracle).lower(*wide, ids).compile({"xla_gpu_autotune_level": 0})


def check(case: Case, kernel: futures.Future, oracle: futures.Future, seed: int) -> dict:
    """Return the row of a case, given its programs."""
    run, define = kernel.result(), oracle.result()
    inputs = cases.draw(case, case.rng(seed))
    given = jax.block_until_ready(jax.device_put(inputs))
    poison(run)
    first = jax.device_get(run(*given))
    poison(run)
    second = jax.device_get(run(*given))
    with jax.enable_x64(True):
        filled, sizes = jax.device_get(define(*cases.complete(case, *inputs)))
    wanted = {name: comparison.cropped(filled[name], x.shape) for name, x in first.items()}
    least = comparison.floors(inputs[1])
    least |= {name: max(least[name], size) for name, size in sizes.items()}
    found = {
        "errors": {name: comparison.error(x, wanted[name], least.get(name, 0.0)) for name, x in first.items()},
        "rows": {
            name: comparison.error_of_rows(of_tokens(case, x), of_tokens(case, wanted[name]), least.get(name, 0.0))
            for name, x in first.items()
            if x.shape[: len(case.places)] == case.places
        },
        "finite": all(map(comparison.finite, first.values())),
        "same_bits": all(comparison.same_bits(x, second[name]) for name, x in first.items()),
    }
    return {"seed": seed} | dataclasses.asdict(case) | judged(found)


def of_tokens(case: Case, x: np.ndarray) -> np.ndarray:
    """Return a result of tokens as (B, T, ..., width), a step's with T of 1."""
    return x if len(case.places) > 1 else x[:, None]


def poison(kernel: jax.stages.Compiled) -> None:
    """Fill the memory that a call is about to be given with NaN: the allocator hands out what it got back last."""
    memory = kernel.memory_analysis()
    sizes = [x.size * x.dtype.itemsize for x in jax.tree.leaves(kernel.out_info)]
    sizes.append(memory.temp_size_in_bytes if memory else 0)
    buffers = [np.full(size // 2 + 1, np.nan, jnp.bfloat16) for size in sizes]
    held = jax.block_until_ready([jax.device_put(x) for x in buffers for _ in range(NAN_BUFFERS)])
    for x in held:
        x.delete()


def failed(found: Sequence[dict], *, refusals: bool) -> list[str]:
    """Return what did not pass; refusals count where they are asked for, or where nothing passed."""
    refusals = refusals or not any(row["passed"] for row in found)
    return [row["what"] for row in found if not row["passed"] and (refusals or "refused" not in row)]


def summary(found: Sequence[dict]) -> str:
    """Return how many passed, how many calls were left, and the largest error."""
    left = sum("refused" in row for row in found)
    passed = f"{sum(row['passed'] for row in found)} of {len(found) - left} passed"
    errors = [(max(row["errors"].values(), default=0), row["what"]) for row in found if "errors" in row]
    largest = "largest error {:.1e} ({})".format(*max(errors)) if errors else "nothing was compared"
    return ", ".join([passed, *([f"{left} left by their implementations"] if left else []), largest])


def line(row: dict) -> str:
    """Return a row of the printed table."""
    if "refused" in row:
        return f"left {row['what']}: {row['refused']}"
    start = f"{'ok  ' if row['passed'] else 'BAD '}{row['what']}"
    if "failure" in row:
        return f"{start}: {row['failure']}"
    numbers = " ".join(f"{name} {x:.1e}" for name, x in row["errors"].items())
    words = [] if row["finite"] else ["NOT FINITE"]
    words += [] if row["same_bits"] else ["OTHER BITS"]
    row_error = max(row["rows"].values(), default=0)
    return " ".join([f"{start}: {numbers} | rows {row_error:.1e}", *words, f"| {row['seconds']:.1f} s"])
