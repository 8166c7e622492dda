"""Each in an interpreter of its own, since this one has imported everything."""

import json
import os
import pkgutil
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import based_jax
from based_jax.__main__ import main

IMPORT = """
import json, sys, time
start = time.monotonic()
import based_jax
print(json.dumps([time.monotonic() - start, "jax" in sys.modules]))
"""

# With a platform that does not exist, whatever starts a backend fails: first every module, then, to be sure, a device.
IMPORT_ALL = """
import importlib, json, pkgutil, sys
import based_jax, jax
names = [module.name for module in pkgutil.walk_packages(based_jax.__path__, "based_jax.")]
for name in names:
    importlib.import_module(name)
try:
    jax.devices()
    failed = False
except RuntimeError:
    failed = True
print(json.dumps([names, sorted({"torch", "tensorflow"} & sys.modules.keys()), failed]))
"""

HELP = """
import runpy, sys
sys.argv = ["based_jax", "--help"]
try:
    runpy.run_module("based_jax", run_name="__main__")
except SystemExit as stop:
    print(stop.code, "jax" in sys.modules)
"""


def run(program, **environment):
    command = [sys.executable, "-c", program]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=True).stdout


def test_importing_the_package_is_quick():
    seconds, jax_imported = json.loads(run(IMPORT))
    assert seconds < 2
    assert not jax_imported


def test_no_import_starts_a_backend_or_brings_another_framework():
    names, frameworks, devices_failed = json.loads(run(IMPORT_ALL, JAX_PLATFORMS="no_such_platform"))
    assert {"based_jax.train.loop", "based_jax.generate.engine", "based_jax.ops.taylor"} <= set(names)
    assert frameworks == []
    assert devices_failed


def test_help_needs_no_jax():
    out = run(HELP)
    assert "train" in out and "generate" in out
    assert out.splitlines()[-1] == "0 False"


def test_the_script_the_version_and_the_systems_are_what_the_package_says():
    root = Path(__file__).parents[1]
    whole = tomllib.loads((root / "pyproject.toml").read_text())
    project = whole["project"]
    assert pkgutil.resolve_name(project["scripts"]["based_jax"]) is main
    assert "version" in project["dynamic"] and whole["tool"]["hatch"]["version"]["path"] == "based_jax/__init__.py"
    assert re.fullmatch(r"\d+\.\d+\.\d+", based_jax.__version__)
    systems = {name.split(" :: ")[1] for name in project["classifiers"] if name.startswith("Operating System")}
    assert systems == {"POSIX", "MacOS"}
    assert "Linux (x86-64 and aarch64" in (root / "README.md").read_text()
