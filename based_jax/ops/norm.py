"""A residual addition with the norm that follows it: one pass over the residual stream instead of two or more.

    r' = r + y          x = r' / sqrt(mean(r'^2) + eps) * scale                              RMS norm
                        x = c / sqrt(mean(c^2) + eps) * scale + bias,  c = r' - mean(r')     layer norm

The stream r and its sum r' are fp32, and so is the arithmetic; y and x are what layers compute in.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from based_jax.ops import hopper
from based_jax.ops.dispatch import Implementation, dispatch

Rows = Float[Array, "*B D"]
Channels = Float[Array, "D"]

LANES, WIDEST = 128, 4096
"""Channels that the kernels take: a multiple, and at most how many."""
NARROW = range(64, 513, 32)
"""Those that they take as well where tokens come in `ROWS`: each warp has a row then."""
ROWS = 4
FEWEST_TOKENS = 1024
"""With fewer, as in decoding, most of the chip would idle, and XLA's fusions are as good."""


def residual_rms_norm(
    r: Rows, y: Rows | None, scale: Channels, *, eps: float = 1e-5, dtype=None, impl: str = "auto"
) -> tuple[Rows, Rows]:
    """Return r + y and its RMS norm over the channels.

    Args:
      r: the residual stream (..., D), fp32.
      y: what a layer adds to it, if anything.
      scale: (D,).
      dtype: of the norm; y's, or r's without y, by default.
      impl: "xla", "hopper" (Mosaic GPU kernels; bf16 y and norm, 1,024 tokens, D a multiple of 128 up to 4096, or for
        a multiple of 4 tokens of 32 from 64 to 512) or "auto".

    Raises:
      UserError: `impl` is unknown or cannot run this call.
    """
    return dispatch("residual_rms_norm", IMPLEMENTATIONS, impl, r, y, scale, None, eps, _dtype(r, y, dtype))


def residual_layer_norm(
    r: Rows, y: Rows | None, scale: Channels, bias: Channels, *, eps: float = 1e-5, dtype=None, impl: str = "auto"
) -> tuple[Rows, Rows]:
    """Return r + y and its layer norm over the channels; arguments and errors are those of `residual_rms_norm`."""
    return dispatch("residual_layer_norm", IMPLEMENTATIONS, impl, r, y, scale, bias, eps, _dtype(r, y, dtype))


def _dtype(r: Rows, y: Rows | None, dtype) -> jnp.dtype:
    return jnp.dtype(dtype or (r if y is None else y).dtype)


def _xla(r: Rows, y: Rows | None, scale: Channels, bias: Channels | None, eps: float, dtype) -> tuple[Rows, Rows]:
    total = r if y is None else r + y
    wide, ones = total.astype(jnp.float32), (1,) * (r.ndim - 1)
    if bias is not None:
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    x = wide * (inverse * scale.reshape(*ones, -1))
    return total, (x if bias is None else x + bias.reshape(*ones, -1)).astype(dtype)


def _supports(r: Rows, y: Rows | None, scale: Channels, bias: Channels | None, eps: float, dtype) -> str | None:
    """Return why the kernels cannot run this call, or None."""
    channels, tokens = scale.size, r.size // max(scale.size, 1)
    given = {"r": r.dtype} | ({} if y is None else {"y": y.dtype}) | {"the norm": dtype}
    for name, got in given.items():
        if got != (wanted := jnp.dtype("float32" if name == "r" else "bfloat16")):
            return f"{name} must be {wanted}, and is {got}"
    # A mesh may split the batch, whatever its size.
    together = tokens // max(r.shape[0], 1) if jax.sharding.get_abstract_mesh().size > 1 else tokens
    narrow = channels in NARROW and together % ROWS == 0
    if not narrow and (channels % LANES or not LANES <= channels <= WIDEST):
        least, most = NARROW[0], NARROW[-1]
        return (
            f"the channels must be a multiple of {LANES} up to {WIDEST}, or of {NARROW.step} from {least} to {most} for"
            f" a multiple of {ROWS} tokens, and are {channels} for {together} tokens"
        )
    if tokens < FEWEST_TOKENS:
        return f"there must be {FEWEST_TOKENS} tokens, and are {tokens}"
    if r.size >= hopper.OFFSETS:
        return f"there must be fewer than {hopper.OFFSETS} elements, and are {r.size}"
    return hopper.refusal()


def _hopper(r: Rows, y: Rows | None, scale: Channels, bias: Channels | None, eps: float, dtype) -> tuple[Rows, Rows]:
    del dtype  # bf16, as `_supports` demands

    def shard(r, y, *weights):
        rows = [None if x is None else x.reshape(-1, scale.size) for x in (r, y)]
        wide = [None if x is None else x.astype(jnp.float32) for x in weights]
        total, x = _fused(*hopper.vary_alike(*rows, *wide), eps)
        return total.reshape(r.shape), x.reshape(r.shape)

    stream = ("batch",)
    return hopper.per_shard(shard, (r, y, scale, bias), (stream, stream, (), ()), (stream, stream))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _fused(r, y, scale, bias, eps):
    return _fused_fwd(r, y, scale, bias, eps)[0]


def _fused_fwd(r, y, scale, bias, eps):
    # Pallas' GPU modules take half a second to import and are needed only here.
    from pallas_kernels.hopper import norm as kernels

    *summed, x = hopper.call(kernels.forward, r, y, scale, bias, eps=eps, multiprocessors=hopper.MULTIPROCESSORS)
    [total] = summed or [r]
    return (total, x), (total, y is not None, scale, bias is not None)


def _fused_bwd(eps, saved, cotangents):
    from pallas_kernels.hopper import norm as kernels

    total, adds, scale, centered = saved
    dtotal, dx = cotangents
    options = {"eps": eps, "adds": adds, "centered": centered, "multiprocessors": hopper.MULTIPROCESSORS}
    found = iter(hopper.call(kernels.backward, total, scale, dx, dtotal, **options))
    dr, dy = next(found), next(found) if adds else None
    return dr, dy, next(found).sum(axis=0), next(found).sum(axis=0) if centered else None


_fused.defvjp(_fused_fwd, _fused_bwd)

IMPLEMENTATIONS = {
    "hopper": Implementation(_hopper, _supports, platform="cuda"),
    "xla": Implementation(_xla),
}
