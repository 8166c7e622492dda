"""A time-invariant state space with a complex diagonal transition (arXiv 2206.11893; H3's second, arXiv 2212.14052).

    x_t = a x_{t-1} + b u_t          y_t = 2 Re sum_n c_n x_{t,n}          a = exp(log_a), b, c complex (H, N)

Each of H heads runs over P channels of its own. The other conjugate half of the N states is what 2 Re stands for. The
state is (B, H, P, N, 2) fp32, real and imaginary part.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Complex, Float, Int

from based_jax.dims import SegmentIds
from based_jax.ops import scan, sequence, sharded
from based_jax.ops.arguments import checked
from based_jax.ops.calls import BHPN2, BTHP, HN, DiagonalSSMCall
from based_jax.ops.decays import finite
from based_jax.ops.dispatch import Implementation, dispatch
from based_jax.ops.long_conv import product_is_slower, toeplitz
from based_jax.ops.precision import EXACT, einsum, product_policy
from based_jax.ops.triton import toeplitz as triton_toeplitz

CHUNK_TOKENS = 64

BHP = Float[Array, "B H P"]


def initial_state(batch: int, heads: int, channels: int, state_dim: int) -> BHPN2:
    """Return the state before the first token."""
    return jnp.zeros((batch, heads, channels, state_dim, 2), jnp.float32)


@checked
def diagonal_ssm(
    u: BTHP,
    log_a: HN,
    b: HN,
    c: HN,
    *,
    state: BHPN2 | None = None,
    segment_ids: SegmentIds | None = None,
    impl: str = "auto",
) -> tuple[BTHP, BHPN2]:
    """Filter each channel of u (B, T, H, P) by its head's state space, log_a with a negative real part.

    Args:
      state: state to start from; it belongs to each row's first document.
      segment_ids: ids of packed documents, 0 for padding (see `ops/segments.py`).
      impl: "xla_steps" (token by token), "oracle" (the same), "xla_chunks" (convolutions, linear in T), "xla_toeplitz"
        (one convolution, in u's dtype; no packing and no state before; auto's for short sequences on a GPU),
        "triton_tiles" (one convolution in Triton kernels, bf16) or "auto".

    Returns:
      y in u's dtype, and the state (B, H, P, N, 2) after the last token, fp32.

    Raises:
      UserError: `impl` is unknown or cannot run this call.
    """
    log_a = jax.lax.complex(finite(log_a.real), log_a.imag)
    return dispatch("diagonal_ssm", IMPLEMENTATIONS, impl, DiagonalSSMCall(u, log_a, b, c, state, segment_ids), CUT)


@checked
@jax.named_scope("diagonal_ssm_step")
def diagonal_ssm_step(u: BHP, log_a: HN, b: HN, c: HN, state: BHPN2) -> tuple[BHP, BHPN2]:
    """Return one token's output and the state after it."""
    x = _complex(state) * jnp.exp(log_a)[None, :, None] + b[None, :, None] * u.astype(jnp.float32)[..., None]
    return _read(x, c).astype(u.dtype), _real(x)


def impulse_response(log_a: HN, b: HN, c: HN, length: int) -> Float[Array, "H L"]:
    """Return the outputs after a unit input at time 0: 2 Re sum_n c_n b_n a_n^t."""
    return _read_powers((c * b)[None, :, None], log_a, length)[0, :, 0]


def _read_powers(x: Complex[Array, "B H P N"], log_a: HN, length: int) -> Float[Array, "B H P L"]:
    """Return 2 Re sum_n x_n a_n^t for each t: powers of whole chunks times those within one, which are few."""
    starts = _powers(log_a, jnp.arange(0, length, CHUNK_TOKENS))
    found = jnp.einsum(
        "BHPQN,HRN->BHPQR",
        x[:, :, :, None] * starts[None, :, None],
        _powers(log_a, jnp.arange(CHUNK_TOKENS)),
        precision=EXACT,
    )
    return 2 * found.real.reshape(*x.shape[:3], -1)[..., :length]


def _powers(log_a: HN, time: Int[Array, "L"]) -> Complex[Array, "H L N"]:
    return jnp.exp(log_a[:, None] * time[None, :, None])


def _recurrent(call: DiagonalSSMCall) -> tuple[BTHP, BHPN2]:
    def step(u, state):
        return diagonal_ssm_step(u, call.log_a, call.b, call.c, state)

    return scan.over_tokens(step, call.u, _empty(call), call.state, call.segment_ids)


def _chunked(call: DiagonalSSMCall) -> tuple[BTHP, BHPN2]:
    """Convolve chunks of `CHUNK_TOKENS` by the impulse response as a Toeplitz matrix; carry the state between."""
    log_a, b, c = call.log_a, call.b, call.c

    def chunk(u, state: BHPN2, span: scan.Span):
        C, x, inputs = u.shape[1], _complex(state), u.astype(jnp.float32)
        time = jnp.arange(C)
        response = impulse_response(log_a, b, c, C)[:, jnp.maximum(time[:, None] - time[None, :], 0)]
        kernel = jnp.where(span.visible[:, None], response[None], 0.0)
        y = jnp.einsum("BHTS,BSHP->BTHP", kernel, inputs, precision=EXACT)

        powers = jnp.exp(log_a[:, None] * (1 + time)[None, :, None])  # (H, C, N), a^1 to a^C
        if not span.fresh:
            read = 2 * jnp.einsum("BHPN,HTN->BTHP", x, c[:, None] * powers, precision=EXACT).real
            y = y + jnp.where(span.reads[:, :, None, None], _moved(read, -jnp.argmax(span.reads, axis=1)), 0.0)
        return y.astype(u.dtype), _real(_after(inputs, x, span, log_a, b))

    return scan.over_chunks(chunk, call.u, _empty(call), call.state, call.segment_ids, CHUNK_TOKENS)


