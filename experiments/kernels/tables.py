"""The README's tables, made from the rows in results/ between their markers."""

import argparse
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import pandas as pd

from based_jax.bench.catalogue.operation import FORWARD, PASSES, Shape
from based_jax.bench.torch_peers import PEERS
from based_jax.pictures.tables import markdown
from experiments.kernels import results

README = Path(__file__).parent / "README.md"
README_TABLE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
NO_ROWS = "No rows yet."
GOALS = {(8, 16, 2048): (45, 260), (2, 16, 8192): (45, 260), (1, 16, 32768): (90, 520)}
"""Microseconds, forward and forward + backward, that the kernels were set."""
FLA = "fla_parallel_based", "fla_fused_chunk_based"
TAYLOR_COLUMNS = {
    "ours": ("taylor_attention", "hopper_chunks"),
    "FLA `parallel_based`": ("taylor_attention", FLA[0]),
    "FLA `fused_chunk_based`": ("taylor_attention", FLA[1]),
    "cuDNN attention": ("attention", "cudnn_flash"),
    "torch attention": ("attention", "torch_sdpa"),
}
OTHER_OPERATIONS = "window_attention_64", "window_attention_128", "gated_short_conv", "residual_rms_norm"
OTHER_COLUMNS = {"ours": "hopper", "cuDNN": "cudnn", "XLA": "xla"}
"""Columns, and whose times they hold: a form's, or a backend's."""
PEER = "peer"
"""The operation's own peer."""
MATRIX_STATE_OPERATIONS = "gated_delta_rule", "simple_gla", "delta_rule", "gated_linear_attention"
SHOWN_STALLS = 4
"""Reasons named for each kernel."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--results", type=Path, default=results.FOLDER)
    parser.add_argument("--readme", type=Path, default=README, help="rewritten between its markers")


def run(args: argparse.Namespace) -> int:
    """Rewrite the README's tables, and print them."""
    text = render(args.readme.read_text(), args.results)
    args.readme.write_text(text)
    for block in README_TABLE.finditer(text):
        print(block[0])
    return 0


def render(text: str, folder: Path) -> str:
    """Return a text with its tables made anew from the rows of a folder."""
    return README_TABLE.sub(lambda block: f"{block[1]}{TABLES[block[2]](folder)}\n{block[3]}", text)


def by_length(folder: Path) -> str:
    """Return times at each length, of the same number of tokens as far as possible."""
    rows = results.measured(folder)
    return _compared(rows, [x for x in results.lengths(rows) if x[2] >= results.LONGEST_SHORT_TOKENS])


def by_batch(folder: Path) -> str:
    """Return times at each number of sequences of 2,048 tokens."""
    rows = results.measured(folder)
    return _compared(rows, results.batches(rows, 2048))


def _compared(rows: dict, shapes: Sequence[Shape]) -> str:
    """Return a table of Taylor attention beside its floor and its peers."""

    def cells(shape: Shape) -> list[str]:
        times = [[results.time_of(rows, *x, which, shape) for which in PASSES] for x in TAYLOR_COLUMNS.values()]
        floors = [results.floor_of(rows, "taylor_attention", which, shape) for which in PASSES]
        fla = [results.best([x[i] for x in times[1:3]]) for i in range(2)]
        pairs = [_pair(floors), f"**{_pair(times[0])}**", *map(_pair, times[1:]), _ratios(fla, times[0])]
        return [_shape(shape), *pairs]

    shapes = [x for x in shapes if results.time_of(rows, *TAYLOR_COLUMNS["ours"], FORWARD, x)]
    header = ["(B, H, T)", "floor", *TAYLOR_COLUMNS, "FLA's best / ours"]
    used = [row for key, row in rows.items() if key[3:] in shapes and key[:2] in TAYLOR_COLUMNS.values()]
    return _table(header, map(cells, shapes), used)


def goals(folder: Path) -> str:
    """Return what was set beside what was reached."""
    rows = results.measured(folder)

    def cells(shape: Shape) -> list[str]:
        ours = [results.time_of(rows, *TAYLOR_COLUMNS["ours"], which, shape) for which in PASSES]
        return [_shape(shape), _pair(GOALS[shape]), _pair(ours), _ratios(ours, GOALS[shape])]

    shapes = [x for x in GOALS if results.time_of(rows, *TAYLOR_COLUMNS["ours"], FORWARD, x)]
    used = [row for key, row in rows.items() if key[3:] in shapes and key[:2] == TAYLOR_COLUMNS["ours"]]
    return _table(["(B, H, T)", "goal", "ours", "ours / goal"], map(cells, shapes), used)


