"""Whether what is trained fits the devices, before anything of it is made or written."""

import math
import os
from typing import Any

import jax
from jax.sharding import Mesh

from based_jax import parallel
from based_jax.errors import UserError

ID_BYTES = 4
"""Of a token in a batch."""


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
            f"Parameters and optimizer take {needed / 2**30:,.1f} GiB of a device, which has {size / 2**30:,.1f} GiB;"
            " lower 'model.d_model', 'model.mlp_dim', 'model.vocab_size' or the number of layers, or raise 'mesh.fsdp'."
        )


def check_batch_fits(batch_size: int, mesh: Mesh, seq_len: int) -> None:
    """Raise UserError for a batch whose inputs and labels, of the rows of this process, exceed its machine's memory."""
    shape = (batch_size,)
    held = parallel.batch_sharding(mesh, shape).addressable_devices_indices_map(shape).values()
    rows = len(set(held)) * (batch_size // parallel.row_devices(mesh))
    needed, size = 2 * ID_BYTES * rows * seq_len, _machine_bytes()
    if needed > size:
        raise UserError(
            f"batch_size is {batch_size}: a batch, of which this process feeds {rows} rows of {seq_len} tokens, takes"
            f" {needed / 2**30:,.1f} GiB here, and this machine has {size / 2**30:,.1f} GiB; lower it, and raise the"
            " steps for as many rows."
        )


def _machine_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _memory_bytes(device: jax.Device) -> int | None:
    """Return the memory of a device, of a CPU that of the machine; None where it does not say."""
    if device.platform == "cpu":
        return _machine_bytes()
    return (device.memory_stats() or {}).get("bytes_limit")
