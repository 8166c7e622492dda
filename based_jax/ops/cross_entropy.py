"""Cross-entropy of a linear layer over a vocabulary, from hidden states: the layer and its loss as one operation.

    loss = log(sum_v exp(h . table_v)) - h . table_label

Logits are as large as nothing else in a small model, and in a large one with a large vocabulary: but where they are few
they are made by tiles, anew wherever they are needed, and by the kernels on the chip.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from based_jax import devices
from based_jax.errors import UserError
from based_jax.labels import is_labelled
from based_jax.ops import cross_entropy_chunks, sharded
from based_jax.ops.arguments import checked
from based_jax.ops.calls import Correct, CrossEntropyCall, Labels, Losses, Rows, Table
from based_jax.ops.dispatch import Implementation, dispatch, target_device_kind
from based_jax.ops.hopper import cross_entropy as hopper_cross_entropy
from based_jax.ops.precision import EXACT, einsum, product_policy


@checked
def linear_cross_entropy(
    hidden: Rows, table: Table, labels: Labels, *, vocab_size: int | None = None, impl: str = "auto"
) -> tuple[Losses, Correct]:
    """Return losses of the logits hidden @ table.T, fp32 in nats, and whether no token has a larger one than the label.

    Where nothing is asked for (`labels.is_labelled`), the loss is 0, correct is False, and there is no gradient; of a
    label that the table does not have the loss is NaN.

    Args:
      hidden: (..., D); its dtype is what products are made in.
      table: a row for each token, (V, D), rounded to hidden's dtype; its gradient is summed in fp32.
      vocab_size: rows of the table that count, all by default.
      impl: "oracle", "xla_logits" (which keeps the logits for the backward pass), "xla_chunks" (which makes them
        by tiles, and anew backward), "hopper_tiles" (the same in Mosaic GPU kernels; bf16, D up to 256) or "auto".

    Raises:
      UserError: `impl` is unknown or cannot run this call.
    """
    if vocab_size is not None and not 1 <= vocab_size <= table.shape[0]:
        raise UserError(f"linear_cross_entropy: vocab_size is {vocab_size}; it is 1 to the table's {table.shape[0]}.")
    labels = labels.astype(jnp.promote_types(labels.dtype, jnp.int32))  # JAX wraps a number that int8 lacks
    rows = [sharded.flattened(x, labels.ndim) for x in (hidden, labels)]
    losses, correct = (
        sharded.unflattened(x, labels.shape) for x in _of_rows(rows[0], table[:vocab_size], rows[1], impl)
    )
    losses = jnp.where(labels < (vocab_size or table.shape[0]), losses, jnp.nan)
    asked = is_labelled(labels)
    return jnp.where(asked, losses, 0.0), asked & correct


def _of_rows(
    hidden: Float[Array, "N D"], table: Table, labels: Int[Array, "N"], impl: str
) -> tuple[Float[Array, "N"], Bool[Array, "N"]]:
    return dispatch("linear_cross_entropy", IMPLEMENTATIONS, impl, CrossEntropyCall(hidden, table, labels))


# What an implementation returns for a label that asks for nothing counts nowhere, and gets no gradient.


def _oracle(call: CrossEntropyCall) -> tuple[Losses, Correct]:
    # XLA would leave out a rounding that is followed by its reverse.
    table = jax.lax.optimization_barrier(call.table.astype(call.hidden.dtype)).astype(jnp.float32)
    logits = einsum("nd,vd->nv", call.hidden.astype(jnp.float32), table, EXACT)
    chosen = jnp.take_along_axis(logits, jnp.maximum(call.labels, 0)[:, None], axis=1)[:, 0]
    return jax.nn.logsumexp(logits, axis=1) - chosen, chosen >= logits.max(axis=1)


def _xla(call: CrossEntropyCall) -> tuple[Losses, Correct]:
    return _keeping_logits(call.hidden, call.table, call.labels)


@jax.custom_vjp
def _keeping_logits(hidden: Rows, table: Table, labels: Labels) -> tuple[Losses, Correct]:
    return _keeping_logits_fwd(hidden, table, labels)[0]


def _keeping_logits_fwd(hidden, table, labels):
    dtype, precision = product_policy(hidden.dtype)
    logits = einsum("nd,vd->nv", hidden.astype(dtype), table.astype(hidden.dtype).astype(dtype), precision)
    top = logits.max(axis=1)
    # One reduction, that XLA passes over the logits once.
    terms = jnp.exp(logits - top[:, None]), jnp.where(_labelled(logits, labels), logits, 0.0)
    zero = jnp.float32(0)
    total, chosen = lax.reduce(terms, (zero, zero), lambda x, y: (x[0] + y[0], x[1] + y[1]), (1,))
    logarithm = top + jnp.log(total)
    # The logits are kept: the backward pass follows at once, and would need as much memory to make them again.
    return (logarithm - chosen, chosen >= top), (hidden, table, labels, logits, logarithm)


def _keeping_logits_bwd(saved, cotangents):
    hidden, table, labels, logits, logarithm = saved
    dtype, precision = product_policy(hidden.dtype)
    p = jnp.exp(logits - logarithm[:, None])
    dlogits = jnp.where(_labelled(logits, labels), p - 1.0, p) * cotangents[0][:, None]
    dlogits = dlogits.astype(hidden.dtype).astype(dtype)
    dhidden = einsum("nv,vd->nd", dlogits, table.astype(hidden.dtype).astype(dtype), precision)
    dtable = einsum("nv,nd->vd", dlogits, hidden.astype(dtype), precision)
    return dhidden.astype(hidden.dtype), dtable.astype(table.dtype), None


_keeping_logits.defvjp(_keeping_logits_fwd, _keeping_logits_bwd)


def _labelled(logits: Float[Array, "N V"], labels: Int[Array, "N"]) -> Bool[Array, "N V"]:
    """Return where the labels are: to compare is cheaper than to gather, and needs no scatter backwards."""
    return lax.broadcasted_iota(jnp.int32, logits.shape, 1) == labels[:, None]


def _logits_are_large(call: CrossEntropyCall) -> str | None:
    if sharded.mesh_refusal():
        return None
    most, size = devices.logits_bytes(target_device_kind()), cross_entropy_chunks.logits_bytes(call)
    return None if size <= most else f"its logits would take {size >> 20} MiB, more than {int(most) >> 20}"


IMPLEMENTATIONS = {
    "hopper_tiles": Implementation(hopper_cross_entropy.compute, hopper_cross_entropy.supports, platform="cuda"),
    "xla_logits": Implementation(_xla, slower=_logits_are_large),
    "xla_chunks": Implementation(cross_entropy_chunks.compute, cross_entropy_chunks.supports),
    "oracle": Implementation(_oracle),
}
