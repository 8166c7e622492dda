"""Write the page's tables from the rows."""

import argparse
from collections.abc import Sequence

import pandas as pd

from based_jax.folders import write_whole
from based_jax.pictures.panels import byte_text
from based_jax.pictures.tables import filled, markdown
from based_jax.store import Store
from experiments.lm_recall import mqar, results, sweeps
from experiments.lm_recall.questions import DOCUMENTS, NEEDLES
from experiments.lm_recall.results import Model

NOTHING = "None has been run."
NEEDLE_TITLES = {name: f"NIAH-{name[-1]}" for name in NEEDLES}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare no arguments."""


def run(args: argparse.Namespace) -> None:
    """Write the tables."""
    write_whole(results.README, filled(results.README.read_text("utf-8"), tables()))


def tables() -> dict[str, str]:
    """Return the page's tables by name."""
    study, orders = results.read(), results.read(("based", *sweeps.SWEEPS["order"]))
    return {
        "losses": _of(study, _losses),
        "needles": _of(study, lambda model: _needles(model, study)),
        "speeds": _of(study, _speeds),
        "orders": _of(orders, _order),
        "mqar": _mqar(),
        "device": _device(),
    }


def _of(models: Sequence[Model], line) -> str:
    return markdown(pd.DataFrame([line(model) for model in models])) if models else NOTHING


def _losses(model: Model) -> dict[str, str]:
    slices = {name: f"{model.mean('slices', name, 'perplexity'):.2f}" for name in ("all", "recalled", "others")}
    return _head(model) | slices | _documents(model)


def _head(model: Model) -> dict[str, str]:
    rate = model.rows[0]["config"]["optim"]["lr"]
    return {
        "model": model.title,
        "rate (of tried)": f"{rate:g} ({model.rates})",
        "seeds": str(len(model.rows)),
        "state, 1x": byte_text(4 * model.mean("elements_by_length", str(sweeps.SEQ_LEN))),
    }


def _documents(model: Model) -> dict[str, str]:
    titles = ("SQuAD, F1", "extraction, contains")
    return {title: _interval(model.recall(task, sweeps.SEQ_LEN)) for title, task in zip(titles, DOCUMENTS, strict=True)}


def _interval(found: tuple[float, float, float] | None) -> str:
    return "-" if found is None else f"{found[0]:.3f} [{found[1]:.3f}, {found[2]:.3f}]"


def _needles(model: Model, study: Sequence[Model]) -> dict[str, str]:
    cells = {
        f"{title}, {length // sweeps.SEQ_LEN}x": model.recall(task, length)
        for task, title in NEEDLE_TITLES.items()
        for length in results.lengths(study, task)
    }
    return {"model": model.title} | {name: "-" if found is None else f"{found[0]:.2f}" for name, found in cells.items()}


def _speeds(model: Model) -> dict[str, str]:
    return {
        "model": model.title,
        "parameters": f"{model.mean('params') / 1e6:.1f}M",
        "trained, tokens/s": f"{model.mean('trained_per_second'):,.0f}",
        "written, tokens/s": f"{model.mean('written_per_second'):,.0f}",
        "stored, 1x": byte_text(model.mean("stored_bytes_1x")),
        "stored, 8x": byte_text(model.mean("stored_bytes_8x")),
        "seconds": f"{model.mean('seconds'):.0f}",
    }


def _order(model: Model) -> dict[str, str]:
    name = "interleaved (Based)" if model.name == "based" else model.name.replace("_", " ")
    return _losses(model) | {"model": name}


def _mqar() -> str:
    """Return what each order and ratio recalls on MQAR, with the better of its rates."""
    rows = [row for row in Store(results.MQAR).rows() if row["accuracy"] is not None]
    lines = []
    for name, layers in mqar.ORDERS.items():
        own = [row for row in rows if row["overrides"]["model.layers"] == [list(layer) for layer in layers]]
        if own:
            best = max(own, key=lambda row: row["accuracy"])
            facts = {"parameters": f"{best['params']:,}", "state": byte_text(best["state_bytes"])}
            segments = {segment: f"{value:.3f}" for segment, value in best["segments"].items()}
            lines.append({"layers": name.replace("_", " ")} | facts | {"all": f"{best['accuracy']:.3f}"} | segments)
    return markdown(pd.DataFrame(lines)) if lines else NOTHING


def _device() -> str:
    lines = [
        {"device": f"one {name}", "runs": str(runs), "device-minutes": f"{minutes:.1f}"}
        for name, runs, minutes in results.device_minutes()
    ]
    return markdown(pd.DataFrame(lines)) if lines else NOTHING
