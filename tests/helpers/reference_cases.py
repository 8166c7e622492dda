"""The arrays of tests/parity, computed by public PyTorch code (a file's `meta` names it), and how close is equal."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

FOLDER = Path(__file__).parents[1] / "parity"
POINTWISE, FORWARD, GRADIENT, LOGITS = 1e-6, 1e-5, 1e-4, 5e-5


class Case(NamedTuple):
    """The arrays of a file by group, and its description."""

    inputs: dict[str, Any]
    weights: dict[str, Any]
    outputs: dict[str, Any]
    gradients: dict[str, Any]
    meta: dict[str, Any]


def load(*names):
    """Return one case from the files that hold its parts."""
    arrays = {}
    for name in names:
        with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as file:
            arrays |= dict(file)
    groups = ("in.", "w.", "out.", "grad.")
    split = [{k.removeprefix(group): v for k, v in arrays.items() if k.startswith(group)} for group in groups]
    return Case(*split, json.loads(str(arrays["meta"])))


def assert_close(ours, reference, tolerance, what=""):
    """Bound the largest error relative to max(1, max|reference|)."""
    assert ours.shape == reference.shape, what
    error = np.abs(np.asarray(ours, np.float64) - reference).max() / max(1.0, np.abs(reference).max())
    assert error <= tolerance, f"{what}: relative error {error:.2e} is above {tolerance:.0e}"