def _convolution(call: DiagonalSSMCall) -> tuple[BTHP, BHPN2]:
    """Convolve the whole sequence by the impulse response as a Toeplitz matrix."""
    u, log_a, b, c = call.u, call.log_a, call.b, call.c
    T, (dtype, precision) = u.shape[1], product_policy(u.dtype)
    matrices = toeplitz(impulse_response(log_a, b, c, T), dtype)
    y = einsum("BSHP,HST->BTHP", u.astype(dtype), matrices, precision, dtype)
    powers = b[:, None] * jnp.exp(log_a[:, None] * jnp.arange(T - 1, -1, -1)[None, :, None])
    after = jnp.einsum("BSHP,HSN->BHPN", u.astype(jnp.float32), powers, precision=EXACT)
    return y.astype(u.dtype), _real(after)


def _tiles(call: DiagonalSSMCall) -> tuple[BTHP, BHPN2]:
    """Convolve the whole sequence by the impulse response in kernels; the state before and after by its powers."""
    (B, T, H, P), ids = call.u.shape, call.segment_ids
    taps = jnp.repeat(impulse_response(call.log_a, call.b, call.c, T).T, P, axis=1)
    y = triton_toeplitz.convolve(call.u.reshape(B, T, H * P), taps, ids).reshape(call.u.shape)
    if call.state is not None:
        x = _complex(call.state) * (call.c * jnp.exp(call.log_a))[None, :, None]
        read = jnp.moveaxis(_read_powers(x, call.log_a, T), 3, 1)
        first = jnp.ones((B, T), bool) if ids is None else ids == 1
        y = (y + jnp.where(first[..., None, None], read, 0.0)).astype(call.u.dtype)
    return y, _chunked(call)[1]


def _supports_tiles(call: DiagonalSSMCall) -> str | None:
    return triton_toeplitz.supports(call.u)


def _tiles_are_slower(call: DiagonalSSMCall) -> str | None:
    """Return why other forms are faster, or None."""
    return triton_toeplitz.slower(call.u.shape[1])


def _supports_convolution(call: DiagonalSSMCall) -> str | None:
    alone = call.state is None and call.segment_ids is None
    return None if alone else "a state before, and packed documents, need chunks"


def _convolution_is_slower(call: DiagonalSSMCall) -> str | None:
    """Return why chunks are the faster form, or None."""
    return product_is_slower(call.u.shape[1])


def _after(u: BTHP, x, span: scan.Span, log_a: HN, b: HN):
    """Return the complex state after a chunk's last token, which padding may follow: inputs are moved to the end."""
    C = u.shape[1]
    tokens = jnp.max(jnp.where(span.writes, 1 + jnp.arange(C)[None], 0), axis=1)  # up to and with the last one
    written = _moved(jnp.where(span.writes[:, :, None, None], u, 0.0), tokens - C)
    powers = jnp.exp(log_a[:, None] * (C - 1 - jnp.arange(C))[None, :, None])
    added = jnp.einsum("BSHP,HSN->BHPN", written, b[:, None] * powers, precision=EXACT)
    decay = jnp.exp(log_a[None] * span.reads.sum(axis=1)[:, None, None])
    return jnp.where(span.keeps[:, None, None, None], x * decay[:, :, None], 0.0) + added


def _moved(x: BTHP, by: Int[Array, "#B"]) -> BTHP:
    """Return x at time t + by, each row's own number; zero where there is none, as before and behind padding."""
    time = jnp.arange(x.shape[1])[None] + by[:, None]
    inside = (time >= 0) & (time < x.shape[1])
    return jnp.where(
        inside[..., None, None], jnp.take_along_axis(x, jnp.where(inside, time, 0)[..., None, None], 1), 0.0
    )


def _read(x, c: HN):
    return 2 * jnp.sum(x * c[None, :, None], axis=-1).real


def _complex(state: BHPN2):
    state = state.astype(jnp.float32)
    return jax.lax.complex(state[..., 0], state[..., 1])


def _real(x) -> BHPN2:
    return jnp.stack([x.real, x.imag], axis=-1)


def _empty(call: DiagonalSSMCall) -> BHPN2:
    batch, _, heads, channels = call.u.shape
    return initial_state(batch, heads, channels, call.log_a.shape[1])


def _piece(run: sequence.Run, call: DiagonalSSMCall) -> tuple[Array, BHPN2]:
    """Return the power of a that the tokens of a call decay a state by, (B, H, 1, N, 2), and the state after them."""
    ones = jnp.ones(call.u.shape[:2], jnp.float32)
    tokens = sequence.total(ones, call.segment_ids)[:, None, None, None]
    return _real(jnp.exp(call.log_a[None, :, None] * tokens)), run(call)[1]


def _compose(earlier, later):
    """Return the transition and the state of two pieces."""
    (a1, x1), (a2, x2) = earlier, later
    return _real(_complex(a1) * _complex(a2)), _real(_complex(a2) * _complex(x1)) + x2


CUT = sequence.States(_empty, _piece, _compose)

IMPLEMENTATIONS = {
    "triton_tiles": Implementation(
        functools.partial(sharded.per_device, _tiles),
        _supports_tiles,
        platform="cuda",
        slower=_tiles_are_slower,
        by_place=("u",),
    ),
    "xla_chunks": Implementation(_chunked, by_place=("u",)),
    "xla_toeplitz": Implementation(
        _convolution, _supports_convolution, preferred="cuda", slower=_convolution_is_slower
    ),
    "xla_steps": Implementation(_recurrent),
    "oracle": Implementation(_recurrent),
}
