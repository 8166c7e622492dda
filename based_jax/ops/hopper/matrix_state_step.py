"""A token of a matrix state in a Hopper kernel, which reads each state once and writes it where it lies.

Kernel: `pallas_kernels/hopper/matrix_state_step.py`. It has no gradient: a step decodes.
"""

import jax
import jax.numpy as jnp

from based_jax.dims import BHKV, BHV
from based_jax.ops import sharded
from based_jax.ops.decode_calls import MatrixStepCall, UnitDeltaStepCall
from based_jax.ops.hopper import limits

LEAST_ROWS = 64
"""Of a call of unit keys: a whole model's token was timed on one H200 with 128."""
KEY_MULTIPLE, MAX_KEYS, VALUE_MULTIPLE = 16, 256, 32


def supports(call: MatrixStepCall) -> str | None:
    """Return why the kernel cannot run a call, or None."""
    if call.bonus is not None:
        return "it reads the state after it is written, and with a bonus it is read before"
    return _refusal({"q": call.q, "k": call.k, "v": call.v}, call.state)


def supports_unit(call: UnitDeltaStepCall) -> str | None:
    """Return why the kernel cannot run a call, or None."""
    if jax.sharding.get_abstract_mesh().size > 1:
        return "it runs on one device, and there is a mesh"
    return _refusal({"the product": call.joint}, call.state)


def _refusal(tokens: dict[str, jax.Array], state: BHKV) -> str | None:
    keys, values = state.shape[2:]
    for name, x in tokens.items():
        if x.dtype not in (jnp.bfloat16, jnp.float32):
            return f"{name} must be bfloat16 or float32, and is {x.dtype}"
    if keys % KEY_MULTIPLE or not 0 < keys <= MAX_KEYS or values % VALUE_MULTIPLE or not values:
        return (
            f"K must be a multiple of {KEY_MULTIPLE} up to {MAX_KEYS} and V of {VALUE_MULTIPLE}, and a state is"
            f" {keys} by {values}"
        )
    if not 0 < state.size < limits.MAX_ELEMENTS:
        return f"states must have 1 to {limits.MAX_ELEMENTS - 1} elements together, and have {state.size}"
    return limits.refusal() or sharded.varying_refusal((tokens, state))


def slower(call: MatrixStepCall) -> str | None:
    """Return why XLA is faster, or None."""
    return "XLA has one pass as well where a state only decays" if call.a is None and call.beta is None else None


def slower_unit(call: UnitDeltaStepCall) -> str | None:
    """Return why `auto` leaves a call to others, or None."""
    few = len(call.joint) < LEAST_ROWS
    return f"it was timed with 128 rows, and there are {len(call.joint)}" if few else None


def compute(call: MatrixStepCall) -> tuple[BHV, BHKV]:
    """Return o and the state after the token, each device for its rows and heads."""
    beta = None if call.beta is None else call.beta[..., None]
    arguments = call.q, call.k, call.v, jnp.exp(call.log_decay.astype(jnp.float32)), call.state, beta, call.a, call.b
    names = ("batch", "heads")

    def shard(*arrays: jax.Array | None) -> tuple[BHV, BHKV]:
        # Pallas' GPU modules take half a second to import and are needed only here.
        from pallas_kernels.hopper import matrix_state_step as kernels

        given = sharded.vary_alike(*(x for x in arrays if x is not None))
        options = {"scale": call.scale, "multiprocessors": limits.multiprocessors()}
        o, state = sharded.launch(kernels.step, *given, **options)
        return o, state

    return sharded.per_shard(shard, arguments, [names] * len(arguments), [names, names], check_vma=False)


def compute_unit(call: UnitDeltaStepCall) -> tuple[BHV, BHKV]:
    """Return o and the state after the token of queries and keys of length 1."""
    from pallas_kernels.hopper import matrix_state_step as kernels

    kept = jnp.exp(call.log_decay.astype(jnp.float32))
    arguments = call.joint, kept, call.beta.astype(jnp.float32)[..., None], call.state
    o, state = kernels.unit_step(*arguments, scale=call.scale, multiprocessors=limits.multiprocessors())
    return o, state
