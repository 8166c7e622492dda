"""A token of a matrix state in a TPU kernel, which reads each state once and writes it where it lies.

Kernel: `pallas_kernels/tpu/matrix_state_step.py`. It has no gradient: a step decodes.
"""

import jax
import jax.numpy as jnp

from based_jax.dims import BHKV, BHV
from based_jax.ops import sharded
from based_jax.ops.decode_calls import MatrixStepCall

LANES = 128


def supports(call: MatrixStepCall) -> str | None:
    """Return why the kernel cannot run a call, or None."""
    # Pallas' TPU modules take half a second to import and are needed only here and below.
    from pallas_kernels.tpu import matrix_state_step as kernels

    for name, x in (("q", call.q), ("k", call.k), ("v", call.v)):
        if x.dtype not in (jnp.bfloat16, jnp.float32):
            return f"{name} must be bfloat16 or float32, and is {x.dtype}"
    if call.bonus is not None:
        return "it reads the state after it is written, and with a bonus it is read before"
    if not call.state.size:
        return f"no dimension may be empty, and states are {call.state.shape}"
    batch, heads, keys, values = call.state.shape
    heads = sharded.part_of_device("heads", heads)
    if kernels.heads_of_program((batch, heads, keys, values)) is None:
        return f"VMEM does not hold {heads} states of {keys} by {values}, nor 8 of them"
    return sharded.mesh_refusal()


def slower(call: MatrixStepCall) -> str | None:
    """Return why XLA is faster, or None."""
    if call.a is None and call.beta is None:
        return "XLA has one pass as well where a state only decays"
    values = call.state.shape[3]
    return f"values come {LANES} at a time, and are {values}" if values % LANES else None


def compute(call: MatrixStepCall) -> tuple[BHV, BHKV]:
    """Return o and the state after the token, each device for its rows and heads."""
    beta = None if call.beta is None else call.beta[..., None]
    arguments = call.q, call.k, call.v, jnp.exp(call.log_decay.astype(jnp.float32)), call.state, beta, call.a, call.b
    names = ("batch", "heads")

    def shard(*arrays: jax.Array | None) -> tuple[BHV, BHKV]:
        from pallas_kernels.tpu import matrix_state_step as kernels

        given = sharded.vary_alike(*(x for x in arrays if x is not None))
        o, state = sharded.launch(kernels.step, *given, scale=call.scale)
        return o, state

    return sharded.per_shard(shard, arguments, [names] * len(arguments), [names, names], check_vma=False)
