"""Where we lose, from the same rows: calls that others do faster, goals that are not reached, models that do better."""

from collections.abc import Sequence
from typing import Any

import pandas as pd

from based_jax.bench.rows import read
from based_jax.pictures.tables import markdown
from experiments.dna import __main__ as dna_rows
from experiments.generation import results as generation_rows
from experiments.kernels import results as kernel_rows
from experiments.mqar_pareto.tables import BUDGETS_KIB
from experiments.train_speed import __main__ as train_speed

OURS, THEIRS = ("hopper", "triton", "tpu", "xla"), ("fla", "cudnn", "torch")
"""What the names of implementations begin with; cuDNN's is theirs where there is a kernel of ours as well."""
NOTHING = "Nothing in the rows."
BASED = "Based"


def kernels() -> str:
    """Return every call that was measured in which another library's kernel is faster than the best of ours."""
    rows = [row for row in kernel_rows.read(kernel_rows.FOLDER, "*.jsonl") if set(kernel_rows.ROW_KEY) <= row.keys()]
    found = pd.DataFrame([row for row in rows if "microseconds" in row])
    found["side"] = found["impl"].map(_side)
    found["shape"] = [f"({b}, {h}, {t})" for b, h, t in zip(found.batch, found.heads, found.seq_len, strict=True)]
    call = ["op", "shape", "pass", "device"]
    last = found.drop_duplicates([*call, "impl"], keep="last").dropna(subset="side")
    best = last.loc[last.groupby([*call, "side"])["microseconds"].idxmin()]
    both = best.groupby(call).filter(lambda sides: len(sides) == 2)
    both = both.pivot(index=call, columns="side", values=["microseconds", "impl"])
    lines = []
    for (op, shape, which, device), row in both.iterrows():
        ours, theirs = row["microseconds", "ours"], row["microseconds", "theirs"]
        if theirs < ours:
            names = f"`{row['impl', 'ours']}`", f"`{row['impl', 'theirs']}`"
            lines.append([f"`{op}`", shape, which, names[0], ours, names[1], theirs, ours / theirs, device])
    head = ["operation", "(B, H, T)", "pass", "our best", "us", "the faster", "us ", "times as long", "device"]
    table = pd.DataFrame(lines, columns=head).sort_values("times as long", ascending=False)
    return _table(table.assign(**{name: table[name].map(lambda x: f"{x:,.1f}") for name in ("us", "us ")}))


def _side(impl: str) -> str | None:
    if impl.startswith(OURS):
        return "ours"
    return "theirs" if impl.startswith(THEIRS) else None


def training() -> str:
    """Return the training goals that are not reached."""
    lines = []
    for point, row in train_speed.measured(read(train_speed.ROWS)):
        if row and (speed := row["tokens_per_second"]) < point.goal:
            size = f"{point.rows} x {point.seq_len:,}"
            cells = [f"`{point.name}`", size, f"{speed:,.0f}", f"{point.goal:,}", speed / point.goal, row["device"]]
            lines.append(cells)
    head = ["model", "rows x tokens", "tokens/s", "goal", "of it", "device"]
    return _table(pd.DataFrame(lines, columns=head).sort_values("of it"))


def decoding() -> str:
    """Return the goals of generation that are not reached."""
    goals = generation_rows.goals(generation_rows.Found.of(read(generation_rows.ROWS)))
    missed = [goal for goal in goals if goal.found is not None and goal.found < goal.least]
    lines = [[x.what, _number(x.found), _number(x.least), x.unit, x.found / x.least] for x in missed]
    head = ["what", "measured", "goal", "unit", "of it"]
    return _table(pd.DataFrame(lines, columns=head).sort_values("of it"))


def _number(x: float) -> str:
    return f"{x:,.0f}" if x >= 100 else f"{x:.2f}"


def recall(points: Sequence[Any]) -> str:
    """Return for each budget of state the mixers that recall more than Based within it."""
    found = pd.DataFrame([(x.family, x.state_bytes(convolution=False), x.median) for x in points])
    found.columns = ["mixer", "bytes", "accuracy"]
    lines = []
    for kib in BUDGETS_KIB:
        best = found[found.bytes <= 1024 * kib].groupby("mixer").accuracy.max()
        ours = best.get(BASED, 0.0)
        better = best[best > ours].sort_values(ascending=False)
        names = ", ".join(f"{mixer} {accuracy:.3f}" for mixer, accuracy in better.items())
        lines.append([f"{kib:,} KiB", f"{ours:.3f}" if BASED in best else "-", names or "-"])
    return _table(pd.DataFrame(lines, columns=["state of at most", "Based", "what recalls more"]))


def dna() -> str:
    """Return the models that spend fewer bits on a base of DNA than Based, of the same training and test."""
    lines = []
    for (file, trained, length), found in dna_rows.measured(dna_rows.RUNS).groupby(["file", "trained", "length"]):
        bits = dict(zip(found.family, found.bits, strict=True))
        better = sorted((x, name) for name, x in bits.items() if BASED in bits and x < bits[BASED])
        names = ", ".join(f"{name} {x:.3f}" for x, name in better)
        if better:
            lines.append([dna_rows.TITLES[file], f"{trained:,}", f"{length:,}", f"{bits[BASED]:.3f}", names])
    head = ["sequence", "bases a row in training", "in the test", "Based", "what needs fewer bits"]
    return _table(pd.DataFrame(lines, columns=head))


def checks() -> str:
    """Return the kernels' cases that did not pass in a committed check on a GPU, whatever has been done since."""
    rows = [(path, row) for path in sorted(kernel_rows.FOLDER.glob("check*.jsonl")) for row in read(path)]
    failed = [(path, row) for path, row in rows if "refused" not in row and not row["passed"]]
    lines = [[f"`{row['what']}`", _wrong(row), row.get("device", "-"), f"`{path.name}`"] for path, row in failed]
    return _table(pd.DataFrame(lines, columns=["case", "largest relative error", "device", "rows"]))


def _wrong(row: dict[str, Any]) -> str:
    """Return the largest error of a case, of an array or of one of its rows, or why there is none."""
    errors = {**row.get("errors", {}), **{f"a row of {name}": x for name, x in row.get("rows", {}).items()}}
    if not errors:
        return row.get("failure", "-")
    name = max(errors, key=errors.__getitem__)
    return f"{errors[name]:.1e} in {name}"


def _table(table: pd.DataFrame) -> str:
    """Return a table in which what is a number still is a share or a ratio."""
    if table.empty:
        return NOTHING
    return markdown(table.map(lambda x: f"{x:.2f}" if isinstance(x, float) else x))
