"""A diagonal plus low rank transition by chunks in Triton kernels."""

from collections.abc import Callable

from based_jax import devices
from based_jax.dims import BHKV, BTHV
from based_jax.ops.calls import MatrixStateCall
from based_jax.ops.dispatch import target_device_kind
from based_jax.ops.sharded import heads_of_device
from based_jax.ops.triton import channel_decays, chunks


def supports(call: MatrixStateCall) -> str | None:
    """Return why the kernels cannot run this call, or None; of `delta_rule` as well."""
    return chunks.supports(call.v, call.k.shape[-1])


def slower(call: MatrixStateCall, *, steps_support: Callable) -> str | None:
    """Return why `auto` leaves a call to others, or None; `steps_support` tells whether kernels run it by steps."""
    (rows, _, heads, V), K = call.v.shape, call.k.shape[-1]
    known, heads = devices.crossovers(target_device_kind()), heads_of_device(rows, heads)
    many, large = heads >= known.dplr_steps_heads, known.large_state_elements <= K * V
    if many and not large and steps_support(call) is None:
        return f"steps are faster for {heads} heads with states of {K * V} elements"
    return chunks.slower(call.v)


def compute(call: MatrixStateCall) -> tuple[BTHV, BHKV]:
    """Return o and the state after the last token, each device for its rows and heads."""
    return channel_decays.compute(call)
