"""From (config, mesh) to what is compiled: the step, the state that it changes, and how that lies on the mesh.

The loop, benchmarks and compilation for devices that are not here share it: nothing below asks for a device, so the
mesh may be of a topology without hardware.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from based_jax import optim, parallel
from based_jax.nn.lm import LM
from based_jax.train.mesh_checks import check_mesh
from based_jax.train.run import TrainConfig
from based_jax.train.step import Metrics, TrainState, initial_state, make_train_step, skipping_nonfinite


@dataclasses.dataclass(frozen=True)
class TrainProgram:
    """What a config trains on a mesh; its calls set the mesh, so that each device runs kernels on its part.

    Attributes:
      config, mesh: what it was made from.
      graphdef: the model's structure.
      abstract_state: shapes of the state with their shardings, the target of a restore too.
      jitted_init: `(key) -> state`.
      jitted_step: `(state, batch) -> (state, metrics)`; the state is donated.
    """

    config: TrainConfig
    mesh: Mesh
    graphdef: nnx.GraphDef
    abstract_state: TrainState
    jitted_init: Any
    jitted_step: Any

    @property
    def shardings(self) -> TrainState:
        """How the state lies on the mesh."""
        return jax.tree.map(lambda x: x.sharding, self.abstract_state)

    def initial_state(self, taken: Mapping[str, jax.Array] | None = None) -> TrainState:
        """Return the state before the first step, a function of the config alone.

        Args:
          taken: parameters by their paths in place of those that the seed draws.
        """
        state = self.jitted_init(jax.random.key(self.config.seed))
        by_path = taken or {}
        params = jax.tree_util.tree_map_with_path(lambda keys, x: by_path.get(optim.path_of(keys), x), state.params)
        return dataclasses.replace(state, params=params)

    def step(self, state: TrainState, batch: parallel.GlobalBatch) -> tuple[TrainState, Metrics]:
        """Return the state after a global batch, and its metrics; see `step.make_train_step`."""
        with jax.set_mesh(self.mesh):
            return self.jitted_step(state, batch)

    def check_step(self, batch: parallel.HostBatch) -> None:
        """Trace a step over batches like this one, of any host, without compiling it.

        Raises:
          UserError: an operation of the model cannot run.
        """
        with jax.set_mesh(self.mesh):
            self.jitted_step.eval_shape(self.abstract_state, self.abstract_batch(batch))

    def trace_step(self, batch: parallel.HostBatch) -> jax.stages.Traced:
        """Return the step over batches like this one, of any host, as JAX has traced it."""
        with jax.set_mesh(self.mesh):
            return self.jitted_step.trace(self.abstract_state, self.abstract_batch(batch))

    def lower_step(self, batch: parallel.HostBatch) -> jax.stages.Lowered:
        """Return the step over batches like this one, of any host, to be compiled ahead of time."""
        with jax.set_mesh(self.mesh):
            return self.trace_step(batch).lower()

    def abstract_batch(self, batch: parallel.HostBatch) -> dict[str, jax.ShapeDtypeStruct]:
        """Return the shapes of the global batch that a batch of some host is part of, and how it lies on the mesh.

        Raises:
          UserError: its sequences cannot be divided over the mesh.
        """
        parallel.check_length(batch["inputs"].shape[1], self.mesh)

        def shape_of(x: np.ndarray) -> jax.ShapeDtypeStruct:
            shape = (self.config.batch_size, *x.shape[1:])
            dtype, where = jax.dtypes.canonicalize_dtype(x.dtype), parallel.batch_sharding(self.mesh, shape)
            return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

        return {name: shape_of(x) for name, x in batch.items()}


def train_program(config: TrainConfig, mesh: Mesh) -> TrainProgram:
    """Return what a config trains on a mesh.

    Shapes, shardings and names come from one abstract construction: initialisation, the step and the restore of a
    checkpoint all place the state by them, so nothing is ever whole on one device that does not fit there.

    Args:
      config: the run; its `rows_per_device` becomes a `batch_size`.
      mesh: of devices that are here, or that are not.

    Raises:
      UserError: the mesh cannot divide rows, heads or widths, or the schedule does not fit the steps.
    """
    config = config.sized(mesh)
    check_mesh(config, mesh)
    optimizer = optim.optimizer(config.optim, config.steps)

    def init(key: jax.Array) -> TrainState:
        return initial_state(LM(config.model, rngs=nnx.Rngs(key)), optimizer, key)

    graphdef, _ = nnx.split(nnx.eval_shape(lambda: LM(config.model, rngs=nnx.Rngs(0))))
    shapes = jax.eval_shape(lambda: init(jax.random.key(0)))
    where = parallel.shardings(shapes, mesh)
    if config.optim.zero1:
        where = dataclasses.replace(where, opt_state=parallel.shardings(shapes.opt_state, mesh, spread=True))
        optimizer = updating_parts(optimizer, parallel.shardings(shapes.params, mesh, spread=True), where.params)
    step = make_train_step(graphdef, optimizer, config.microbatches)
    if config.max_skipped_steps:
        step = skipping_nonfinite(step)
    return TrainProgram(
        config=config,
        mesh=mesh,
        graphdef=graphdef,
        abstract_state=parallel.with_shardings(shapes, where),
        jitted_init=jax.jit(init, out_shardings=where),
        jitted_step=jax.jit(step, donate_argnums=0, out_shardings=(where, None)),
    )


def updating_parts(optimizer: optax.GradientTransformation, parts: Any, whole: Any) -> optax.GradientTransformation:
    """Return an optimizer of which each device computes its part of the updates, and gathers them once (ZeRO-1).

    Args:
      optimizer: whose state and updates lie as its gradients do.
      parts: shardings of what it sees of gradients and parameters.
      whole: those of the parameters themselves.
    """

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        # A table's gradient is that of a gather: cut while it is being summed, it would have activations cut alike.
        grads = jax.lax.with_sharding_constraint(grads, whole)
        grads, params = (jax.lax.with_sharding_constraint(tree, parts) for tree in (grads, params))
        updates, state = optimizer.update(grads, state, params)
        return jax.lax.with_sharding_constraint(updates, whole), state

    return optax.GradientTransformation(optimizer.init, update)
