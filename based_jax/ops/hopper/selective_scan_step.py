"""A token of Mamba's selective scan in a Hopper kernel, which reads each state once and writes it where it lies.

Kernel: `pallas_kernels/hopper/selective_scan_step.py`. It has no gradient: a step decodes.
"""

import jax
import jax.numpy as jnp

from based_jax.dims import BD
from based_jax.ops import sharded
from based_jax.ops.calls import BDN, DN
from based_jax.ops.decode_calls import GatedScanStepCall, SelectiveScanStepCall
from based_jax.ops.hopper import limits

CHANNEL_MULTIPLE, STATE_COUNTS, LANE_VECTOR = 128, (8, 16, 32), 8
LEAST_ROWS = 64
"""Of a call that is faster here: whole models' tokens were timed on one H200 with 1 row, where they are slower, and
with 128 and 512."""


def supports(call: SelectiveScanStepCall) -> str | None:
    """Return why the kernel cannot run a call, or None."""
    return _refusal({"u": call.u, "dt": call.dt, "B": call.B, "C": call.C}, call.A, call.state)


def supports_gated(call: GatedScanStepCall) -> str | None:
    """Return why the kernel cannot run a call, or None."""
    tokens = {"u": call.u, "dt": call.raw, "B and C": call.selected, "z": call.joint}
    for name, x, multiple in (("B", call.selected, LANE_VECTOR), ("z", call.joint, CHANNEL_MULTIPLE)):
        if x.shape[1] % multiple:
            return f"the channels of the product with {name} must be a multiple of {multiple}, and are {x.shape[1]}"
    return _refusal(tokens, call.A, call.state)


def slower(call: SelectiveScanStepCall | GatedScanStepCall) -> str | None:
    """Return why XLA's form is faster, or None."""
    few = len(call.u) < LEAST_ROWS
    return f"it is faster from {LEAST_ROWS} rows on, and there are {len(call.u)}" if few else None


def _refusal(tokens: dict[str, jax.Array], A: DN, state: BDN) -> str | None:
    channels, states = A.shape
    for name, x in tokens.items():
        if x.dtype not in (jnp.bfloat16, jnp.float32):
            return f"{name} must be bfloat16 or float32, and is {x.dtype}"
    if channels % CHANNEL_MULTIPLE or not channels:
        return f"the channels must be a multiple of {CHANNEL_MULTIPLE}, and are {channels}"
    if states not in STATE_COUNTS:
        return f"a channel must have {', '.join(map(str, STATE_COUNTS))} states, and has {states}"
    if not 0 < state.size < limits.MAX_ELEMENTS:
        return f"states must have 1 to {limits.MAX_ELEMENTS - 1} elements together, and have {state.size}"
    return limits.refusal() or sharded.varying_refusal((tokens, state))


def compute(call: SelectiveScanStepCall) -> tuple[BD, BDN]:
    """Return y and the state after the token, each device for its rows."""

    def shard(*arrays: jax.Array | None) -> tuple[BD, BDN]:
        # Pallas' GPU modules take half a second to import and are needed only here.
        from pallas_kernels.hopper import selective_scan_step as kernels

        y, state = sharded.launch(kernels.step, *arrays)
        return y, state

    rows, BC = ("batch",), jnp.concatenate([call.B, call.C], axis=-1)
    arguments, names = (call.u, call.dt, call.A, BC, call.state, call.bias), (rows, rows, (), rows, rows, ())
    return sharded.per_shard(shard, arguments, names, (rows, rows), check_vma=False)


def compute_gated(call: GatedScanStepCall) -> tuple[BD, BDN]:
    """Return x and the state after the token, each device for its rows."""

    def shard(*arrays: jax.Array) -> tuple[BD, BDN]:
        from pallas_kernels.hopper import selective_scan_step as kernels

        y, state = sharded.launch(kernels.gated_step, *arrays)
        return y, state

    rows = ("batch",)
    arguments = call.u, call.raw, call.A, call.selected, call.state, call.bias, call.skip, call.joint
    names = rows, rows, (), rows, rows, (), (), rows
    return sharded.per_shard(shard, arguments, names, (rows, rows), check_vma=False)
