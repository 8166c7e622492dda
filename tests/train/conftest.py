import dataclasses
import functools

import pytest

from based_jax.train import loop
from based_jax.train.checkpoint import CheckpointConfig
from tests.helpers.tiny_runs import make_config

TOLD = {"checkpoint": CheckpointConfig(), "log_every": 1, "eval_every": None, "init_from": None, "sample_every": None}
"""Values of a config that no program depends on."""

PROGRAMS = {}
train_program, make_eval_step = loop.train_program, functools.cache(loop.make_eval_step)


def shared_program(config, mesh):
    """Return the program of a config; the same one, which is compiled once, for all that differ in `TOLD` alone."""
    key = dataclasses.replace(config, **TOLD).id, mesh
    if key not in PROGRAMS:
        PROGRAMS[key] = train_program(config, mesh)
    return dataclasses.replace(PROGRAMS[key], config=config)


@pytest.fixture(autouse=True)
def shared_programs(monkeypatch):
    """Let runs of one config, in whatever test, compile once."""
    monkeypatch.setattr(loop, "train_program", shared_program)
    monkeypatch.setattr(loop, "make_eval_step", make_eval_step)


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """Return the workdir of an unbroken run of the tiny config, which no test changes."""
    workdir = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_program", shared_program)
        patch.setattr(loop, "make_eval_step", make_eval_step)
        loop.train(make_config(), workdir)
    return workdir
