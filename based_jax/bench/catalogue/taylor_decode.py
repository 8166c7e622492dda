"""Taylor attention as it decodes: a few tokens behind sums and recent tokens. It has no gradient."""

import functools
import math

import jax
import jax.numpy as jnp

from based_jax.bench.catalogue.definitions import filled, with_ones
from based_jax.bench.catalogue.operation import (
    FORWARD,
    Arrays,
    Case,
    Definition,
    Function,
    Operation,
    bf16,
    moved_bytes,
)
from based_jax.bench.catalogue.taylor import STATE_TOKENS, features
from based_jax.ops import taylor, taylor_decode
from based_jax.ops.decode_calls import RecentTokens, TaylorState

LARGEST = {"int8": 127, "float8_e4m3fn": 448}
"""What a row of the sums is scaled to, by what they are kept in."""


def _arrays(case: Case) -> dict[str, jax.ShapeDtypeStruct]:
    """Return T tokens, those that the sums are of, and W recent ones (see `filled`), of `dims` (K, V, W, T)."""
    (batch, heads), (k, v, room, time) = case.shape, case.dims
    token = {"q": (batch, time, heads, k), "k": (batch, time, heads, k), "v": (batch, time, heads, v)}
    past = {"past_k": (batch, heads, STATE_TOKENS, k), "past_v": (batch, heads, STATE_TOKENS, v)}
    recent = {"recent_k": (batch, heads, room, k), "recent_v": (batch, heads, room, v)}
    return bf16(token | past | recent | {"fill": (batch,)})


def _function(case: Case) -> Function:
    def run(arrays: Arrays, ids: jax.Array | None) -> Arrays:
        q, k, v = (arrays[name] for name in ("q", "k", "v"))
        o, after = taylor_decode.taylor_attention_decode(q, k, v, _state(case, arrays), impl=case.impl)
        return {"o": o, "after": taylor_decode.total(after)}

    return run


def _state(case: Case, arrays: Arrays) -> TaylorState:
    """Return the state that the tokens before have left, its sums in the case's dtype."""
    (_, heads), (k, v, room, _) = case.shape, case.dims
    recent_k, recent_v = arrays["recent_k"], arrays["recent_v"]
    phi, values = taylor.taylor_features(arrays["past_k"]), with_ones(arrays["past_v"].astype(jnp.float32))
    sums = jnp.einsum("bhpe,bhpv->bhev", phi, values, precision=jax.lax.Precision.HIGHEST)
    form = functools.partial(taylor_decode.initial_state, flush=room, state_dtype=case.dtype, dtype=recent_k.dtype)
    state = taylor_decode.holding(sums, form(len(recent_k), heads, k, v))
    return state._replace(recent=RecentTokens(recent_k, recent_v, filled(arrays["fill"], room)))


def definition(arrays: Arrays, ids: jax.Array, *, dtype: str) -> Arrays:
    """Return o_t = (phi(q_t)^T S + sum_j p_tj [v_j, 1])_V / (the same)_1, and the sums over all tokens.

    The j are recent tokens and the new ones up to t, p = 1 + s + s^2/2. Where the new ones have no room beside the
    recent ones, these are in S, which is rounded to `dtype` whenever it is written; that is of each row by itself, and
    the plain form, which writes all rows where one has no room, rounds more.
    """
    q, k, v = (jnp.swapaxes(arrays[name], 1, 2) for name in ("q", "k", "v"))
    recent_k, recent_v, time, room = arrays["recent_k"], arrays["recent_v"], q.shape[2], arrays["recent_k"].shape[2]
    length = filled(arrays["fill"], room)[:, None, None, None]
    held, full = jnp.arange(room)[None, None, :, None] < length, length + time > room
    recent = _sums(recent_k, recent_v, held)
    S = _rounded(_sums(arrays["past_k"], arrays["past_v"]), dtype)
    S = jnp.where(full, _rounded(S + recent, dtype), S)
    seen = jnp.einsum("bhte,bhev->bhtv", features(q), S) + _read(q, k, v, jnp.tri(time, dtype=bool)[None, None])
    seen = seen + _read(q, recent_k, recent_v, jnp.swapaxes(held & ~full, 2, 3))
    o = jnp.swapaxes(seen[..., :-1] / seen[..., -1:], 1, 2)
    return {"o": o, "after": S + jnp.where(full, 0, recent) + _sums(k, v)}


def _sums(k, v, held=True):
    """Return sum_j phi(k_j) [v_j, 1]^T over the tokens (B, H, W, .) that are held."""
    return jnp.einsum("bhwe,bhwv->bhev", jnp.where(held, features(k), 0), with_ones(v))


def _read(q, k, v, visible):
    s = jnp.einsum("bhtk,bhwk->bhtw", q, k) / math.sqrt(q.shape[-1])
    return jnp.einsum("bhtw,bhwv->bhtv", jnp.where(visible, 1 + s + s * s / 2, 0), with_ones(v))


def _rounded(S, dtype: str):
    """Return sums as they are kept: values rounded, scaled by rows where the dtype has few, the normaliser exact."""
    values, normaliser = S[..., :-1], S[..., -1:]
    if dtype == "float32":
        return S
    scale = jnp.abs(values).max(axis=-1, keepdims=True) / LARGEST[dtype] if dtype in LARGEST else 1
    scaled = values / jnp.where(scale == 0, 1, scale)
    kept = jnp.round(scaled) if dtype == "int8" else scaled.astype(dtype).astype(S.dtype)
    return jnp.concatenate([kept * scale, normaliser], axis=-1)


def _oracle(case: Case) -> Definition:
    return functools.partial(definition, dtype=case.dtype)


def _cost(case: Case, which: str) -> tuple[float, float]:
    """Count the tokens, and the state that is read: it is written every W tokens, and its products take no time."""
    (batch, heads), (k, v, *_) = case.shape, case.dims
    arrays = {name: x for name, x in _arrays(case).items() if not name.startswith("past")}
    state = batch * heads * taylor.expanded_dim(k) * (v * jnp.dtype(case.dtype).itemsize + 4)
    return moved_bytes(arrays, lambda arrays, ids: {"o": arrays["v"]}) + state, 0.0


def _cases() -> tuple[Case, ...]:
    make = functools.partial(Case, "taylor_attention_decode")
    exact = functools.partial(make, dtype="float32")
    return (
        exact((5, 3), (16, 64, 16, 1), quick=True),
        *(exact((5, 3), (16, 112, room, 4)) for room in (16, 32, 64)),
        *(make((5, 3), (16, 48, 16, time), dtype=x) for x in ("bfloat16", *LARGEST) for time in (1, 3)),
        *(exact((batch, 16), (16, 112, 16, 1)) for batch in (1, 128)),
        make((128, 16), (16, 112, 16, 1)),
    )


TAYLOR_ATTENTION_DECODE = Operation(
    table=taylor_decode.IMPLEMENTATIONS,
    arrays=_arrays,
    function=_function,
    oracle=_oracle,
    cost=_cost,
    kernels={"hopper_steps": ("taylor_decode",), "triton_steps": ("taylor_decode",)},
    cases=_cases(),
    small_cases=tuple(
        Case("taylor_attention_decode", (2, 2), (16, 64, 16, 2), dtype=x) for x in ("float32", "bfloat16", *LARGEST)
    ),
    timed={},
    passes=(FORWARD,),
)
