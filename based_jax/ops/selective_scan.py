"""Mamba's selective scan: a diagonal state space whose step, input and output depend on the token (arXiv 2312.00752).

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t          y_t = C_t . h_t          (equations 2 and 4, algorithm 2)

Each of D channels has N states of its own. The state is (B, D, N) fp32. What the paper's kernel keeps on chip,
exp(dt A) and h for every token, exists here for one chunk at a time, in the backward pass too.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from based_jax.dims import BD, BT, BTD
from based_jax.ops import hopper, scan, segments
from based_jax.ops.dispatch import Implementation, dispatch
from based_jax.ops.precision import EXACT

CHUNK = 64
LANES = 128
STATES = range(8, 33, 8)
TILE = 8
"""What the kernels take: a multiple of channels, states of a channel, and a multiple of tokens."""

BTN = Float[Array, "B T N"]
BN = Float[Array, "B N"]
BDN = Float[Array, "B D N"]
DN = Float[Array, "D N"]


def initial_state(batch: int, channels: int, state_dim: int) -> BDN:
    """Return the state before the first token."""
    return jnp.zeros((batch, channels, state_dim), jnp.float32)


@jax.custom_vjp
def step_sizes(raw: Float[Array, "*T D"], bias: Float[Array, "D"]) -> Float[Array, "*T D"]:
    """Return the fp32 steps softplus(raw + bias) of channels.

    The gradient of `raw` has its dtype; that of `bias` is the sum of it over the tokens, taken apart: left to itself
    XLA sums column by column where it computes the other, which takes twice as long.
    Source: state-spaces/mamba:mamba_ssm/ops/selective_scan_interface.py (`delta_bias`, `delta_softplus`).
    """
    return jax.nn.softplus(_biased(raw, bias))


def _biased(raw, bias):
    return raw.astype(jnp.float32) + bias.astype(jnp.float32).reshape((1,) * (raw.ndim - 1) + (-1,))


def _step_sizes_fwd(raw, bias):
    return step_sizes(raw, bias), (raw, bias)


def _step_sizes_bwd(saved, grad):
    raw, bias = saved
    draw = jax.lax.optimization_barrier((grad * jax.nn.sigmoid(_biased(raw, bias))).astype(raw.dtype))
    return draw, draw.astype(jnp.float32).sum(axis=tuple(range(raw.ndim - 1))).astype(bias.dtype)


step_sizes.defvjp(_step_sizes_fwd, _step_sizes_bwd)


def selective_scan(
    u: BTD,
    dt: BTD,
    A: DN,
    B: BTN,
    C: BTN,
    *,
    state: BDN | None = None,
    segment_ids: BT | None = None,
    return_state: bool = False,
    impl: str = "auto",
) -> Any:
    """Scan u (B, T, D) with steps dt >= 0 (B, T, D), A < 0 (D, N), and B, C (B, T, N).

    Args:
      state: state to start from; it belongs to each row's first document.
      segment_ids: ids of packed documents, 0 for padding (see `ops/segments.py`).
      return_state: return (y, state after the last token) instead of y.
      impl: "recurrent" (token by token), "oracle" (the same), "xla" (associative scans of chunks), "hopper"
        (Mosaic GPU kernels; D a multiple of 128; N 8, 16, 24 or 32) or "auto".

    Raises:
      UserError: `impl` is unknown or cannot run this call.
    """
    y, state = dispatch("selective_scan", IMPLEMENTATIONS, impl, (u, dt, B, C), A, state, segment_ids)
    return (y, state) if return_state else y


def selective_scan_step(u: BD, dt: BD, A: DN, B: BN, C: BN, state: BDN) -> tuple[BD, BDN]:
    """Return one token's output and the state after it."""
    u32, dt = u.astype(jnp.float32), dt.astype(jnp.float32)
    state = jnp.exp(dt[..., None] * A[None]) * state + (dt * u32)[..., None] * B.astype(jnp.float32)[:, None]
    y = jnp.einsum("BDN,BN->BD", state, C.astype(jnp.float32), precision=EXACT)
    return y.astype(u.dtype), state


def _recurrent(xs, A: DN, state, segment_ids) -> tuple[Any, Any]:
    def step(x, state):
        u, dt, B, C = x
        return selective_scan_step(u, dt, A, B, C, state)

    return scan.over_tokens(step, xs, _empty(xs, A), state, segment_ids)


