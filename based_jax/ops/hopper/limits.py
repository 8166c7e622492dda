"""What every Hopper kernel asks before it runs, and how time is filled up for its copies.

Kernels that multiply on tensor cores with Mosaic's WGMMA run on Hopper GPUs alone.
"""

import jax
import jax.numpy as jnp

from based_jax import devices
from based_jax.ops.calls import MatrixStateCall
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


def matrix_state_refusal(call: MatrixStateCall, most_keys: int) -> str | None:
    """Return why no kernel by chunks can run a call with a matrix state, or None."""
    q, v = call.q, call.v
    if v.dtype != jnp.bfloat16:
        return f"v must be bfloat16, and is {v.dtype}"
    if q.shape[-1] > most_keys:
        return f"K must be at most {most_keys}, and is {q.shape[-1]}"
    if not v.size * q.size:
        return f"no dimension may be empty, and q is {q.shape}, v {v.shape}"
    return refusal()


def multiprocessors() -> int:
    """Return the multiprocessors that work is cut for."""
    return devices.cores(target_device_kind())


def pad_time(*arrays: jax.Array) -> list[jax.Array]:
    """Return (B, T, H, .) arrays with zeros after the last token, to a length that copies can take."""
    time = arrays[0].shape[1]
    filler = max(CHUNK_TOKENS, -(-time // COPY_ROWS) * COPY_ROWS) - time
    return [jnp.pad(x, ((0, 0), (0, filler), (0, 0), (0, 0))) for x in arrays]
