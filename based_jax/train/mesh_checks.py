"""What a mesh must divide of a run, checked before anything is compiled; what it may leave undivided is not here."""

from jax.sharding import AbstractMesh, Mesh

from based_jax import parallel
from based_jax.nn.divided import check_tensor
from based_jax.train.run import TrainConfig


def check_mesh(config: TrainConfig, mesh: Mesh | AbstractMesh) -> None:
    """Check that a mesh divides the rows of a run's batches and microbatches, and its model's heads and widths.

    Raises:
      UserError: it does not; the first number that it does not divide, and what the mesh or the number can be.
    """
    parallel.check_batch_size(config.batch_size, mesh, config.microbatches)
    check_tensor(config.model, mesh)
