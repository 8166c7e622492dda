"""A workdir that has a run: what of its config may change when it goes on, and what that means."""

import dataclasses
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from based_jax import config as configs
from based_jax.config import CONFIG_FILE
from based_jax.errors import UserError
from based_jax.train.checkpoint import SavedCheckpoints
from based_jax.train.run import TrainConfig
from based_jax.train.workdir import CHECKPOINTS_FOLDER

MAY_CHANGE = {
    "steps": "the run ends there, and a schedule that depends on it is another one from here on",
    "optim": "updates from here on are made by it",
    "max_skipped_steps": "steps from here on are held to it",
    "microbatches": "sums are taken in another order, which may change their last bits",
    "mesh": "sums are taken in another order, which may change their last bits",
    "model.remat": "what is computed again may be rounded otherwise, which may change last bits",
    "init_from": "parameters come from the run's own checkpoint where there is one",
    "checkpoint": "no number depends on it",
    "log_every": "no number depends on it",
    "eval_every": "no number depends on it",
    "sample_every": "no number depends on it",
    "samples": "no number depends on it",
    "data.path": "the text is the same (`data_record`)",
    "data.mixture.*.path": "the text is the same (`data_record`)",
    "data.cache_dir": "no number depends on it",
    "data.processes": "no number depends on it",
}
"""Keys, or whole sections, that may differ, and why. All others name another run: its model, data, batches and seed."""


OF_A_HOST = ("data.path", "data.mixture.*.path", "data.tokenizer", "data.cache_dir", "data.processes", "init_from.path")
"""Keys that may differ between the hosts of a run: what is read there is compared, or the same under another name."""

OF_THE_OPTIMIZER_STATE = ("optim.name", "optim.moment_dtype")
"""Keys that stay once there is a checkpoint, which holds the state that they name."""


def sized(config: TrainConfig, mesh: Mesh, workdir: Path) -> tuple[TrainConfig, list[str]]:
    """Return the config with the rows of its global batch, and what to say where they are not those it asks for.

    A run keeps the global batch that it began with, whatever `rows_per_device` comes to on another mesh.
    """
    new = config.sized(mesh)
    if new is config or not (workdir / CONFIG_FILE).exists():
        return new, []
    began = configs.read(TrainConfig, workdir, configs.known_texts(new))
    kept = dataclasses.replace(new, batch_size=began.batch_size)
    line = f"kept: batch_size is {kept.batch_size}, with which the run began, rather than {new.batch_size}"
    return kept, [line] if kept != new else []


def values_of_all(config: TrainConfig) -> dict[str, Any]:
    """Return the values that all hosts of a run have alike, by their keys."""
    values = configs.every_value(config)
    return {key: value for key, value in values.items() if not any(configs.is_under(key, own) for own in OF_A_HOST)}


def changes(config: TrainConfig, workdir: Path) -> list[str]:
    """Return what differs from the config that the workdir's run had so far, a line each; none in a new workdir.

    Raises:
      UserError: something differs that is not in `MAY_CHANGE`, or a checkpoint has a state of it, the run is beyond
        `steps` or has no config.json, or as `config.read`.
    """
    differences = configs.check_same(config, workdir, free=MAY_CHANGE)
    done = SavedCheckpoints(workdir / CHECKPOINTS_FOLDER).latest()
    if done is not None and not (workdir / CONFIG_FILE).exists():
        raise UserError(
            f"'{workdir}' has checkpoints but no {CONFIG_FILE}, which says of what; restore it, or choose another"
            " workdir."
        )
    for key in OF_THE_OPTIMIZER_STATE if done is not None else ():
        if key in differences:
            raise _other_state(key, *differences[key], workdir)
    if done is not None and done > config.steps:
        raise UserError(f"steps is {config.steps}, but the run in '{workdir}' has taken {done}; it is at least that.")
    return [f"changed: {key} is {new}, and was {old}; {_why(key)}" for key, (old, new) in differences.items()]


def _other_state(key: str, old: str, new: str, workdir: Path) -> UserError:
    return UserError(
        f"{key} is {new}, and was {old}, of which '{workdir}' has a state; keep it, or begin another run with its"
        " parameters, by 'init_from'."
    )


def _why(key: str) -> str:
    return next(why for place, why in MAY_CHANGE.items() if configs.is_under(key, place))
