"""A token of a matrix state: the step by which gated linear attention and the delta rules decode.

    u = S^T a        S' = diag(w) S + b u^T + k v^T        o = scale S'^T q        w = exp(log_decay)

a, b, and the bonus that is read in place of what is written, are as in `ops/gated_linear_attention.py` and
`ops/delta_rule.py`. The states are fp32, and to read and to write them is what a step takes.

`impl` is "oracle", "xla_passes" (in place, over a delta rule's states twice), "hopper_states" (a Mosaic GPU
kernel, over all once; no bonus, K a multiple of 16 up to 256, V of 32), "tpu_states" (a Mosaic TPU kernel, likewise;
any K and V) or "auto".
"""

import jax
import jax.numpy as jnp

from based_jax.dims import BHKV, BHV
from based_jax.ops.decays import as_dplr
from based_jax.ops.decode_calls import MatrixStepCall
from based_jax.ops.dispatch import Implementation
from based_jax.ops.hopper import matrix_state_step as hopper_matrix_state_step
from based_jax.ops.precision import EXACT
from based_jax.ops.tpu import matrix_state_step as tpu_matrix_state_step


def update_and_read(call: MatrixStepCall) -> tuple[BHV, BHKV]:
    """Return o in v's dtype and the state after the token, in the order of the definition."""
    call = call if call.beta is None else as_dplr(call)
    q, k, v = (x.astype(jnp.float32) for x in (call.q, call.k, call.v))
    written = k[..., None] * v[..., None, :]
    after = jnp.exp(call.log_decay)[..., None] * call.state + written
    if call.a is not None and call.b is not None:
        u = jnp.einsum("BHK,BHKV->BHV", call.a, call.state, precision=EXACT)
        after = after + call.b[..., None] * u[..., None, :]
    read = after if call.bonus is None else call.state + call.bonus[None, :, :, None] * written
    o = call.scale * jnp.einsum("BHK,BHKV->BHV", q, read, precision=EXACT)
    return o.astype(call.v.dtype), after


def _in_place(call: MatrixStepCall) -> tuple[BHV, BHKV]:
    """Return the same in as few passes over the states as XLA has: one, or of a delta rule two.

    Such a state is read for u before it is written. What its update adds to o needs no state, so that o is read in the
    same pass; behind barriers XLA keeps to that, and updates the states where they lie.
    """
    if call.a is None and call.beta is None:
        return update_and_read(call)
    tokens = jax.lax.optimization_barrier([call.q, call.k, call.v, call.log_decay, call.beta, call.a, call.b])
    call = call._replace(**dict(zip(("q", "k", "v", "log_decay", "beta", "a", "b"), tokens, strict=True)))
    q, k, v, log_decay, state, _, _, a, b, scale = call if call.beta is None else as_dplr(call)
    assert a is not None and b is not None
    q, k, v32, kept = (x.astype(jnp.float32) for x in (q, k, v, jnp.exp(log_decay)))
    u, before = jax.lax.optimization_barrier([jnp.sum(x[..., None] * state, axis=2) for x in (a, kept * q)])
    o = before + jnp.sum(q * b, axis=-1, keepdims=True) * u + jnp.sum(q * k, axis=-1, keepdims=True) * v32
    after = kept[..., None] * state + b[..., None] * u[..., None, :] + k[..., None] * v32[..., None, :]
    return (scale * o).astype(v.dtype), after


IMPLEMENTATIONS = {
    "hopper_states": Implementation(
        hopper_matrix_state_step.compute,
        hopper_matrix_state_step.supports,
        platform="cuda",
        slower=hopper_matrix_state_step.slower,
    ),
    "tpu_states": Implementation(
        tpu_matrix_state_step.compute,
        tpu_matrix_state_step.supports,
        platform="tpu",
        slower=tpu_matrix_state_step.slower,
    ),
    "xla_passes": Implementation(_in_place),
    "oracle": Implementation(update_and_read),
}
