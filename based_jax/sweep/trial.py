"""A trial: the whole config of one point of a sweep, its id, and which values a compiled program does not fix."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from based_jax import config as configs
from based_jax.errors import UserError
from based_jax.sweep.points import Point
from based_jax.train.run import RunConfig, TrainConfig
from based_jax.train.tasks import SyntheticTask

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

    Whole runs are `TrainConfig`s, as of the command `train`: a base that has "steps" or whose data is text is of them.
    """

    base: Mapping[str, Any] | ConfigDict
    points: list[Point]

    @property
    def config_class(self) -> type[RunConfig]:
        """What a point is: `Trial` or `TrainConfig`."""
        of_runs = "steps" in self.base or self.base.get("data", {}).get("kind") == "text"
        return TrainConfig if of_runs else Trial

    def trials(self) -> Iterator[tuple[Point, Any]]:
        """Yield every point with its `config_class`, each config once.

        Raises:
          UserError: a value of a point is impossible, or a key unknown.
        """
        seen = set()
        for point in self.points:
            trial = configs.build(self.config_class, configs.overridden(self.base, point))
            if trial.id not in seen:
                seen.add(trial.id)
                yield point, trial


def make_trial(base: Mapping[str, Any], point: Point) -> Trial:
    """Return the trial of a point over a base config."""
    return configs.build(Trial, configs.overridden(base, point))


def load_sweep(spec: str) -> Sweep:
    """Return the sweep of 'path/to/file.py' or 'path/to/file.py:variant', whose `get_sweep` makes it.

    Raises:
      UserError: the file is missing or fails, has no such variant, or returns something else.
    """
    sweep = configs.call_in_file(spec, "get_sweep")
    if not isinstance(sweep, Sweep):
        raise UserError(f"Sweep '{spec}' is {sweep!r:.80}; get_sweep returns a Sweep.")
    return sweep
