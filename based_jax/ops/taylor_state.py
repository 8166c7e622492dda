"""What the kernels of Taylor attention share that walk over chunks with a state of packed features."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from based_jax.dims import BT
from based_jax.ops import segments, sharded
from based_jax.ops.calls import LinearAttentionCall


def refusal(call: LinearAttentionCall, dtypes: tuple, largest: dict[str, int]) -> str | None:
    """Return why kernels of these dtypes and largest K, and V where they have one, cannot run a call, or None."""
    q, k, v = call.q, call.k, call.v
    if len({x.dtype for x in (q, k, v)}) > 1 or q.dtype not in dtypes:
        wanted = "all " * (len(dtypes) > 1) + "be " + " or ".join(x.name for x in dtypes)
        return f"q, k and v must {wanted}, and are {q.dtype}, {k.dtype} and {v.dtype}"
    for name, size in {"K": q.shape[3], "V": v.shape[3]}.items():
        if size > largest.get(name, size):
            return f"{name} must be at most {largest[name]}, and is {size}"
    if not q.size * v.size:
        return f"no dimension may be empty, and q is {q.shape}, v {v.shape}"
    return sharded.mesh_refusal()


def held(numbers: BT, chunk: int) -> Int[Array, "B _"]:
    """Return the document of the state before each chunk and after the last; of a row without any, 1."""
    by_chunk = sharded.fill(numbers, {1: chunk}).reshape(numbers.shape[0], -1, chunk).max(2)
    first = jnp.maximum(segments.first_id(numbers), 1)
    return jax.lax.cummax(jnp.concatenate([first[:, None], by_chunk], axis=1), axis=1)


def factors(keys: int) -> np.ndarray:
    """Return the factors of the features in `ops.taylor.taylor_features`, (1, 1, E, 1), which the kernels' have not."""
    rows, columns = np.tril_indices(keys)
    products = np.where(rows == columns, 0.5, 1.0) ** 0.5 * keys**-0.5
    return np.concatenate([[1.0], np.full(keys, keys**-0.25), products]).astype(np.float32)[None, None, :, None]
