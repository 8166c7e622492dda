"""Causal convolutions of channels as products with Toeplitz tiles, in Triton kernels: who may call them, and gradients.

They take documents that stand one after another; a token that is padding gets zero. Filters are rounded to bf16, sums
are fp32. Kernels: `pallas_kernels/triton/toeplitz.py`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from based_jax import devices
from based_jax.dims import BT, BTD
from based_jax.ops import sharded
from based_jax.ops.calls import LongConvCall
from based_jax.ops.dispatch import target_device_kind
from based_jax.ops.triton import limits

Taps = Float[Array, "L D"]


def supports(x: Array) -> str | None:
    """Return why the kernels cannot convolve x, or None."""
    if reason := limits.missing_packages():
        return reason
    if x.dtype != jnp.bfloat16:
        return f"its inputs must be bfloat16, and are {x.dtype}"
    if not x.size:
        return f"no dimension may be empty, and they are {x.shape}"
    return sharded.mesh_refusal()


def slower(taps: int) -> str | None:
    """Return why `auto` leaves a convolution with so many taps to others, or None."""
    if reason := limits.unknown_gpu():
        return reason
    most = devices.crossovers(target_device_kind()).toeplitz_tiles_taps
    return None if taps <= most else f"there are {taps} taps, above {most}"


def compute(call: LongConvCall) -> BTD:
    """Return y, each device for its rows and channels."""
    return sharded.per_device(lambda call: convolve(call.u, call.kernel, call.segment_ids), call)


def convolve(x: BTD, taps: Taps, numbers: BT | None) -> BTD:
    """Return y_t = sum_{l<L} taps_l x_{t-l} over tokens of a document, for one device's arrays.

    Args:
      numbers: of documents, as `dispatch` hands them on; without them each row is one.
    """
    # Triton takes half a second to import and is needed only here.
    from pallas_kernels.triton.toeplitz import BLOCK_TOKENS

    time = x.shape[1]
    padding = False if numbers is None else (numbers == 0)[..., None]
    numbers = None if numbers is None else sharded.fill(numbers.astype(jnp.int32), {1: BLOCK_TOKENS})
    filled = sharded.fill(jnp.where(padding, 0, x), {1: BLOCK_TOKENS})
    given = sharded.vary_alike(filled, taps.astype(jnp.float32), numbers)
    return jnp.where(padding, 0, _convolve(*given)[:, :time])


@jax.custom_vjp
def _convolve(x: BTD, taps: Taps, numbers: BT | None) -> BTD:
    return _convolve_fwd(x, taps, numbers)[0]


def _convolve_fwd(x, taps, numbers):
    from pallas_kernels.triton import toeplitz as kernels

    sight, _ = _sights(x, taps, numbers)
    y = kernels.products(*_by_channel(x, sight.leaving()), taps.T, sight)
    return _by_token(y), (x, taps, numbers)


def _convolve_bwd(saved, dy):
    from pallas_kernels.triton import toeplitz as kernels

    x, taps, numbers = saved
    sight, behind = _sights(x, taps, numbers)
    given, taken = _by_channel(x, sight.leaving()), _by_channel(dy, behind.leaving(-1))
    dx = kernels.products(*taken, taps.T, behind, step=-1)
    return _by_token(dx), kernels.gradients(*given, *taken, len(taps), sight, behind).T, None


_convolve.defvjp(_convolve_fwd, _convolve_bwd)


def _sights(x: BTD, taps: Taps, numbers: BT | None):
    """Return what documents let tokens see of those before them, and of those behind; without numbers each row is one.

    What fills up a row is behind its only document, and zero.
    """
    from pallas_kernels.triton.toeplitz import Sight

    if numbers is None:
        sight = Sight.of_one(x.shape[0], x.shape[1], len(taps))
        return sight, sight.flipped()
    return Sight.of(numbers, len(taps)), Sight.behind(numbers, len(taps))


def _by_channel(x: BTD, kept: Bool[Array, "B T"]) -> tuple[Float[Array, "D B T"], Float[Array, "D B T"]]:
    """Return x, and x where it is kept, 0 elsewhere."""
    x = jax.lax.optimization_barrier(jnp.moveaxis(x, 2, 0))  # XLA would read x against its order for what follows
    return x, jnp.where(kept[None], x, 0)


def _by_token(x: Float[Array, "D B T"]) -> BTD:
    return jnp.moveaxis(x, 0, 2)
