"""A run: its config, the model of a run that was trained, and what stands in every row of its metrics."""

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import jax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh
from ml_collections import ConfigDict

from based_jax import config as configs
from based_jax import flops, parallel
from based_jax.config import added_later
from based_jax.errors import UserError
from based_jax.nn.accounting import ELEMENT_BYTES
from based_jax.nn.lm import LM, LMConfig
from based_jax.nn.mixers import kind_of, mixer_class
from based_jax.optim import OptimConfig
from based_jax.train.checkpoint import CheckpointConfig, SavedCheckpoints
from based_jax.train.init_from import InitFrom
from based_jax.train.samples import SampleConfig
from based_jax.train.tasks import Task
from based_jax.train.workdir import CHECKPOINTS_FOLDER


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """What whole runs and a sweep's trials have in common: a model that learns from batches of a task.

    Attributes:
      model, data, optim: see their classes; in a config file `model` may also be the path of a folder of published
        weights (`build_config`).
      batch_size: rows of a global batch.
      seed: of the initial parameters; data has its own.
    """

    counts: ClassVar[tuple[str, ...]] = ("batch_size",)
    """The values that are at least 1."""
    counts_or_none: ClassVar[tuple[str, ...]] = ()
    """The values that are at least 1, or None."""
    max_seed: ClassVar[int] = 2**63 - 1

    model: LMConfig
    data: Task
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    batch_size: int = 64
    seed: int = 0

    def __post_init__(self):
        configs.check_types(self)
        for name in self.counts:
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it is at least 1.")
        for name in self.counts_or_none:
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it is at least 1, or None.")
        if not 0 <= self.seed <= self.max_seed:
            raise UserError(f"seed is {self.seed}; it is between 0 and {self.max_seed}.")
        if self.data.num_tokens > self.model.vocab_size:
            raise UserError(
                f"model.vocab_size is {self.model.vocab_size}, but the data has ids up to {self.data.num_tokens - 1}."
            )

    @functools.cached_property
    def resolved(self) -> dict[str, Any]:
        """Every value, the defaults of mixers and task too, as JSON holds them; see `config.to_dict`."""
        values = configs.to_dict(self)
        full = [(kind, configs.to_dict(mixer_class(kind).Config(**options))) for kind, options in self.model.layers]
        values["model"]["layers"], values["data"] = full, self.data.resolved_values
        return configs.to_dict(values)

    @functools.cached_property
    def id(self) -> str:
        """The name of what this config trains: 12 hexadecimal digits of its resolved values."""
        return configs.config_id(self.resolved)


@dataclasses.dataclass(frozen=True)
class TrainConfig(RunConfig):
    """A whole run; with the code's version it determines every number of it.

    Attributes:
      checkpoint: see its class; the others without a word here are those of `RunConfig`.
      steps: updates in the run.
      rows_per_device: rows of a global batch for each device that has rows of its own, those along "data" and "fsdp",
        in place of `batch_size`; None for that. What it comes to on the mesh is the `batch_size` of the run's
        config.json, with which the run goes on, on other meshes too.
      microbatches: parts that a batch is cut into for gradient accumulation.
      log_every: steps between rows of metrics.jsonl.
      eval_every: steps between evaluations; one more ends the run, and is the only one where this is None.
      mesh: devices per mesh axis (`parallel.AXES`); "data" takes those that are left.
      init_from: whose parameters the run begins with, see its class, or its path alone; None draws them from the seed.
      max_skipped_steps: steps in a row that may be skipped because their loss or gradient is not finite: parameters
        and optimizer stay as they are, and the next batch is taken. One more stops the run; 0 stops it at the first.
      sample_every: steps between samples of what the model writes, of runs on text; None for none.
      samples: what these continue, and how.
    """

    counts = ("steps", "batch_size", "microbatches", "log_every")
    counts_or_none = ("eval_every", "sample_every", "rows_per_device")

    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    steps: int = 1000
    microbatches: int = 1
    log_every: int = 10
    eval_every: int | None = None
    mesh: dict[str, int] = dataclasses.field(default_factory=dict)
    init_from: InitFrom | str | None = added_later(None)  # noqa: RUF009
    max_skipped_steps: int = added_later(0)
    sample_every: int | None = added_later(None)
    samples: SampleConfig = added_later(SampleConfig())  # noqa: RUF009
    rows_per_device: int | None = added_later(None)

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.init_from, str):
            object.__setattr__(self, "init_from", InitFrom(self.init_from))
        if self.max_skipped_steps < 0:
            raise UserError(f"max_skipped_steps is {self.max_skipped_steps}; it is at least 0.")
        if self.sample_every is not None and self.data.kind != "text":
            raise UserError(
                f"sample_every is {self.sample_every}, but data.kind is '{self.data.kind}'; it is 'text' for samples."
            )
        if self.rows_per_device is None and self.batch_size % self.microbatches:
            raise UserError(f"batch_size {self.batch_size} cannot be divided into {self.microbatches} microbatches.")

    def sized(self, mesh: Mesh | AbstractMesh) -> "TrainConfig":
        """Return the run with the `batch_size` that `rows_per_device` comes to on a mesh, in place of it."""
        if self.rows_per_device is None:
            return self
        rows = self.rows_per_device * parallel.row_devices(mesh)
        if rows % self.microbatches:
            raise UserError(
                f"rows_per_device {self.rows_per_device} comes to {rows} rows on this mesh, which cannot be divided"
                f" into {self.microbatches} microbatches."
            )
        return dataclasses.replace(self, batch_size=rows, rows_per_device=None)


