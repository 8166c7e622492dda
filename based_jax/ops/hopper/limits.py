"""What every Hopper kernel asks before it runs, and how time is filled up for its copies.

Kernels that multiply on tensor cores with Mosaic's WGMMA run on Hopper GPUs alone.
"""

import jax
import jax.numpy as jnp

from based_jax import devices
from based_jax.ops.dispatch import target_device_kind
from based_jax.ops.sharded import mesh_refusal

MAX_ELEMENTS = 2**31
"""Kernels that read an array other than by tiles count its elements in 32 bits."""
CHUNK_TOKENS = 64
"""Tokens that a kernel reads together."""
COPY_ROWS = 8
"""Tokens of a copy's smallest tile: other lengths are padded."""


def refusal() -> str | None:
    """Return why no kernel can run here, whatever its arguments, or None."""
    if not devices.is_hopper(kind := target_device_kind()):
        return f"the kernels are for Hopper GPUs, and this is {kind}"
    return mesh_refusal()


def multiprocessors() -> int:
    """Return the multiprocessors that work is cut for."""
    return devices.cores(target_device_kind())


def pad_time(*arrays: jax.Array) -> list[jax.Array]:
    """Return (B, T, H, .) arrays with zeros after the last token, to a length that copies can take."""
    time = arrays[0].shape[1]
    filler = max(CHUNK_TOKENS, -(-time // COPY_ROWS) * COPY_ROWS) - time
    return [jnp.pad(x, ((0, 0), (0, filler), (0, 0), (0, 0))) for x in arrays]
