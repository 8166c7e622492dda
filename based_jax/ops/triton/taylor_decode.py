"""What a few tokens read of a Taylor state and of recent tokens through the Triton kernel: which calls it takes.

Kernel: `pallas_kernels/triton/taylor_decode.py`. It writes nothing but outputs: XLA adds recent tokens to the state.
"""

import jax.numpy as jnp
from jaxtyping import Array, Int

from based_jax import devices
from based_jax.dims import BTHK, BTHV
from based_jax.ops import sharded
from based_jax.ops.decode_calls import BHWK, BHWV, TaylorDecodeCall, TaylorSums
from based_jax.ops.dispatch import target_device_kind
from based_jax.ops.triton import limits

DTYPES = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)
ROOM_MULTIPLE = 16
MAX_VALUES = 1024
"""Of all tokens of a head: so many sums the registers of a program hold, 8 of a lane."""
WITHOUT_FP8 = ("Ampere",)


def supports(call: TaylorDecodeCall) -> str | None:
    """Return why the kernel cannot run this call, or None."""
    q, k, v = call.q, call.k, call.v
    tokens, value_dim = v.shape[1], v.shape[3]
    if reason := limits.missing_packages():
        return reason
    if call.tokens is None:
        return "the state must have recent tokens, and flush is 1"
    if len(dtypes := {x.dtype for x in (q, k, v, *call.tokens)}) > 1 or q.dtype not in DTYPES:
        names = ", ".join(sorted(map(str, dtypes)))
        return f"q, k, v and recent tokens must all be bfloat16 or float32, and are {names}"
    if not q.size * v.size:
        return f"no dimension may be empty, and q is {q.shape}, v {v.shape}"
    if tokens * value_dim > MAX_VALUES:
        return f"V must be at most {MAX_VALUES // tokens} for {tokens} tokens, and is {value_dim}"
    if (room := call.tokens[0].shape[2]) % ROOM_MULTIPLE:
        return f"flush must be a multiple of {ROOM_MULTIPLE}, and is {room}"
    architecture = devices.architecture(target_device_kind())
    if call.sums.values.dtype == jnp.float8_e4m3fn and architecture in WITHOUT_FP8:
        return f"{architecture} GPUs have no {call.sums.values.dtype}"
    return sharded.mesh_refusal()


def outputs(q: BTHK, k: BHWK, v: BHWV, sums: TaylorSums, before: Int[Array, "B"]) -> BTHV:
    """Return what q reads of the sums and of recent tokens, of which `before` are not its own, in v's dtype."""
    # Triton takes half a second to import and is needed only here.
    from pallas_kernels.triton import taylor_decode as kernels

    arrays = q, k, v, *sums, before
    given = iter(sharded.vary_alike(*(x for x in arrays if x is not None)))
    return kernels.outputs(*(None if x is None else next(given) for x in arrays))
