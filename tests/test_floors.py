"""A file imports only from lower floors, or from its own package."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

FLOORS = [
    ["pallas_kernels", "based_jax", "based_jax.dims", "based_jax.errors"],
    [f"based_jax.{name}" for name in ("config", "flops", "ops", "optim", "parallel", "store")],
    ["based_jax.nn", "based_jax.data"],
    ["based_jax.train", "based_jax.evals", "based_jax.convert"],
    ["based_jax.bench", "based_jax.pictures", "based_jax.sweep"],
    ["based_jax.commands"],
    ["based_jax.__main__"],
    ["configs", "experiments"],
]
FLOOR = {place: floor for floor, places in enumerate(FLOORS) for place in places}

# Training evaluates as it goes, and an evaluation sums what training sums.
PEERS = [{"based_jax.train", "based_jax.evals"}]

FORBIDDEN = {
    "pallas_kernels": ("based_jax", "flax"),
    "based_jax.data": ("jax", "flax", "optax"),
    "configs": ("based_jax", "pallas_kernels"),
}

MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for top in ("based_jax", "pallas_kernels", "configs", "experiments")
    for path in sorted(ROOT.glob(f"{top}/**/*.py"))
}


def place_of(name):
    """Return the entry of `FLOOR` with the longest match of a dotted name; None for a library."""
    parts = name.split(".")
    return next((p for p in (".".join(parts[:2]), parts[0]) if p in FLOOR), None)


def imported_names(source):
    """Return the dotted names that a source imports anywhere; of `from a import b` both a and a.b."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from (module, *(f"{module}.{alias.name}" for alias in node.names))


def is_wrong(place, name):
    """Return whether a file of `place` must not import `name`."""
    if name.startswith("."):
        return True
    if any(name == library or name.startswith(library + ".") for library in FORBIDDEN.get(place, ())):
        return True
    other = place_of(name)
    if other in (None, place) or {place, other} in PEERS:
        return False
    return FLOOR[other] >= FLOOR[place] or (place == "experiments" and "._" in name)


def violations(place, source):
    return [name for name in imported_names(source) if is_wrong(place, name)]


@pytest.mark.parametrize("module", MODULES)
def test_imports_come_from_lower_floors(module):
    place = place_of(module)
    assert place != "based_jax" or module == "based_jax", f"{module} stands on no floor"
    assert not violations(place, MODULES[module].read_text())


@pytest.mark.parametrize(
    ("place", "source"),
    [
        ("based_jax.ops", "from based_jax.nn import layers"),
        ("based_jax.ops", "def f():\n    from based_jax import nn"),
        ("based_jax.optim", "import based_jax.parallel"),
        ("based_jax.nn", "from based_jax.data.mqar import Segment"),
        ("based_jax.data", "import jax.numpy as jnp"),
        ("based_jax.train", "from based_jax.commands import train"),
        ("based_jax.evals", "from . import generate"),
        ("based_jax.sweep", "from based_jax.pictures import figures"),
        ("based_jax.pictures", "from based_jax.sweep import Sweep"),
        ("pallas_kernels", "from flax import nnx"),
        ("configs", "from based_jax.nn.lm import LMConfig"),
        ("experiments", "from based_jax.ops.taylor import _chunked"),
    ],
)
def test_a_violation_is_caught(place, source):
    assert violations(place, source)
    assert not violations(place, "import numpy\nfrom jaxtyping import Array")


def test_lower_floors_and_the_own_package_are_open():
    assert not violations("based_jax.nn", "from based_jax.ops import taylor\nfrom based_jax.nn import layers")
    assert not violations("experiments", "from based_jax import config\nfrom experiments.demo import table")
