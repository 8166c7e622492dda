"""Runs that take a second, and what they left."""

import hashlib
import json

import jax
import numpy as np
from flax import nnx

from based_jax import config as configs
from based_jax.train.run import TrainConfig, load_run

VALUES = {
    "model": {"layers": [["conv", {}]], "d_model": 16, "vocab_size": 64, "dtype": "float32"},
    "data": {
        "kind": "mqar",
        "preset": "tiny",
        "train": [{"num_examples": 50, "seq_len": 16, "num_kv_pairs": 2}],
        "test": [{"num_examples": 8, "seq_len": 16, "num_kv_pairs": 2}],
        "shuffle": True,
    },
    "optim": {"lr": 1e-2, "warmup_steps": 2},
    "checkpoint": {"every": 4},
    "steps": 8,
    "batch_size": 8,
    "log_every": 1,
}


def make_config(**changes):
    """Return the tiny config; a change to a section replaces keys of it."""
    sections = {k: VALUES[k] | v if isinstance(v, dict) else v for k, v in changes.items() if k in VALUES}
    return configs.build(TrainConfig, VALUES | changes | sections)


def rows(workdir):
    """Return the whole lines of metrics.jsonl, also while a run writes it."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def losses(workdir):
    """Return (step, loss) of each row that has one."""
    return [(row["step"], row["loss"]) for row in rows(workdir) if "loss" in row]


def saved_steps(workdir):
    """Return the steps of the checkpoints."""
    return sorted(int(folder.name) for folder in (workdir / "checkpoints").iterdir() if folder.name.isdigit())


def contents(folder):
    """Return the hash of every file below a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def parameters(workdir):
    """Return the parameters of the last checkpoint, as they lie in memory."""
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(nnx.state(load_run(workdir)[2]))]


def assert_same_run(workdir, expected):
    """Check that two runs ended in bitwise the same parameters, over the same losses."""
    assert losses(workdir) == losses(expected)
    assert saved_steps(workdir)[-1] == saved_steps(expected)[-1]
    assert parameters(workdir) == parameters(expected)