def _chunked(xs, A: DN, state, segment_ids) -> tuple[Any, Any]:
    """Compose the affine maps of `CHUNK` tokens by an associative scan; apply them to the state before."""

    def chunk(xs, state: BDN, span: scan.Span):
        u, dt, B, C = (x.astype(jnp.float32) for x in xs)
        kept = jnp.exp(dt[..., None] * A[None, None])
        kept = jnp.where(span.begins[:, :, None, None], 0.0, kept)  # a new document forgets the one before
        added = (dt * u)[..., None] * B[:, :, None]
        kept, added = jax.lax.associative_scan(_compose, (kept, added), axis=1)
        h = added if span.fresh else kept * state[:, None] + added
        y = jnp.einsum("BTDN,BTN->BTD", h, C, precision=EXACT)
        return y.astype(xs[0].dtype), h[:, -1]

    return scan.over_chunks(chunk, xs, _empty(xs, A), state, segment_ids, CHUNK)


def _compose(first, second):
    """Return h -> a2 (a1 h + b1) + b2 as its two coefficients."""
    (a1, b1), (a2, b2) = first, second
    return a1 * a2, a2 * b1 + b2


def _empty(xs, A: DN) -> BDN:
    return initial_state(xs[0].shape[0], *A.shape)


def supports(xs, A, state, segment_ids) -> str | None:
    """Return why the kernels cannot run this call, or None; shapes and dtypes are all that they ask for."""
    u, (channels, states) = xs[0], A.shape
    if u.dtype not in (jnp.bfloat16, jnp.float32):
        return f"u must be bfloat16 or float32, and is {u.dtype}"
    if channels % LANES:
        return f"the channels must be a multiple of {LANES}, and are {channels}"
    if states not in STATES:
        return f"a channel must have {', '.join(map(str, STATES))} states, and has {states}"
    if not 0 < u.size * states < TILE * hopper.OFFSETS:
        return f"there must be 1 to {TILE * hopper.OFFSETS - 1} states of all tokens, and are {u.size * states}"
    return hopper.refusal()


def _hopper(xs, A: DN, state, segment_ids) -> tuple[BTD, BDN]:
    """Run the kernels on each device's rows, all channels together."""
    rows, arguments = ("batch",), (*xs, A, state, segment_ids)
    return hopper.per_shard(_on_device, arguments, (*(rows,) * 4, (), rows, rows), (rows, rows))


def _on_device(u, dt, B, C, A, state, segment_ids) -> tuple[BTD, BDN]:
    """Run the kernels on a whole number of tiles; tokens of padding have no step, and so change no state."""
    state = initial_state(u.shape[0], *A.shape) if state is None else state
    time, offsets, padding = u.shape[1], None, None
    if segment_ids is not None:
        offsets = jnp.where(segments.begins_later(segment_ids), segments.FORGET, 0.0)
        padding = (segment_ids == 0)[..., None]
        u, dt = (jnp.where(padding, 0, x) for x in (u, dt))
    tokens = u, dt.astype(jnp.float32), jnp.concatenate([B, C], axis=-1).astype(jnp.float32), offsets
    u, dt, BC, offsets = (None if x is None else _pad(x) for x in tokens)
    y, state = _fused(*hopper.vary_alike(u, dt, A.astype(jnp.float32), BC, state, offsets))
    y = y[:, :time]
    return y if padding is None else jnp.where(padding, 0, y), state


def _pad(x: Array) -> Array:
    return hopper.fill(x, {1: TILE})


@jax.custom_vjp
def _fused(u, dt, A, BC, state, offsets):
    # Pallas' GPU modules take half a second to import and are needed only here.
    from pallas_kernels.hopper import selective_scan as kernels

    return tuple(hopper.call(kernels.forward, u, dt, A, BC, state, offsets, with_starts=False))


def _fused_fwd(u, dt, A, BC, state, offsets):
    from pallas_kernels.hopper import selective_scan as kernels

    y, last, starts = hopper.call(kernels.forward, u, dt, A, BC, state, offsets, with_starts=True)
    return (y, last), (u, dt, A, BC, starts, offsets)


def _fused_bwd(saved, gradients):
    from pallas_kernels.hopper import selective_scan_backward as kernels

    u, dt, A, BC, starts, offsets = saved
    return *hopper.call(kernels.backward, u, dt, A, BC, starts, *gradients, offsets), None


_fused.defvjp(_fused_fwd, _fused_bwd)

IMPLEMENTATIONS = {
    "hopper": Implementation(_hopper, supports, platform="cuda"),
    "xla": Implementation(_chunked),
    "recurrent": Implementation(_recurrent),
    "oracle": Implementation(_recurrent),
}
