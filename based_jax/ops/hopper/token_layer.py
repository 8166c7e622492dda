"""Half a layer of one token in a Hopper kernel: which calls it takes, and the zeros that its blocks count in.

Kernels: `pallas_kernels/hopper/token_layer.py`. They have no gradient: a step decodes.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from based_jax.dims import BD
from based_jax.ops.decode_calls import Pieces, TokenConvCall, TokenMLPCall
from based_jax.ops.hopper import limits

SIZE_MULTIPLE, MAX_TAPS = 128, 8
"""Of D and F; of a convolution."""

Inputs = Float[Array, "B W F"]


def supports(call: TokenMLPCall | TokenConvCall) -> str | None:
    """Return why the kernel cannot run a call, or None."""
    hidden, width = call.second.shape
    if len(call.r) != 1:
        return f"it is for one token, and there are {len(call.r)}"
    for name, x in (("the first matrix", call.first), ("the second matrix", call.second)):
        if x.dtype != jnp.bfloat16:
            return f"{name} must be bfloat16, and is {x.dtype}"
    if call.first.shape[1] != 2 * hidden or width % SIZE_MULTIPLE or hidden % SIZE_MULTIPLE or not width * hidden:
        return (
            f"D and F must be multiples of {SIZE_MULTIPLE}, and the matrices are {call.first.shape} and"
            f" {call.second.shape}"
        )
    if isinstance(call, TokenConvCall) and len(call.kernel) > MAX_TAPS:
        return f"there must be at most {MAX_TAPS} taps, and are {len(call.kernel)}"
    if jax.sharding.get_abstract_mesh().size > 1:
        return "it runs on one device, and there is a mesh"
    return limits.refusal() or _crowd(width, hidden)


def _crowd(width: int, hidden: int) -> str | None:
    """Return why its blocks are not all at work at once, or None."""
    from pallas_kernels.hopper import token_layer as kernels

    if kernels.Plan.of(width, hidden, limits.multiprocessors()) is None:
        return f"{limits.multiprocessors()} multiprocessors are not enough for D {width} and F {hidden}"
    return None


def compute_mlp(call: TokenMLPCall) -> tuple[BD, Pieces]:
    """Return r + y, and what the MLP adds to it."""
    # Pallas' GPU modules take half a second to import and are needed only here.
    from pallas_kernels.hopper import token_layer as kernels

    pieces, options = _pieces(call, kernels.MARKS), {"eps": call.eps, "multiprocessors": limits.multiprocessors()}
    total, sums, marks = kernels.gated_mlp(
        call.r[0], pieces.sums[:, 0], _wide(call.scale), call.first, call.second, pieces.marks, **options
    )
    return total[None], Pieces(sums[:, None], marks)


def compute_conv(call: TokenConvCall) -> tuple[BD, Pieces, Inputs]:
    """Return the same of a convolution, and its last inputs, in the place of those given."""
    from pallas_kernels.hopper import token_layer as kernels

    pieces, options = _pieces(call, kernels.MARKS), {"eps": call.eps, "multiprocessors": limits.multiprocessors()}
    vectors = call.r[0], pieces.sums[:, 0], _wide(call.scale)
    inner = call.first, _wide(call.bias), _wide(call.kernel), call.state[0], call.second, _wide(call.last_bias)
    total, sums, marks, state = kernels.gated_conv(*vectors, *inner, pieces.marks, **options)
    return total[None], Pieces(sums[:, None], marks), state[None]


def _pieces(call: TokenMLPCall | TokenConvCall, marks: int) -> Pieces:
    """Return what is to be added, be it zeros, and zeros to count in."""
    sums = jnp.zeros((1, *call.r.shape), jnp.bfloat16) if call.y is None else call.y.sums
    zeros = None if call.y is None else call.y.marks
    return Pieces(sums, jnp.zeros(marks, jnp.int32) if zeros is None else zeros)


def _wide(x: Array) -> Array:
    return x.astype(jnp.float32)
