"""A bonus, with which tokens read a state before they write to it, for kernels that read it after they have written.

    q_t^T (S_{t-1} + diag(u) k_t v_t^T) = q_t^T S_{t-1} + (q_t . u k_t) v_t

What a query reads of S_{t-1} is what the token before it would read with that query.
"""

from collections.abc import Callable

import jax.numpy as jnp

from based_jax.dims import BHKV, BTHV
from based_jax.ops import segments
from based_jax.ops.calls import MatrixStateCall
from based_jax.ops.precision import EXACT, einsum

Compute = Callable[[MatrixStateCall], tuple[BTHV, BHKV]]


def read_apart(compute: Compute) -> Compute:
    """Return `compute`, which knows no bonus, for calls that may have one."""

    def run(call: MatrixStateCall) -> tuple[BTHV, BHKV]:
        if call.bonus is None:
            return compute(call)
        plain, padding = segments.separated(call._replace(bonus=None))
        queries = jnp.pad(plain.q[:, 1:], ((0, 0), (0, 1), (0, 0), (0, 0)))
        read, state = compute(plain._replace(q=queries, segment_ids=None))
        read = jnp.concatenate([_first_read(plain), read[:, :-1]], axis=1).astype(jnp.float32)
        if call.segment_ids is not None:
            read = jnp.where(segments.begins_later(call.segment_ids)[..., None, None], 0.0, read)
        o = (read + _own(call)).astype(call.v.dtype)
        return (o if padding is None else jnp.where(padding, 0, o)), state

    return run


def _first_read(call: MatrixStateCall) -> BTHV:
    """Return what the first token reads of the state that is given."""
    first = jnp.zeros_like(call.v[:, :1])
    if call.state is None:
        return first
    read = einsum("BTHK,BHKV->BTHV", call.q[:, :1].astype(jnp.float32), call.state, EXACT)
    return (call.scale * read).astype(first.dtype)


def _own(call: MatrixStateCall) -> BTHV:
    """Return what each token reads of itself, in fp32."""
    assert call.bonus is not None
    q, k, v = (x.astype(jnp.float32) for x in (call.q, call.k, call.v))
    return call.scale * jnp.sum(q * call.bonus[None, None] * k, axis=-1, keepdims=True) * v
