"""A file imports only from lower floors, or from its own package."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

FLOORS = [
    ["pallas_kernels", "based_jax", *(f"based_jax.{name}" for name in ("dims", "errors", "labels"))],
    ["based_jax.devices", "based_jax.folders", "based_jax.revision"],
    ["based_jax.config", "based_jax.placement"],
    [f"based_jax.{name}" for name in ("compilation", "flops", "optim", "parallel", "store")],
    ["based_jax.ops"],
    ["based_jax.nn", "based_jax.data"],
    ["based_jax.generate"],
    ["based_jax.serve", "based_jax.evals", "based_jax.convert", "based_jax.contracts"],
    ["based_jax.train"],
    ["based_jax.aot"],
    ["based_jax.bench", "based_jax.sweep", "based_jax.pictures"],
    ["based_jax.newcomer", "based_jax.inside"],
    ["based_jax.commands"],
    ["based_jax.__main__"],
    ["configs", "experiments"],
]
FLOOR = {place: floor for floor, places in enumerate(FLOORS) for place in places}

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
    if other in (None, place):
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
        ("based_jax.nn", "from based_jax.data.mqar import MqarSegment"),
        ("based_jax.data", "import jax.numpy as jnp"),
        ("based_jax.train", "from based_jax.commands import train"),
        ("based_jax.evals", "from based_jax.train.step import make_train_step"),
        ("based_jax.generate", "from based_jax.evals.evaluate import evaluate"),
        ("based_jax.generate", "from based_jax.serve import serve"),
        ("based_jax.evals", "from . import evaluate"),
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
    assert not violations("based_jax.train", "from based_jax.evals import evaluate\nfrom based_jax.train import loop")
    assert not violations("experiments", "from based_jax import config\nfrom experiments.demo import table")


# A wing is what one backend has: a folder of kernels and one of glue. Deleting a wing must break no other.

WING_ROOTS = ("pallas_kernels", "based_jax.ops")
WINGS = sorted({path.parent.name for root in WING_ROOTS for path in ROOT.glob(f"{root.replace('.', '/')}/*/*.py")})
BARE_PACKAGES = {"pallas_kernels", "based_jax", "based_jax.ops"}
OPEN_TO_ALL = "pallas_kernels.split", "pallas_kernels.gpus"
OPEN_TO_GLUE = (
    *(f"based_jax.{name}" for name in ("devices", "dims", "errors", "labels", "revision")),
    *(
        f"based_jax.ops.{name}"
        for name in (
            *("calls", "decode_calls", "decays", "dispatch", "precision"),
            *("segments", "sharded", "softmax_walks", "taylor_state"),
        )
    ),
)


def is_below(name, places):
    return any(name == place or name.startswith(f"{place}.") for place in places)


def open_to(module):
    """Return what a module may import of `WING_ROOTS` and `based_jax`; None for what the wings do not restrict."""
    for wing in WINGS:
        kernels, glue = (f"{root}.{wing}" for root in WING_ROOTS)
        if is_below(module, [kernels]):
            return (kernels, *OPEN_TO_ALL)
        if is_below(module, [glue]):
            return (kernels, glue, *OPEN_TO_ALL, *OPEN_TO_GLUE)
    return None


def wing_violations(module, source):
    """Return what a module must not import: another wing, or what only an operation knows; kernels but in glue."""
    names = [name for name in imported_names(source) if is_below(name, ("pallas_kernels", "based_jax"))]
    allowed = open_to(module)
    if allowed is None:
        names = [name for name in names if is_below(name, ["pallas_kernels"]) and module.startswith("based_jax")]
        allowed = OPEN_TO_ALL
    return [name for name in names if name not in BARE_PACKAGES and not is_below(name, allowed)]


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith(("based_jax.", "pallas_kernels"))])
def test_no_wing_leans_on_another(module):
    assert not wing_violations(module, MODULES[module].read_text())


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("pallas_kernels.triton.chunks", "from pallas_kernels.hopper.mosaic import TILE"),
        ("pallas_kernels.hopper.taylor", "def f():\n    from pallas_kernels.triton import chunks"),
        ("pallas_kernels.hopper.taylor", "from based_jax.ops import segments"),
        ("based_jax.ops.triton.dplr", "from based_jax.ops.hopper import recurrence"),
        ("based_jax.ops.triton.dplr", "from based_jax.ops import (hopper)"),
        ("based_jax.ops.hopper.recurrence", "import pallas_kernels.triton.one_decay"),
        ("based_jax.ops.hopper.taylor", "from based_jax.ops import taylor"),
        ("based_jax.ops.hopper.taylor", "from based_jax.parallel import AXES"),
        ("based_jax.ops.taylor", "from pallas_kernels.hopper import taylor"),
    ],
)
def test_a_wing_that_leans_is_caught(module, source):
    assert wing_violations(module, source)


def test_a_wing_has_its_folders_and_what_none_owns():
    assert {"hopper", "triton"} <= set(WINGS)
    own = "from based_jax.ops.hopper import limits\nfrom pallas_kernels.hopper import taylor\nimport jax"
    shared = (
        "from based_jax import devices\nfrom based_jax.ops import segments, sharded\nfrom pallas_kernels import split"
    )
    assert not wing_violations("based_jax.ops.hopper.taylor", f"{own}\n{shared}")
    assert not wing_violations("based_jax.ops.taylor", "from based_jax.ops.hopper import taylor")
