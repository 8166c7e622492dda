"""Rows of a store: what a trained point has come to, and what made it.

A point that diverged has "status": "diverged", an "accuracy" of None and no "segments": it has come to nothing, which
is not the accuracy 0. Numbers that are not finite are None, which JSON can hold.
"""

import importlib.metadata
import itertools
import math
from collections.abc import Mapping
from typing import Any

import jax

from based_jax import config as configs
from based_jax.nn import names
from based_jax.nn.accounting import COUNTED_ELEMENTS, ELEMENT_BYTES, state_elements
from based_jax.nn.own_mixer import is_own, short
from based_jax.revision import revision
from based_jax.sweep.checks import abstract_model
from based_jax.sweep.lane_training import Outcome
from based_jax.sweep.points import Point
from based_jax.sweep.trial import Trial
from based_jax.train.run import RunConfig, TrainConfig


def lane_row(point: Point, trial: Trial, outcome: Outcome) -> dict[str, Any]:
    """Return the row of a point that was trained as a lane, without what `facts_of` adds."""
    diverged = outcome.status == "diverged"
    return _point_and_size(point, trial) | {
        "status": outcome.status,
        "accuracy": None if diverged else outcome.curve[-1],
        "segments": {} if diverged else outcome.segments,
        "curve": [_written(x) for x in outcome.curve],
        "losses": [_written(x) for x in outcome.losses],
        "steps": outcome.steps,
        "seconds": round(outcome.seconds, 3),
        "compile_seconds": round(outcome.compile_seconds, 3),
    }


def run_row(point: Point, config: TrainConfig, results: Mapping[str, float] | None, seconds: float) -> dict[str, Any]:
    """Return the row of a point that was a whole run, without what `facts_of` adds.

    Args:
      point, config: what was trained.
      results: its final evaluation (`evals.evaluate`); None if it diverged, which is no accuracy and no loss.
      seconds: of the process that ended it.
    """
    found = results or {}
    return _point_and_size(point, config) | {
        "status": "diverged" if results is None else "finished",
        **{name: found.get(name) for name in ("accuracy", "loss", "perplexity")},
        "segments": _by_segment(found, "accuracy"),
        "segment_losses": _by_segment(found, "loss"),
        "steps": config.steps,
        "seconds": round(seconds, 3),
    }


def _by_segment(results: Mapping[str, float], metric: str) -> dict[str, float]:
    """Return one metric of each segment of an evaluation by the segment's name."""
    end = f"/{metric}"
    return {name.removesuffix(end): value for name, value in results.items() if name.endswith(end)}


def _written(value: float) -> float | None:
    return round(value, 6) if math.isfinite(value) else None


def _point_and_size(point: Point, config: RunConfig) -> dict[str, Any]:
    model = abstract_model(config.model)
    elements = model.state_size(config.data.longest_test)
    return {
        "id": config.id,
        "overrides": configs.to_dict(point),
        "config": config.resolved,
        "state_elements": elements,
        "state_bytes": ELEMENT_BYTES * elements,
        "params": model.num_params(),
        **_counted_elements(config),
    }


def _counted_elements(config: RunConfig) -> dict[str, Any]:
    """Return what pictures count of a model with a mixer from outside the package, of which a row has but the name."""
    if not any(is_own(kind) for kind, _ in config.model.layers):
        return {}
    arguments = config.model.layers, config.model.d_model, config.data.longest_test
    counted = {name: state_elements(*arguments, convolution=value) for name, value in COUNTED_ELEMENTS.items()}
    return {"counted_elements": counted}


def facts_of(name: str, command: str) -> dict[str, Any]:
    """Return what the rows of one sweep share: its name, device, versions, revision and command."""
    versions = {library: importlib.metadata.version(library) for library in ("jax", "jaxlib", "flax", "optax")}
    device = jax.local_devices()[0].device_kind
    return {"sweep": name, "device": device, "versions": versions, "revision": revision(), "command": command}


def describe(config: RunConfig) -> str:
    """Return an architecture in a few words: "base_conv + taylor, D 64, K 16"."""
    layers = config.resolved["model"]["layers"]
    runs = [(kind, len(list(run))) for kind, run in itertools.groupby(short(kind) for kind, _ in layers)]
    kinds = " + ".join(f"{kind} x{count}" if count > 1 else kind for kind, count in runs)
    return f"{kinds}, {names.label(layers, config.model.d_model)}"


def lane_line(point: Point, trial: Trial, outcome: Outcome) -> str:
    """Return what a lane has come to, in one line of print."""
    value = "" if outcome.status == "diverged" else f"{outcome.curve[-1]:.3f}, "
    ended = f"{value}{outcome.status} after {len(outcome.curve)} epochs, {outcome.seconds:.1f} s"
    return f"{_told(point, trial)}: {ended}"


def run_line(point: Point, config: TrainConfig, row: Mapping[str, Any]) -> str:
    """Return what a whole run has come to, in one line of print."""
    found = {name: row[name] for name in ("loss", "perplexity", "accuracy") if row[name] is not None}
    values = "".join(f"{name} {value:.4g}, " for name, value in found.items())
    return f"{_told(point, config)}: {values}{row['status']} after {row['steps']} steps, {row['seconds']:.1f} s"


def _told(point: Point, config: RunConfig) -> str:
    """Return an architecture, and what else a point sets."""
    told = {key: value for key, value in point.items() if key not in ("model.d_model", "model.layers")}
    values = [f"{key}={value}" for key, value in told.items() if not isinstance(value, list | tuple | dict)]
    return ", ".join([describe(config), *values])
