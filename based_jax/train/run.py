"""A run: its config, the state it starts from, and the model of a run that was trained."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import optax
from flax import nnx
from jax.sharding import Mesh

from based_jax import config as configs
from based_jax import flops, parallel
from based_jax.errors import UserError
from based_jax.nn.lm import LM, LMConfig
from based_jax.optim import OptimConfig
from based_jax.train.checkpoint import CheckpointConfig, Checkpoints
from based_jax.train.step import TrainState, init_state
from based_jax.train.tasks import Task


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A whole run; with the code's version it determines every number of it.

    Attributes:
      model, data, optim, checkpoint: see their classes.
      steps: updates in the run.
      batch_size: rows of a global batch.
      microbatches: parts that a batch is cut into for gradient accumulation.
      seed: of the initial parameters; data has its own.
      log_every: steps between rows of metrics.jsonl.
      eval_every: steps between evaluations; one more ends the run, and is the only one where this is None.
      mesh: devices per mesh axis (`parallel.AXES`); "data" takes those that are left.
    """

    model: LMConfig
    data: Task
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    steps: int = 1000
    batch_size: int = 64
    microbatches: int = 1
    seed: int = 0
    log_every: int = 10
    eval_every: int | None = None
    mesh: dict[str, int] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        for name in ("steps", "batch_size", "microbatches", "log_every"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it is at least 1.")
        if self.batch_size % self.microbatches:
            raise UserError(f"batch_size {self.batch_size} cannot be divided into {self.microbatches} microbatches.")
        if self.data.num_tokens > self.model.vocab_size:
            raise UserError(
                f"model.vocab_size is {self.model.vocab_size}, but the data has ids up to {self.data.num_tokens - 1}."
            )


def initial_state(config: TrainConfig, tx: optax.GradientTransformation, key: jax.Array) -> TrainState:
    """Return the state before the first step; parameters are a function of the key alone."""
    return init_state(LM(config.model, rngs=nnx.Rngs(key)), tx)


def abstract_state(
    config: TrainConfig, tx: optax.GradientTransformation, mesh: Mesh
) -> tuple[nnx.GraphDef, TrainState, TrainState]:
    """Return the model's structure, the state's shapes with their shardings, and the shardings alone.

    Shapes, shardings and names come from one abstract construction: initialisation, the step and the restore of a
    checkpoint all place the state by them, so nothing is ever whole on one device that does not fit there.
    """
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: LM(config.model, rngs=nnx.Rngs(0))))
    shapes = jax.eval_shape(lambda: initial_state(config, tx, jax.random.key(0)))
    where = parallel.shardings(shapes, mesh)
    placed = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, where)
    return graphdef, placed, where


def load_run(workdir: str | Path, step: int | None = None) -> tuple[TrainConfig, int, LM]:
    """Return (config, step, model) of a trained run, from its last good checkpoint or from that of `step`.

    Raises:
      UserError: the folder is no run's, its config.json is damaged, or it has no good checkpoint.
    """
    path = Path(workdir) / configs.FILE
    if not path.exists():
        raise UserError(f"'{workdir}' is no run: it has no {configs.FILE}.")
    try:
        config = configs.build(TrainConfig, json.loads(path.read_text()))
    except json.JSONDecodeError as error:
        raise UserError(f"'{path}' is no config: {error}.") from None
    graphdef, shapes = nnx.split(nnx.eval_shape(lambda: LM(config.model, rngs=nnx.Rngs(config.seed))))
    where = parallel.shardings(shapes, parallel.make_mesh())
    params = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, where)
    with Checkpoints(Path(workdir) / "checkpoints") as checkpoints:
        step, fields = checkpoints.restore({"params": params}, step)
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
            state_bytes=4 * model.state_size(seq_len),
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