def short(folder: Path) -> str:
    """Return times of short sequences, where the quadratic form may be faster."""
    rows = results.measured(folder)
    forms = {"ours": "hopper_chunks", "quadratic, XLA": "xla_quadratic", "chunked, XLA": "xla_chunks"}

    def cells(shape: Shape) -> list[str]:
        times = [
            [results.time_of(rows, "taylor_attention", impl, which, shape) for which in PASSES]
            for impl in forms.values()
        ]
        return [_shape(shape), *map(_pair, times), _ratios(times[1], times[0])]

    wanted = "taylor_attention", "xla_quadratic", FORWARD
    brief = [x for x in results.lengths(rows) if x[2] <= results.LONGEST_SHORT_TOKENS]
    shapes = [x for x in brief if results.time_of(rows, *wanted, x)]
    used = [row for key, row in rows.items() if key[3:] in shapes and key[1] in forms.values()]
    return _table(["(B, H, T)", *forms, "quadratic / ours"], map(cells, shapes), used)


def others(
    folder: Path,
    operations: Sequence[str] = OTHER_OPERATIONS,
    files: str = "bench*.jsonl",
    impls: Mapping[str, str] = OTHER_COLUMNS,
) -> str:
    """Return times of the other operations, the first implementation's beside those of others."""
    rows = results.measured(folder, files)

    def cells(place: tuple[str, Shape]) -> list[str]:
        op, shape = place
        names = [next(iter(PEERS[op])) if impl == PEER else impl for impl in impls.values()]
        times = [[results.time_of(rows, op, impl, which, shape) for which in PASSES] for impl in names]
        floors = [results.floor_of(rows, op, which, shape) for which in PASSES]
        other = [results.best([x[i] for x in times[1:]]) for i in range(2)]
        return [
            f"`{op}`",
            _shape(shape),
            _pair(floors),
            *map(_pair, times),
            _ratios(times[0], floors),
            _ratios(other, times[0]),
        ]

    used = [row for row in rows.values() if row["op"] in operations]
    places = sorted({(row["op"], results.where(row)) for row in used}, key=lambda x: (operations.index(x[0]), x[1]))
    header = ["operation", "(B, H, T)", "floor", *impls, "ours / floor", "best other / ours"]
    return _table(header, map(cells, places), used)


def later(folder: Path) -> str:
    """Return times of the norms and of the recurrence, which are of another card."""
    operations = "residual_rms_norm", "residual_layer_norm", "delta_rule", "gated_linear_attention"
    return others(folder, operations, "norms_and_recurrence.jsonl")


def chunks(folder: Path) -> str:
    """Return times of matrix states by chunks, and of what else there is."""
    impls = {"ours": "triton_chunks", "FLA": PEER, "token by token": "hopper_steps", "XLA": "xla_chunks"}
    return others(folder, MATRIX_STATE_OPERATIONS, "chunks.jsonl", impls)


def convolutions(folder: Path) -> str:
    """Return times of the short convolution, and of FLA's."""
    return others(folder, ("short_conv",), "convolutions.jsonl", {"ours": "hopper", "FLA": PEER, "XLA": "xla"})


def calls(folder: Path) -> str:
    """Return the kernels of each call, with the time in which none runs."""
    rows = [row for row in results.read(folder, "profile*.jsonl") if row["view"] == "call"]

    def cells(row: dict) -> list[str]:
        parts = ", ".join(f"{_kernel(x)} {_number(x['microseconds'])}" for x in row["kernels"])
        numbers = (_number(row[name]) for name in ("microseconds", "idle_microseconds"))
        shape = *results.where(row), *row.get("dims", ())
        return [f"`{row['op']}`", _shape(shape), row["pass"].replace("+", " + "), *numbers, parts]

    return _table(["operation", "(B, H, T), dims", "pass", "total", "no kernel", "kernels"], map(cells, rows), rows)


