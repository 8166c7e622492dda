"""Whether what is trained fits the devices, before anything of it is made or written."""

import math
import os
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from based_jax import parallel
from based_jax.errors import UserError
from based_jax.train.run import TrainConfig

GIB = 1 << 30
ID_BYTES = 4
"""Of a token in an array of a batch; inputs and labels are two."""
BYTES_A_TOKEN_IS_MADE_IN = {True: 27, False: 12}
"""At the peak of making a batch on its host, of text or not: windows, batches stacked from them, and labels."""
_LOWER = "lower it, and raise the steps for as many rows"


def check_state_fits(abstract_state: Any) -> None:
    """Check that a state alone fits the memory of a device of this process, where that is known.

    Args:
      abstract_state: a tree of `jax.ShapeDtypeStruct` with shardings.

    Raises:
      UserError: it does not.
    """
    arrays = [
        leaf for leaf in jax.tree.leaves(abstract_state) if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended)
    ]
    needed = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in arrays)
    size = _memory_bytes(jax.local_devices()[0])
    if size is not None and needed > size:
        raise UserError(
            f"Parameters and optimizer take {needed / GIB:,.1f} GiB of a device, which has {size / GIB:,.1f} GiB;"
            " lower 'model.d_model', 'model.mlp_dim', 'model.vocab_size' or the number of layers, or raise 'mesh.fsdp'."
        )


def check_batch_fits(config: TrainConfig, mesh: Mesh) -> None:
    """Check that batches fit where they are made, which takes long, and that a device has room for one.

    Of activations the residual stream of one microbatch is counted alone, which every model has.

    Args:
      config: the run, with its `batch_size`.
      mesh: of all processes.

    Raises:
      UserError: they do not.
    """
    shape, seq_len = (config.batch_size,), config.data.longest_test
    held = parallel.batch_sharding(mesh, shape).addressable_devices_indices_map(shape).values()
    rows_of_device = config.batch_size // parallel.row_devices(mesh)
    rows = len(set(held)) * rows_of_device
    needed, size = BYTES_A_TOKEN_IS_MADE_IN[config.data.kind == "text"] * rows * seq_len, _machine_bytes()
    if needed > size:
        raise UserError(
            f"batch_size is {config.batch_size}: a batch, of which this process feeds {rows} rows of {seq_len} tokens,"
            f" takes {needed / GIB:,.1f} GiB to be made here, and this machine has {size / GIB:,.1f} GiB; {_LOWER}."
        )
    tokens = rows_of_device * seq_len // mesh.shape["sequence"]
    residual = tokens // config.microbatches * config.model.d_model * jnp.dtype(config.model.dtype).itemsize
    needed, room = 2 * ID_BYTES * tokens + residual, _memory_bytes(jax.local_devices()[0])
    if room is not None and needed > room:
        raise UserError(
            f"batch_size is {config.batch_size}: the {tokens} tokens of a device take {needed / GIB:,.1f} GiB there"
            f" before any layer, with one microbatch of {config.microbatches} as activations, and it has"
            f" {room / GIB:,.1f} GiB; {_LOWER}, or raise microbatches."
        )


def _machine_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _memory_bytes(device: jax.Device) -> int | None:
    """Return the memory of a device, of a CPU that of the machine; None where it does not say."""
    if device.platform == "cpu":
        return _machine_bytes()
    return (device.memory_stats() or {}).get("bytes_limit")
