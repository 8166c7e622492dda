"""Rows of a store: what a trained point has come to, and what made it."""

import importlib.metadata
import itertools
import subprocess
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from based_jax import config as configs
from based_jax.nn import names
from based_jax.nn.lm import LM
from based_jax.sweep.lane_training import Outcome
from based_jax.sweep.points import Point
from based_jax.sweep.trial import Trial


def lane_row(point: Point, trial: Trial, outcome: Outcome) -> dict[str, Any]:
    """Return the row of a trained point, without what `facts_of` adds."""
    model = nnx.eval_shape(lambda: LM(trial.model, rngs=nnx.Rngs(0)))
    longest = max(segment.seq_len for segment in trial.data.resolved.test)
    elements = model.state_size(longest)
    return {
        "id": trial.id,
        "overrides": configs.to_dict(point),
        "config": trial.resolved,
        "status": outcome.status,
        "accuracy": outcome.curve[-1],
        "segments": outcome.segments,
        "curve": [round(x, 6) for x in outcome.curve],
        "losses": [round(x, 6) for x in outcome.losses],
        "state_elements": elements,
        "state_bytes": 4 * elements,
        "params": model.num_params(),
        "steps": outcome.steps,
        "seconds": round(outcome.seconds, 3),
        "compile_seconds": round(outcome.compile_seconds, 3),
    }


def facts_of(name: str, command: str) -> dict[str, Any]:
    """Return what the rows of one run share: sweep, device, versions, revision and command."""
    versions = {library: importlib.metadata.version(library) for library in ("jax", "jaxlib", "flax", "optax")}
    device = jax.local_devices()[0].device_kind
    return {"sweep": name, "device": device, "versions": versions, "revision": revision(), "command": command}


def revision() -> str | None:
    """Return the git commit of this code, with "+" where files differ from it; None outside a checkout."""
    folder = Path(__file__).parent
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        return commit + "+" * bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(folder: Path, *words: str) -> str:
    return subprocess.check_output(["git", *words], cwd=folder, text=True, stderr=subprocess.DEVNULL).strip()


def describe(trial: Trial) -> str:
    """Return a trial's architecture in a few words: "base_conv + taylor, D 64, K 16"."""
    layers = trial.resolved["model"]["layers"]
    runs = [(kind, len(list(run))) for kind, run in itertools.groupby(kind for kind, _ in layers)]
    kinds = " + ".join(f"{kind} x{count}" if count > 1 else kind for kind, count in runs)
    return f"{kinds}, {names.label(layers, trial.model.d_model)}"


def lane_line(point: Point, trial: Trial, outcome: Outcome) -> str:
    """Return what a trained point has come to, in one line of print."""
    told = {key: value for key, value in point.items() if key not in ("model.d_model", "model.layers")}
    values = [f"{key}={value}" for key, value in told.items() if not isinstance(value, list | tuple | dict)]
    ended = f"{outcome.curve[-1]:.3f}, {outcome.status} after {len(outcome.curve)} epochs, {outcome.seconds:.1f} s"
    return f"{', '.join([describe(trial), *values])}: {ended}"