def launches(folder: Path) -> str:
    """Return what Nsight Compute saw of each kernel."""
    rows = [row for row in results.read(folder, "profile*.jsonl") if row["view"] == "launch"]
    units = ("tensor_percent", "l1_percent", "l2_percent", "dram_percent", "issue_percent")

    def cells(row: dict) -> list[str]:
        stalls = ", ".join(f"{name} {x:.1f}" for name, x in list(row["stalls"].items())[:SHOWN_STALLS])
        place = _shape(results.where(row)) if "batch" in row else "-"
        busy = [f"{row[name]:.0f} %" if name in row else "-" for name in units]
        sizes = (f"{row[name]:.0f}" if name in row else "-" for name in ("registers", "blocks_at_once"))
        return [f"`{_kernel(row)}`", place, _number(row.get("microseconds")), *busy, *sizes, stalls]

    names = ["tensor cores", "L1 and shared memory", "L2", "DRAM", "issue slots", "registers", "blocks per SM"]
    header = ["kernel", "(B, H, T)", "time", *names, "stalls (warps per issue)"]
    return _table(header, map(cells, rows), rows)


def _kernel(row: dict) -> str:
    """Return a kernel's own name, without what Mosaic adds."""
    return row["kernel"].removesuffix("_mosaic_gpu_kernel")


def checks(folder: Path) -> str:
    """Return how many cases of each operation and implementation passed, and the largest error."""
    rows = [row for row in results.read(folder, "check*.jsonl") if "refused" not in row]
    cases = [(*results.checked(row), row["passed"], max(row.get("errors", {}).values(), default=None)) for row in rows]
    found = pd.DataFrame(cases, columns=["operation", "implementation", "passed", "error"])
    body = [
        [f"`{operation}`", f"`{impl}`", f"{mine['passed'].sum()} of {len(mine)}", _error(mine["error"].max())]
        for (operation, impl), mine in found.groupby(["operation", "implementation"], sort=False)
    ]
    return _table(["operation", "implementation", "cases passed", "largest relative error"], body, rows)


def _error(x: float) -> str:
    return "-" if pd.isna(x) else f"{x:.1e}"


def revisions(folder: Path) -> str:
    """Return how much longer a revision's calls take than another's, each the better of its repeats."""
    rows = results.read(folder, "revisions.jsonl")
    if not rows:
        return NO_ROWS
    found = pd.DataFrame(rows)
    found["shape"] = found["shape"].map(_shape)
    best = found.pivot_table("microseconds", ["op", "shape"], ["revision", "pass"], aggfunc="min", sort=False)
    before, after = (best[revision][list(PASSES)] for revision in found["revision"].unique())
    longer = (after / before - 1).groupby("op", sort=False)
    spans = longer.agg(lambda x: f"{x.min():+.1%} to {x.max():+.1%}")
    body = [[f"`{op}`", str(count), *spans.loc[op]] for op, count in longer.size().items()]
    return _table(["operation", "shapes", *(name.replace("+", " + ") for name in PASSES)], body, rows)


TABLES: dict[str, Callable[[Path], str]] = {
    "lengths": by_length,
    "batches": by_batch,
    "goals": goals,
    "short": short,
    "others": others,
    "later": later,
    "chunks": chunks,
    "convolutions": convolutions,
    "calls": calls,
    "launches": launches,
    "checks": checks,
    "revisions": revisions,
}


def _table(header: Sequence[str], body: Iterable[Sequence[str]], used: Sequence[dict]) -> str:
    """Return a Markdown table with what made its rows below."""
    table = pd.DataFrame(list(body), columns=list(header))
    return NO_ROWS if table.empty else f"{markdown(table)}\n\n{results.made_by(used)}."


def _shape(shape: Sequence[int]) -> str:
    return f"({', '.join(map(str, shape))})"


def _pair(values: Sequence[float | None]) -> str:
    """Return "forward / forward + backward"."""
    return "-" if not any(values) else " / ".join(map(_number, values))


def _ratios(above: Sequence[float | None], below: Sequence[float | None]) -> str:
    """Return both quotients, as far as they are known."""
    found = [x / y if x and y else None for x, y in zip(above, below, strict=True)]
    return "-" if not any(found) else " / ".join("-" if x is None else f"{x:.{1 if x < 20 else 0}f}" for x in found)


def _number(x: float | None) -> str:
    return "-" if x is None else f"{x:.{1 if x < 10 else 0}f}"
