"""The programs of a config that are compiled ahead of time: the training step, and the decode step of generation."""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, Mesh

from based_jax import flops, optim, parallel
from based_jax.generate.blocks import decode_step
from based_jax.generate.decoder import Layout, layout_of
from based_jax.generate.requests import Request
from based_jax.generate.rows import Rows
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


def lower_train(config: TrainConfig, mesh: Mesh, packed: bool = True) -> Lowered:
    """Return the training step of a config, over rows of its longest test.

    Without `packed` each row of text is one document, as in `bench train`, and there are no ids of documents.
    """
    program, length = train_program(config, mesh), config.data.longest_test
    config = program.config
    batch = {name: np.zeros((1, length), np.int32) for name in batch_names(config, packed)}
    tokens, forward = config.batch_size * length, _model(config).flops_per_token(length)
    lowered, params = program.lower_step(batch), program.abstract_state.params
    return Lowered(lowered, params, tokens, tokens * flops.train_flops_per_token(forward), config.microbatches)


def lower_decode(config: TrainConfig, mesh: Mesh) -> Lowered:
    """Return the step by which `generate` reads a token of every row, with caches for tokens of the longest test."""
    config = config.sized(mesh)
    parallel.check_batch_size(config.batch_size, mesh)
    count, length, layout = config.batch_size, config.data.longest_test, layout_of(config.model)
    params, rows = parallel.placed(layout.shapes, mesh), _rows(layout, count, length, mesh)

    def step(params, rows):
        return decode_step(layout.model(params), rows)

    with jax.set_mesh(mesh):
        lowered = jax.jit(step, donate_argnums=1).lower(params, rows)
    return Lowered(lowered, params, count, count * _model(config).flops_per_token(length))


def _rows(layout: Layout, count: int, length: int, mesh: Mesh) -> Rows:
    """Return the shapes of rows, divided over the mesh as a batch's."""
    model = layout.model(layout.shapes)
    length = length if model.max_len is None else min(length, model.max_len)
    shapes = jax.eval_shape(lambda: Rows.of(model.init_cache(count, length), [Request([0])] * count))
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=parallel.batch_sharding(mesh, (count,))), shapes
    )


PROGRAMS: dict[str, Callable[..., Lowered]] = {"train": lower_train, "decode": lower_decode}


def batch_names(config: TrainConfig, packed: bool = True) -> tuple[str, ...]:
    """Return the arrays of a batch of a config's task."""
    return ("inputs", "labels", "segment_ids") if packed and config.data.kind == "text" else ("inputs", "labels")


def _model(config: TrainConfig) -> LM:
    return nnx.eval_shape(lambda: LM(config.model, rngs=nnx.Rngs(0)))
