"""The programs of a config that are compiled ahead of time: the training step, and the decode step of generation."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from based_jax import flops, optim, parallel
from based_jax.generate.engine import decode_step
from based_jax.generate.sampling import GREEDY, row_keys
from based_jax.nn.lm import LM
from based_jax.train.compile import train_program
from based_jax.train.mesh_checks import check_mesh
from based_jax.train.run import TrainConfig


@dataclasses.dataclass(frozen=True)
class Lowered:
    """A program that is ready to be compiled.

    Attributes:
      lowered: see `jax.jit`.
      params: shapes of the parameters with their shardings.
      tokens: that it reads on all devices.
      model_flops: that the model needs for them (`flops.py`).
      microbatches: of rows whose gradients are added up; 0 where there are no gradients.
    """

    lowered: jax.stages.Lowered
    params: nnx.State
    tokens: int
    model_flops: float
    microbatches: int = 0


def check(config: TrainConfig, mesh: Mesh | AbstractMesh) -> None:
    """Check what a compiler is not needed for: that the mesh divides a config, and that its schedule fits its steps.

    Raises:
      UserError: it does not.
    """
    config = config.sized(mesh)
    check_mesh(config, mesh)
    parallel.check_length(config.data.longest_test, mesh)
    optim.schedule(config.optim, config.steps)


def lower_train(config: TrainConfig, mesh: Mesh) -> Lowered:
    """Return the training step of a config, over rows of its longest test."""
    program, length = train_program(config, mesh), config.data.longest_test
    config = program.config
    batch = {name: np.zeros((1, length), np.int32) for name in batch_names(config)}
    tokens, forward = config.batch_size * length, _model(config).flops_per_token(length)
    lowered, params = program.lower_step(batch), program.abstract_state.params
    return Lowered(lowered, params, tokens, tokens * flops.train_flops_per_token(forward), config.microbatches)


def lower_decode(config: TrainConfig, mesh: Mesh) -> Lowered:
    """Return the step by which `generate` reads a token of every row, with caches for tokens of the longest test."""
    config = config.sized(mesh)
    parallel.check_batch_size(config.batch_size, mesh)
    rows, length, model = config.batch_size, config.data.longest_test, _model(config)
    graphdef, shapes = nnx.split(model)
    params, where = parallel.placed(shapes, mesh), parallel.batch_sharding(mesh, (rows,))
    tokens, words = (jax.ShapeDtypeStruct((rows, *more), jnp.uint32, sharding=where) for more in ((), (3,)))

    def step(params, tokens, cache, words):
        model = nnx.merge(graphdef, params)
        return decode_step(model, tokens.astype(jnp.int32), cache, GREEDY, row_keys(words))

    with jax.set_mesh(mesh):
        lowered = jax.jit(step, donate_argnums=2).lower(params, tokens, _caches(model, rows, length, mesh), words)
    return Lowered(lowered, params, rows, rows * model.flops_per_token(length))


def _caches(model: LM, rows: int, length: int, mesh: Mesh) -> tuple:
    """Return the shapes of caches, the axis of their rows over the mesh as a batch's."""
    length = length if model.max_len is None else min(length, model.max_len)
    few, more = (jax.eval_shape(lambda: model.init_cache(count, length)) for count in (rows, rows + 1))  # noqa: B023

    def placed(x: jax.ShapeDtypeStruct, longer: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        grown = [a != b for a, b in zip(x.shape, longer.shape, strict=True)]
        where = NamedSharding(mesh, jax.P(*(parallel.BATCH_AXES if grows else None for grows in grown)))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    return jax.tree.map(placed, few, more)


PROGRAMS: dict[str, Callable[[TrainConfig, Mesh], Lowered]] = {"train": lower_train, "decode": lower_decode}


def batch_names(config: TrainConfig) -> tuple[str, ...]:
    """Return the arrays of a batch of a config's task."""
    return ("inputs", "labels", "segment_ids") if config.data.kind == "text" else ("inputs", "labels")


def _model(config: TrainConfig) -> LM:
    return nnx.eval_shape(lambda: LM(config.model, rngs=nnx.Rngs(0)))
