"""A trial: the whole config of one point of a sweep, its id, and which values a compiled program does not fix."""

import dataclasses
import functools
import pickle
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from based_jax import config as configs
from based_jax.errors import UserError
from based_jax.sweep.checks import impossible
from based_jax.sweep.measures import Measures
from based_jax.sweep.points import Point, checked_point, shown
from based_jax.train.run import RunConfig, TrainConfig
from based_jax.train.tasks import FILE_TASKS, SyntheticTask

TRACED_KEYS = ("seed", "optim.lr", "optim.weight_decay")
"""Values that enter a program as arrays: trials that differ in them alone are lanes of one program."""


@dataclasses.dataclass(frozen=True)
class Trial(RunConfig):
    """What one point trains, in whole epochs; with the code's version it determines every number of its row.

    `optim.steps_per_epoch` is filled in where the schedule needs it.

    Attributes:
      data: a synthetic task; the others without a word here are those of `RunConfig`.
      epochs: passes over the training segments at most.
      stop_accuracy: accuracy on the tests above which training ends after an epoch; None for never.
    """

    counts = ("epochs", "batch_size")
    max_seed = 2**32 - 1  # lanes hold them as an array

    data: SyntheticTask
    epochs: int = 1
    stop_accuracy: float | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.stop_accuracy is not None and not 0 <= self.stop_accuracy <= 1:
            raise UserError(f"stop_accuracy is {self.stop_accuracy}; it is between 0 and 1, or None.")
        if self.optim.schedule == "cosine_per_epoch" and self.optim.steps_per_epoch is None:
            optim = dataclasses.replace(self.optim, steps_per_epoch=self.steps_per_epoch)
            object.__setattr__(self, "optim", optim)

    @property
    def steps_per_epoch(self) -> int:
        """Batches in one pass over all training segments."""
        return sum(-(-segment.num_examples // self.batch_size) for segment in self.data.resolved.train)

    @property
    def steps(self) -> int:
        """Updates in the whole run, if it does not end early."""
        return self.epochs * self.steps_per_epoch

    @functools.cached_property
    def signature(self) -> str:
        """The same for all trials that one program can train."""
        flat = flatten_dict(self.resolved, sep=".")
        values = {key: value for key, value in flat.items() if key not in TRACED_KEYS}
        return configs.config_id(values)


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A base config and the points that override it: trials in epochs, or whole runs in steps.

    Whole runs are `TrainConfig`s, as of the command `train`: a base that has "steps", or whose data is read from files,
    is of them.

    Attributes:
      base, points: what is trained.
      measures: of a whole run's config, what else its row gets; of a module that is imported, since each run is a
        process of its own. None for nothing.
      keep_runs: whether the workdirs of whole runs that have a row stay, with their checkpoints.

    Raises:
      UserError: the base is no mapping, the points are not flat dicts, or the measures are not for them.
    """

    base: Mapping[str, Any] | ConfigDict
    points: list[Point]
    measures: Callable[[TrainConfig], Measures] | None = None
    keep_runs: bool = True

    def __post_init__(self):
        if not isinstance(self.base, Mapping | ConfigDict):
            raise UserError(f"The base of a sweep is {shown(self.base)}; it is a mapping, as of a config file.")
        if isinstance(self.points, Mapping | str) or not isinstance(self.points, Iterable):
            raise UserError(f"The points of a sweep are {shown(self.points)}; they are a list of dicts.")
        object.__setattr__(self, "points", [checked_point(point) for point in self.points])
        self._check_measures()

    def _check_measures(self) -> None:
        if self.measures is None:
            return
        if self.config_class is not TrainConfig:
            raise UserError(f"The measures of a sweep are {shown(self.measures)}, of whole runs; these are trials.")
        try:
            pickle.dumps(self.measures)
        except Exception as error:
            raise UserError(
                f"The measures of a sweep are {shown(self.measures)}; they are a function or class of a module that"
                " can be imported, not of the sweep file."
            ) from error

    @property
    def config_class(self) -> type[RunConfig]:
        """What a point is: `Trial` or `TrainConfig`."""
        data = self.base.get("data")
        kind = data.get("kind") if isinstance(data, Mapping | ConfigDict) else None
        return TrainConfig if "steps" in self.base or kind in FILE_TASKS else Trial

    def trials(self) -> list[tuple[Point, Any]]:
        """Return every point with its `config_class`, each config once.

        Raises:
          UserError: there are no points, a value of a point is impossible, or a key unknown.
        """
        return list(self._trials.values())

    @functools.cached_property
    def _trials(self) -> dict[str, tuple[Point, Any]]:
        if not self.points:
            raise UserError("The sweep has no points; give at least one, which may be {}.")
        found: dict[str, tuple[Point, Any]] = {}
        wrong = []
        for point in self.points:
            try:
                config = self._config(point)
            except UserError as error:
                wrong.append((point, str(error)))
            else:
                found.setdefault(config.id, (point, config))
        if wrong:
            raise impossible(wrong, len(self.points))
        return found

    def _config(self, point: Point) -> RunConfig:
        if self.config_class is Trial:
            return make_trial(self.base, point)
        config = configs.build(TrainConfig, configs.overridden(self.base, point))
        if config.rows_per_device is not None:
            raise UserError(f"rows_per_device is {config.rows_per_device}; points of a sweep have a batch_size.")
        return config


def make_trial(base: Mapping[str, Any] | ConfigDict, point: Point) -> Trial:
    """Return the trial of a point over a base config.

    The default warmup is made for long runs: where none is given and the default leaves no step after it, a tenth of
    the steps warms up.
    """
    values = configs.overridden(base, point)
    trial = configs.build(Trial, values)
    optim = trial.optim
    fits = optim.schedule != "warmup_cosine" or optim.t_initial is not None or optim.warmup_steps < trial.steps
    if fits or "warmup_steps" in values.get("optim", {}):
        return trial
    return dataclasses.replace(trial, optim=dataclasses.replace(optim, warmup_steps=trial.steps // 10))


def load_sweep(spec: str) -> Sweep:
    """Return the sweep of 'path/to/file.py' or 'path/to/file.py:variant', whose `get_sweep` makes it.

    Raises:
      UserError: the file is missing or fails, has no such variant, or returns something else.
    """
    sweep = configs.call_in_file(spec, "get_sweep")
    if not isinstance(sweep, Sweep):
        raise UserError(f"Sweep '{spec}' is {shown(sweep)}; get_sweep returns a Sweep.")
    return sweep