def load_config(source: str | Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> TrainConfig:
    """Return the checked config of a run, for `train`.

    Args:
      source: 'path/to/file.py', or 'path/to/file.py:variant', as the command line takes it; or nested values by key.
      overrides: values by dotted keys, such as {"optim.lr": 1e-3}.

    Raises:
      UserError: the file is missing or fails, a key is unknown, or a value is impossible.
    """
    values = configs.load(source) if isinstance(source, str) else source
    return build_config(configs.overridden(values, overrides or {}))


def build_config(values: Mapping[str, Any] | ConfigDict, workdir: str | Path | None = None) -> TrainConfig:
    """Return the checked config of nested values, of which `model` may be a folder that `convert.load_hf` reads.

    It is the model of that folder then, and a run begins with its parameters if `init_from` does not say otherwise. The
    run of `workdir`, which began so, goes on when the folder is no longer there.

    Raises:
      UserError: the folder holds no model; otherwise as `config.build`.
    """
    folder = values.get("model")
    if isinstance(folder, str):
        model = _begun_model(folder, workdir) or _published_model(folder)
        values = {"init_from": folder} | {key: values[key] for key in values} | {"model": model}
    return configs.build(TrainConfig, values)


def _begun_model(folder: str, workdir: str | Path | None) -> dict[str, Any] | None:
    """Return the model of the workdir's run, if that began with a folder that is gone."""
    if workdir is None or Path(folder).exists() or not (Path(workdir) / configs.CONFIG_FILE).is_file():
        return None
    begun = configs.read(TrainConfig, workdir)
    source = begun.init_from.path if isinstance(begun.init_from, InitFrom) else None
    return configs.to_dict(begun.model) if source == folder else None


def _published_model(folder: str) -> dict[str, Any]:
    from based_jax.convert import hf_config

    return configs.to_dict(hf_config(folder))


def load_run(workdir: str | Path, step: int | None = None, mixers: Iterable[type] = ()) -> tuple[TrainConfig, int, LM]:
    """Return (config, step, model) of a trained run, from its last good checkpoint or from that of `step`.

    `mixers` are the classes of its layers that the package lacks, of which config.json has the names.

    Raises:
      UserError: the folder is no run's, its config.json is damaged or of another version, or it has no good checkpoint;
        a layer's class is not among `mixers`, or has changed since.
    """
    config = configs.read(TrainConfig, workdir, [kind_of(mixer) for mixer in mixers])
    graphdef, shapes = nnx.split(nnx.eval_shape(lambda: LM(config.model, rngs=nnx.Rngs(config.seed))))
    params = parallel.placed(shapes, parallel.make_mesh())
    step, fields = SavedCheckpoints(Path(workdir) / CHECKPOINTS_FOLDER).restore({"params": params}, step)
    return config, step, nnx.merge(graphdef, fields["params"])


@dataclasses.dataclass(frozen=True)
class Facts:
    """What does not change from step to step and stands in every row of metrics.jsonl."""

    forward_flops: float
    state_bytes: int
    device_kind: str
    devices: int

    @classmethod
    def of(cls, config: TrainConfig, seq_len: int) -> "Facts":
        """Return the facts of a run over sequences of that length; state bytes count fp32 elements."""
        model = nnx.eval_shape(lambda: LM(config.model, rngs=nnx.Rngs(0)))
        return cls(
            forward_flops=model.flops_per_token(seq_len),
            state_bytes=ELEMENT_BYTES * model.state_size(seq_len),
            device_kind=jax.devices()[0].device_kind,
            devices=jax.device_count(),
        )

    def row(self, tokens_per_second: float) -> dict[str, Any]:
        """Return the throughput and the facts as metrics."""
        used = flops.mfu(tokens_per_second, self.forward_flops, self.devices, self.device_kind)
        return {
            "tokens_per_second": tokens_per_second,
            **({} if used is None else {"mfu": used}),
            "state_bytes": self.state_bytes,
            "device": self.device_kind,
        }
