"""Windows whose queries also see the first tokens of their document, its sinks (arXiv 2309.17453).

A query reads the keys of its window and, apart, the sinks that have left it, o_i with the logarithm L_i of their
weights' sum; both are joined (`softmax_chunks.joined`). With L of all keys, the backward pass of a window's kernel that
takes L and do . o gives the gradients of its own keys as they are, and those of the sinks are made beside it:

    p_tn = exp(s_tn - L_t)        ds_tn = p_tn (do_t . v_n - do_t . o_t)
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from based_jax.dims import BT, BTHK, BTHV
from based_jax.ops import sharded
from based_jax.ops.calls import AttentionCall
from based_jax.ops.softmax_chunks import LOWEST, Read, joined, product

Keys = Float[Array, "B ..."]
"""Of the sinks of each row where it is one document (B, N, H, .), else of each query (B, T, N, H, .)."""
ROWS, QUERIES = "BNH", "BTNH"
"""The axes of both in products."""


class WindowKernel(NamedTuple):
    """Attention to a window that hands out its weights' sums; the call's ids are numbers (`ops/segments.py`).

    Attributes:
      forward: of a call what queries read of their windows, without sinks.
      backward: of a call, o, L and do the gradients of q, k and v through the windows' keys, where o and L are of all
        keys that are seen.
    """

    forward: Callable[[AttentionCall], Read]
    backward: Callable[[AttentionCall, BTHV, Array, BTHV], tuple[Array, ...]]


class Sinks(NamedTuple):
    """The sinks of a call.

    Attributes:
      starts: where each token's document begins (B, T); None where each row is one document.
      visible: which of them each query sees, those before its window.
      number: how many they are.
    """

    starts: BT | None
    visible: Bool[Array, "#B T N"]
    number: int

    @classmethod
    def of(cls, call: AttentionCall) -> "Sinks":
        """Return those of a call whose documents have no padding within."""
        T, ids = call.q.shape[1], call.segment_ids
        number, query = min(call.sinks, T), jnp.arange(T)[None]
        starts = None if ids is None else document_starts(ids)
        place = query if starts is None else query - starts
        visible = jnp.arange(number)[None, None] <= (place - call.window)[..., None]
        return cls(starts, visible if ids is None else visible & (ids != 0)[..., None], number)

    @property
    def axes(self) -> str:
        """Those of the sinks' keys."""
        return ROWS if self.starts is None else QUERIES

    def taken(self, x: Float[Array, "B T H K"]) -> Keys:
        """Return the sinks' keys, or values."""
        if self.starts is None:
            return x[:, : self.number]
        index = jnp.clip(self.starts[..., None] + jnp.arange(self.number)[None, None], 0, x.shape[1] - 1)
        summed = x.astype(jnp.float32)  # the dtype in which a sink's gradients of all queries are added
        return jax.vmap(lambda row, index: row[index])(summed, index).astype(x.dtype)

    def scores(self, call: AttentionCall, k: Keys) -> Float[Array, "B T H N"]:
        """Return scores, `LOWEST` of what is not seen."""
        s = product(f"BTHK,{self.axes}K->BTHN", call.q, k) / call.root
        return jnp.where(self.visible[:, :, None], s, LOWEST)


def document_starts(numbers: BT) -> Int[Array, "B T"]:
    """Return where the document of each token begins; that of padding means nothing."""
    before = jnp.pad(numbers[:, :-1], ((0, 0), (1, 0)))
    begins = (numbers != 0) & (numbers != before)
    return jax.lax.cummax(jnp.where(begins, jnp.arange(numbers.shape[1])[None], 0), axis=1)


def read(call: AttentionCall) -> Read:
    """Return what queries read of the sinks before their windows, which JAX can differentiate."""
    sinks = Sinks.of(call)
    return _read(call, sinks, sinks.taken(call.k), sinks.taken(call.v))


def _read(call: AttentionCall, sinks: Sinks, k: Keys, v: Keys) -> Read:
    s, seen = sinks.scores(call, k), sinks.visible.any(axis=2)[..., None]
    logarithm = jax.nn.logsumexp(s, axis=-1)
    p = jnp.where(s > LOWEST, jnp.exp(s - logarithm[..., None]), 0.0)
    o = product(f"BTHN,{sinks.axes}V->BTHV", p, v)
    return o, jnp.swapaxes(jnp.where(seen, logarithm, LOWEST), 1, 2)


def attention(kernel: WindowKernel, call: AttentionCall) -> BTHV:
    """Return attention to windows, by a kernel, and to the sinks before them."""
    arrays = sharded.vary_alike(call.q, call.k, call.v, call.segment_ids)
    return _attention(kernel, call.window, call.sinks, *arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attention(kernel: WindowKernel, window: int, sinks: int, q: BTHK, k: BTHK, v: BTHV, numbers: BT | None) -> BTHV:
    return _forward(kernel, window, sinks, q, k, v, numbers)[0]


def _forward(kernel, window, sinks, q, k, v, numbers):
    call = AttentionCall(q, k, v, window, numbers, sinks=sinks)
    o, logarithm = joined(kernel.forward(call), read(call))
    o = o.astype(v.dtype)
    return o, (q, k, v, numbers, o, logarithm)


def _backward(kernel, window, count, saved, do):
    q, k, v, numbers, o, logarithm = saved
    call = AttentionCall(q, k, v, window, numbers, sinks=count)
    near, sinks = kernel.backward(call, o, logarithm, do), Sinks.of(call)
    (keys, into_k), (values, into_v) = (jax.vjp(sinks.taken, x) for x in (k, v))
    s, axes = sinks.scores(call, keys), sinks.axes
    p = jnp.where(s > LOWEST, jnp.exp(s - jnp.swapaxes(logarithm, 1, 2)[..., None]), 0.0)
    own = jnp.sum(do.astype(jnp.float32) * o.astype(jnp.float32), axis=-1, keepdims=True)
    ds = p * (product(f"BTHV,{axes}V->BTHN", do, values) - own) / call.root
    far = (
        product(f"BTHN,{axes}K->BTHK", ds, keys),
        *into_k(product(f"BTHN,BTHK->{axes}K", ds, q).astype(k.dtype)),
        *into_v(product(f"BTHN,BTHV->{axes}V", p, do).astype(v.dtype)),
    )
    return *((a.astype(jnp.float32) + b).astype(x.dtype) for a, b, x in zip(near, far, (q, k, v), strict=True)), None


_attention.defvjp(_forward, _backward)
