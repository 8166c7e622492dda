"""The tables and the picture, from rows alone."""

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes

from based_jax.bench import rows
from based_jax.errors import UserError
from based_jax.nn import names
from based_jax.pictures import panels, paper, styles
from based_jax.pictures.tables import filled
from experiments.linearize.settings import SETTINGS

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parent / "README.md"
CONTEXT = "8192"
"""Tokens after which states are compared."""
SPEED_SIZES = (1, 8192), (64, 2048), (64, 8192)
COLUMNS = (
    *("setting", "layers", "w", "sinks", "K", "state after 2,048", "after 8,192"),
    *("perplexity as it is", "transferred", "adapted", "SQuAD F1", "says it"),
)
SPEED_HEADER = "| setting | " + " | ".join(f"{batch} x {context:,}" for batch, context in SPEED_SIZES) + " |"


def quality() -> list[dict[str, Any]]:
    """Return the rows of quality; UserError where there are none."""
    if not (found := rows.read(RESULTS / "quality.jsonl")):
        raise UserError("There are no rows of results/quality.jsonl yet: python -m experiments.linearize run")
    return found


def tables() -> dict[str, str]:
    """Return the tables of the README, of those rows that there are."""
    lines_of = {"untrained": quality_lines, "quality": quality_lines, "speed": speed_lines}
    found = {name: rows.read(RESULTS / f"{name}.jsonl") for name in lines_of}
    return {name: "\n".join(lines_of[name](of) if of else ["No rows are here yet."]) for name, of in found.items()}


def write_table() -> None:
    """Write them between their marks."""
    README.write_text(filled(README.read_text("utf-8"), tables()), encoding="utf-8")


def quality_lines(found: list[dict[str, Any]]) -> list[str]:
    """Return the table of what settings are worth, the row of attention first."""
    return [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS), *map(_quality_line, found)]


def _quality_line(row: dict[str, Any]) -> str:
    sizes = (str(row.get(name, "")) for name in ("window", "sinks", "feature_dim"))
    states = (panels.byte_text(row["state_bytes"][context]) for context in ("2048", CONTEXT))
    worth = (
        _number(row["perplexity"].get(what, {}).get("perplexity"), 2) for what in ("as it is", "transferred", "adapted")
    )
    recalled = (_number(row.get(name), 3) for name in ("squad_f1", "squad_contains"))
    swapped = "" if row["mixer"] == "attention" else str(row["swapped"])
    return "| " + " | ".join([f"`{row['setting']}`", swapped, *sizes, *states, *worth, *recalled]) + " |"


def speed_lines(found: list[dict[str, Any]]) -> list[str]:
    """Return the table of tokens a second, a line for each setting."""
    by_setting: dict[str, dict[tuple[int, int], float]] = {}
    for row in found:
        name = row["config"].rpartition(":")[2]
        by_setting.setdefault(name, {})[row["batch"], row["context"]] = row["tokens_per_second"]
    lines = [
        "| " + " | ".join([f"`{name}`", *(_number(speeds.get(size), 0) for size in SPEED_SIZES)]) + " |"
        for name, speeds in by_setting.items()
    ]
    return [SPEED_HEADER, "|---" * (len(SPEED_SIZES) + 1) + "|", *lines]


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def points(found: list[dict[str, Any]]) -> list[tuple[str, float, float, float]]:
    """Return name, MiB of state, final perplexity and recall of every setting that answered questions."""
    return [
        (
            row["setting"],
            row["state_bytes"][CONTEXT] / 2**20,
            list(row["perplexity"].values())[-1]["perplexity"],
            row["squad_f1"],
        )
        for row in found
        if "squad_f1" in row
    ]


def draw() -> list[Path]:
    """Draw perplexity and recall against bytes of state, a point a setting."""
    shown = points(quality())
    with matplotlib.rc_context(styles.PAPER):
        figure = paper.sheet(6.75, 2.6, [], [f"SmolLM2-135M, one sequence of {int(CONTEXT):,} tokens."])
        for place, (title, column) in enumerate((("perplexity", 2), ("SQuAD F1", 3))):
            _panel(figure.add_subplot(1, 2, place + 1), title, [(x[0], x[1], float(x[column])) for x in shown])
        return paper.save(figure, RESULTS / "dial")


def _panel(axes: Axes, title: str, shown: list[tuple[str, float, float]]) -> None:
    families = {name: _family(name) for name, *_ in shown}
    for name, size, value in shown:
        style = styles.FAMILY_STYLES[families[name]]
        axes.plot([size], [value], linestyle="", **styles.marked(style.colour, style.marker))
        axes.annotate(name.replace("_", " "), (size, value), xytext=(3, 3), textcoords="offset points", fontsize=6)
    axes.set(xscale="log", xlabel="state of a sequence, MiB", ylabel=title)
    axes.margins(x=0.25, y=0.15)


def _family(setting: str) -> str:
    """Return the name of a setting's mixer."""
    return names.FAMILY_NAMES[SETTINGS[setting][-1][0]]
