"""The tables of the README, from the rows."""

import pandas as pd

from based_jax.pictures.tables import markdown
from experiments.generation.results import (
    BATCHES,
    CONTEXTS,
    MODELS,
    ONE_BATCH,
    ONE_CONTEXT,
    PEERS,
    Found,
    Goal,
    goals,
    share,
)

LEAST_MILLISECONDS = 0.005
"""That are told."""
NOTHING = "None has been measured."


def tables(found: Found) -> dict[str, str]:
    """Return each table by its name in the README."""
    return {
        "goals": markdown(pd.DataFrame([_goal(goal) for goal in goals(found)])),
        "batches": by_batch(found),
        "contexts": by_context(found),
        "prompts": prompts(found),
        "drafts": drafts(found),
        "times": times(found),
        "prompt_times": prompt_times(found),
    }


def _goal(goal: Goal) -> dict[str, str]:
    measured = "not measured" if goal.found is None else f"{_number(goal.found, goal.unit)} {goal.unit}"
    cells = {"what": goal.what, "goal": f"{_number(goal.least, goal.unit)} {goal.unit}", "measured": measured}
    return cells | {"of it": "" if goal.found is None else f"{goal.found / goal.least:.0%}"}


def _number(x: float, unit: str) -> str:
    return f"{x:.0%}" if unit == "of its roofline" else f"{x:.1f}" if unit == "times" else f"{x:,.0f}"


def by_batch(found: Found) -> str:
    """Return tokens/s of decoding by batch, with the share of the roofline."""
    lines = [
        {"model": f"`{name}`", "state, MiB": _state(found, name, ONE_CONTEXT)}
        | {f"{batch:,}": _cell(found, name, batch, ONE_CONTEXT) for batch in BATCHES}
        for name in MODELS | PEERS
        if any(key[0] == name and key[2] == ONE_CONTEXT for key in found.rows)
    ]
    return markdown(pd.DataFrame(lines)) if lines else NOTHING


def by_context(found: Found) -> str:
    """Return the same by context, for as many sequences as fit."""
    lines = [
        {"model": f"`{name}`"} | {f"{context:,}": _fullest(found, name, context) for context in CONTEXTS}
        for name in MODELS | PEERS
        if any(found.fullest(name, context) for context in CONTEXTS)
    ]
    return markdown(pd.DataFrame(lines)) if lines else NOTHING


def prompts(found: Found) -> str:
    """Return tokens/s of reading prompts by their length."""
    lines = []
    for name in MODELS | PEERS:
        told = {length: found.read[name, length] for length in CONTEXTS if (name, length) in found.read}
        cells = {x: f"{told[x]['prefill_tokens_per_second']:,.0f}" if x in told else "" for x in CONTEXTS}
        lines += [{"model": f"`{name}`"} | {f"{x:,}": cell for x, cell in cells.items()}] if told else []
    return markdown(pd.DataFrame(lines)) if lines else NOTHING


def drafts(found: Found) -> str:
    """Return what verifying several tokens takes, beside decoding one."""
    lines = [
        {
            "model": f"`{name}`",
            "sequences": f"{batch:,}",
            "tokens at once": f"{1 + drafted}",
            "ms": f"{row['milliseconds']:.2f}",
            "ms of one": f"{one['milliseconds']:.2f}" if one else "",
            "times as fast if all are right": f"{right:.2f}" if right else "",
        }
        for (name, batch, context, drafted), row in sorted(found.drafted.items())
        for one in [found.row(name, batch, context)]
        for right in [found.times_if_right(name, batch, context, drafted)]
    ]
    return markdown(pd.DataFrame(lines)) if lines else NOTHING


def times(found: Found) -> str:
    """Return where the time of a token goes, of rows that tell it."""
    rows = {name: found.profiled.get((name, ONE_BATCH, ONE_CONTEXT)) for name in MODELS}
    lines = [_time(name, row["breakdown"], "ms a token") for name, row in rows.items() if row]
    return markdown(pd.DataFrame(lines)) if lines else NOTHING


def prompt_times(found: Found) -> str:
    """Return where the time of a chunk of prompts goes, of rows that tell it."""
    rows = {(name, length): found.read.get((name, length)) for name in MODELS for length in CONTEXTS}
    lines = [
        {"prompts": f"{row['prefill_rows']} x {row['prefill_chunk_tokens']:,} of {length:,}"}
        | _time(name, row["prefill_breakdown"], "ms a chunk")
        for (name, length), row in rows.items()
        if row and row.get("prefill_breakdown")
    ]
    return markdown(pd.DataFrame(lines)) if lines else NOTHING


def _time(name: str, breakdown: dict, unit: str) -> dict[str, str]:
    """Return a line about where time goes."""
    return {
        "model": f"`{name}`",
        unit: f"{breakdown['milliseconds']:.2f}",
        "idle": f"{breakdown['idle']:.2f}",
        "launches": f"{breakdown['launches']:.0f}",
        "by sort of kernel": _times(breakdown["sorts"]),
        "by layer": _times({layer: sum(x.values()) for layer, x in breakdown["layers"].items()}),
    }


def _times(milliseconds: dict[str, float]) -> str:
    return ", ".join(f"{name} {x:.2f}" for name, x in milliseconds.items() if x >= LEAST_MILLISECONDS)


def _state(found: Found, name: str, context: int) -> str:
    row = next((row for key, row in found.rows.items() if key[::2] == (name, context)), None)
    return f"{row['state_bytes'] / 2**20:.1f}" if row and "state_bytes" in row else ""


def _cell(found: Found, name: str, batch: int, context: int) -> str:
    row = found.row(name, batch, context)
    if row is None:
        return "does not fit" if found.is_too_large(name, batch, context) else ""
    of_roofline = share(row)
    return f"{row['tokens_per_second']:,.0f}" + (f" ({of_roofline:.0%})" if of_roofline else "")


def _fullest(found: Found, name: str, context: int) -> str:
    row = found.fullest(name, context)
    if row is None:
        return ""
    fewer = "" if row["batch"] == ONE_BATCH else f", batch {row['batch']}"
    return _cell(found, name, row["batch"], context) + fewer
