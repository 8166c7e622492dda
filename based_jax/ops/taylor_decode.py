"""Taylor attention while it decodes: a state that is written every W tokens, and the tokens since then (W recent ones).

With the sums S of `ops/taylor.py` over the tokens that they hold, and the recent ones j beside them,

    o_t = (phi(q_t)^T S + sum_j p_tj [v_j, 1])_V / (the same)_1

so that a token reads the state and writes its own key and value alone. Where the next tokens of a row have no room its
recent ones are added to S: sums without a decay take tokens late at no loss, and a row rounds them as it would alone,
however full others are. Tokens that were only drafted are taken back by counting fewer recent ones, whatever follows
them.

A state whose values are rounded (`FORMATS`) loses what is small beside its sums each time it is written: such a state
takes `MIN_ROUNDED_FLUSH` tokens at once or more. The normaliser is fp32 in each format.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from based_jax.dims import BHEV, BTHK, BTHV
from based_jax.errors import UserError, unknown
from based_jax.ops import sharded
from based_jax.ops.arguments import checked
from based_jax.ops.decode_calls import RecentTokens, TaylorDecodeCall, TaylorState, TaylorSums
from based_jax.ops.dispatch import Implementation, dispatch, not_run
from based_jax.ops.hopper import taylor_decode as hopper_taylor_decode
from based_jax.ops.linear_attention import normalise, with_ones
from based_jax.ops.precision import EXACT
from based_jax.ops.taylor import expanded_dim, polynomial, taylor_features
from based_jax.ops.tpu import taylor_decode as tpu_taylor_decode
from based_jax.ops.triton import taylor_decode as triton_taylor_decode

Sums = Float[Array, "B T H _"]  # values, then the normaliser

MIN_ROUNDED_FLUSH, MAX_FLUSH = 16, 256
"""Tokens that a state takes at once: the fewest of a rounded one, and the most of any."""


class Format(NamedTuple):
    """How the values of a state are kept.

    Attributes:
      dtype: of the values.
      largest: the largest value, to which each row is scaled; None where rows are as they are.
      errors: relative, of outputs after 4,096 random tokens where the state is written every 16 and every 64
        (K = 16, V = 32; `tests/ops/test_taylor_decode.py` holds each format to them).
    """

    dtype: Any
    largest: float | None
    errors: dict[int, float]


FORMATS = {
    "float32": Format(jnp.float32, None, {16: 1e-5, 64: 1e-5}),
    "bfloat16": Format(jnp.bfloat16, None, {16: 0.016, 64: 0.009}),
    "int8": Format(jnp.int8, 127.0, {16: 0.055, 64: 0.027}),
    "float8_e4m3fn": Format(jnp.float8_e4m3fn, 448.0, {16: 0.3, 64: 0.15}),
}
EXACT_FORMAT = "float32"


def check_form(flush: int, state_dtype: str) -> None:
    """Raise UserError for a state that does not exist: of an unknown format, or rounded more often than it bears."""
    if state_dtype not in FORMATS:
        raise unknown("state_dtype", state_dtype, FORMATS)
    if not 1 <= flush <= MAX_FLUSH:
        raise UserError(f"flush is {flush}; a state is written every 1 to {MAX_FLUSH} tokens.")
    if state_dtype != EXACT_FORMAT and flush < MIN_ROUNDED_FLUSH:
        raise UserError(
            f"flush is {flush} and state_dtype '{state_dtype}'; a state that is not '{EXACT_FORMAT}' loses tokens in"
            f" its rounding unless it is written every {MIN_ROUNDED_FLUSH} or more."
        )


def initial_state(
    batch: int, heads: int, feature_dim: int, value_dim: int, *, flush: int = 1, state_dtype: str = EXACT_FORMAT, dtype
) -> TaylorState:
    """Return the state before the first token.

    Args:
      flush: W, after how many tokens the state is written; with 1 each token is added at once.
      state_dtype: a key of `FORMATS`.
      dtype: of recent keys and values, which are kept as they are.

    Raises:
      UserError: there is no such state (`check_form`).
    """
    check_form(flush, state_dtype)
    shape = batch, heads, expanded_dim(feature_dim)
    like = FORMATS[state_dtype]
    scales = None if like.largest is None else jnp.zeros(shape, jnp.float32)
    sums = TaylorSums(jnp.zeros((*shape, value_dim), like.dtype), scales, jnp.zeros(shape, jnp.float32))
    if flush == 1:
        return TaylorState(sums)
    k, v = (jnp.zeros((batch, heads, flush, dim), dtype) for dim in (feature_dim, value_dim))
    return TaylorState(sums, RecentTokens(k, v, jnp.zeros(batch, jnp.int32)))


def state_elements(feature_dim: int, value_dim: int, flush: int, state_dtype: str) -> int:
    """Return the elements that a head keeps: E (V+1) of sums, W (K+V) of recent tokens, and E scales if there are."""
    features, recent = expanded_dim(feature_dim), flush if flush > 1 else 0
    scales = FORMATS[state_dtype].largest is not None
    return features * (value_dim + 1 + scales) + recent * (feature_dim + value_dim)


def total(state: TaylorState) -> BHEV:
    """Return the sums over all tokens, recent ones too, as `taylor_attention` takes them."""
    sums, recent = state
    values, normaliser = (_values(sums), sums.normaliser) if recent is None else _with_recent(sums, recent)
    return jnp.concatenate([values, normaliser[..., None]], axis=-1)


def holding(sums: BHEV, like: TaylorState) -> TaylorState:
    """Return the state, of the same form as another one, of a past with these sums and no recent tokens."""
    held, recent = _written(sums[..., :-1], sums[..., -1], like.sums), like.recent
    return TaylorState(held, recent and recent._replace(length=jnp.zeros_like(recent.length)))


@checked
def taylor_attention_decode(q: BTHK, k: BTHK, v: BTHV, state: Any, *, impl: str = "auto") -> tuple[BTHV, TaylorState]:
    """Read the next tokens (B, T, H, .), few of them, behind a `TaylorState`.

    Where the state has recent tokens these T are among them afterwards, and `rewound` takes the last ones back: so a
    model verifies what another one has drafted.

    Args:
      impl: "xla_steps", "hopper_steps" (a Mosaic GPU kernel, in place; bf16, K = 16), "tpu_steps" (a Mosaic TPU kernel,
        in place; auto's for rows by 128), "triton_steps" (a Triton kernel that reads, for other GPUs; not run yet, so
        not auto's) or "auto".

    Returns:
      o in v's dtype, and the state after the last token.

    Raises:
      UserError: `impl` is unknown or cannot run this call, or the tokens are more than the state has room for.
    """
    sums, recent = state
    if (sizes := sums.values.shape[2:]) != (wanted := (expanded_dim(q.shape[-1]), v.shape[-1])):
        raise UserError(f"taylor_attention_decode: E and V of the state are {sizes}; of these q and v, {wanted}.")
    if q.shape[1] > (room := 1 if recent is None else recent.k.shape[2]):
        raise UserError(f"taylor_attention_decode: there are {q.shape[1]} tokens; this state takes {room} at once.")
    parts = (None, None) if recent is None else ((recent.k, recent.v), recent.length)
    call = TaylorDecodeCall(q, k, v, sums, *parts)
    o, sums, tokens, length = dispatch("taylor_attention_decode", IMPLEMENTATIONS, impl, call)
    if recent is None:
        return o, TaylorState(sums)
    recent_k, recent_v = tokens
    return o, TaylorState(sums, RecentTokens(recent_k, recent_v, length))


def rewound(state: TaylorState, tokens: Int[Array, "#B"]) -> TaylorState:
    """Return the state without each row's last `tokens`, at most those of the last `taylor_attention_decode`."""
    recent = state.recent
    if recent is None:
        raise UserError("flush is 1; a state takes tokens back where it is written every 2 or more.")
    return state._replace(recent=recent._replace(length=recent.length - tokens))


def _read(q: BTHK, k, v, sums: TaylorSums, before: Int[Array, "B"]) -> BTHV:
    """Return what q reads of the sums and of recent tokens, itself among them, behind `before` others."""
    return normalise(_sums_seen(q, sums) + _recent_seen(q, k, v, before)).astype(v.dtype)


def _steps(
    call: TaylorDecodeCall, read: Callable[..., BTHV] = _read
) -> tuple[BTHV, TaylorSums, tuple | None, Int[Array, "B"] | None]:
    """Add a token to the sums and read them; of recent tokens add those of each row that has no room, as if alone."""
    q, k, v, sums, tokens, length = call
    if tokens is None or length is None:
        sums = _written(*_with_tokens(sums, taylor_features(k).swapaxes(1, 2), v.swapaxes(1, 2)), sums)
        return normalise(_sums_seen(q, sums)).astype(v.dtype), sums, None, None

    T, W = q.shape[1], tokens[0].shape[2]

    def is_full(length):
        return length + T > W

    def flushed(state):
        sums, length = state
        full, written = is_full(length), _written(*_with_recent(sums, RecentTokens(*tokens, length)), sums)
        kept = jax.tree.map(
            lambda old, new: jnp.where(jnp.expand_dims(full, range(1, old.ndim)), new, old), sums, written
        )
        return kept, jnp.where(full, 0, length)

    # A loop of one turn or none: a `cond` copies the sums that it leaves as they are. A turn reads those of all rows.
    sums, length = jax.lax.while_loop(lambda state: jnp.any(is_full(state[1])), flushed, (sums, length))
    recent_k, recent_v = (_appended(held, new, length) for held, new in zip(tokens, (k, v), strict=True))
    return read(q, recent_k, recent_v, sums, length), sums, (recent_k, recent_v), length + T


def _by_triton(call: TaylorDecodeCall):
    """Return the same, read by the kernel, each device for its rows and heads."""
    compute = functools.partial(_steps, read=triton_taylor_decode.outputs)
    return sharded.per_device(compute, call, check_vma=False)  # how many are recent is the same for all heads


def _sums_seen(q: BTHK, sums: TaylorSums) -> Sums:
    """Return phi(q)^T S."""
    phi = taylor_features(q)
    weights = phi if sums.scales is None else phi * sums.scales[:, None]
    # A product of one row would be left to cuBLAS, which takes no rounded values.
    values = jnp.sum(weights[..., None] * sums.values.astype(jnp.float32)[:, None], axis=3)
    return jnp.concatenate([values, jnp.sum(phi * sums.normaliser[:, None], axis=3, keepdims=True)], axis=-1)


def _recent_seen(q: BTHK, k, v, before: Int[Array, "B"]) -> Sums:
    """Return sum_j p_tj [v_j, 1] over recent tokens, the first of q behind `before` of them, each seeing itself too."""
    s = jnp.einsum("BTHK,BHWK->BHTW", q, k, precision=EXACT, preferred_element_type=jnp.float32)
    place = before[:, None] + jnp.arange(q.shape[1])[None]
    visible = jnp.arange(k.shape[2])[None, None] <= place[..., None]
    p = jnp.where(visible[:, None], polynomial(s / math.sqrt(q.shape[-1])), 0.0)
    return jnp.einsum("BHTW,BHWV->BTHV", p, with_ones(v), precision=EXACT)


def _with_recent(sums: TaylorSums, recent: RecentTokens) -> tuple[Array, Array]:
    """Return values and normaliser in fp32 with recent tokens."""
    held = jnp.arange(recent.k.shape[2])[None] < recent.length[:, None]
    return _with_tokens(sums, jnp.where(held[:, None, :, None], taylor_features(recent.k), 0.0), recent.v)


def _with_tokens(sums: TaylorSums, phi: Float[Array, "B H W E"], v: Float[Array, "B H W V"]) -> tuple[Array, Array]:
    """Return values and normaliser in fp32 with tokens of these features and values."""
    added = jnp.einsum("BHWE,BHWV->BHEV", phi, v.astype(jnp.float32), precision=EXACT)
    return _values(sums) + added, sums.normaliser + jnp.sum(phi, axis=2)


def _appended(held: Float[Array, "B H W _"], new: Float[Array, "B T H _"], length: Int[Array, "B"]):
    """Write T tokens of each row behind its `length` recent ones."""

    @jax.vmap
    def write(held, new, length):
        return jax.lax.dynamic_update_slice_in_dim(held, new, length, axis=1)

    return write(held, new.swapaxes(1, 2).astype(held.dtype), length)


def _values(sums: TaylorSums) -> Float[Array, "B H E V"]:
    values = sums.values.astype(jnp.float32)
    return values if sums.scales is None else values * sums.scales[..., None]


def _written(values: Float[Array, "B H E V"], normaliser: Float[Array, "B H E"], like: TaylorSums) -> TaylorSums:
    """Return sums in the format of others: a row's values are scaled so that the largest is the format's."""
    dtype = like.values.dtype
    if (largest := FORMATS[dtype.name].largest) is None:
        return TaylorSums(values.astype(dtype), None, normaliser)
    scales = jnp.max(jnp.abs(values), axis=-1) / largest
    scaled = values / jnp.where(scales == 0, 1.0, scales)[..., None]
    if jnp.issubdtype(dtype, jnp.integer):
        scaled = jnp.round(scaled)
    return TaylorSums(scaled.astype(dtype), scales, normaliser)


IMPLEMENTATIONS = {
    "hopper_steps": Implementation(hopper_taylor_decode.compute, hopper_taylor_decode.supports, platform="cuda"),
    "triton_steps": Implementation(_by_triton, triton_taylor_decode.supports, platform="cuda", slower=not_run),
    "tpu_steps": Implementation(
        tpu_taylor_decode.compute, tpu_taylor_decode.supports, platform="tpu", slower=tpu_taylor_decode.slower
    ),
    "xla_steps": Implementation(_steps),
}
