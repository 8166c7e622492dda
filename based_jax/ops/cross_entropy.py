"""Cross-entropy of a linear layer over a vocabulary, from hidden states: the layer and its loss as one operation.

    loss = log(sum_v exp(h . table_v)) - h . table_label

Logits are as large as nothing else in a small model. The kernels make them anew wherever they are needed, on the chip.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from based_jax.ops import hopper
from based_jax.ops.dispatch import Implementation, dispatch
from based_jax.ops.hopper import MULTIPROCESSORS
from based_jax.ops.precision import EXACT, einsum, product_policy

Hidden = Float[Array, "*B D"]
Table = Float[Array, "V D"]
Labels = Int[Array, "*B"]
Losses = Float[Array, "*B"]
Correct = Bool[Array, "*B"]

LARGEST_DIM = 256
FORWARD_START, BACKWARD_START = 2, 6
"""What a block of a kernel takes beside its walk, in tiles of it; the backward's leave more results, to be added up."""


def linear_cross_entropy(
    hidden: Hidden, table: Table, labels: Labels, *, vocab_size: int | None = None, impl: str = "auto"
) -> tuple[Losses, Correct]:
    """Return losses of the logits hidden @ table.T, fp32 in nats, and whether no token has a larger one than the label.

    Where the label is negative, the loss is 0, correct is False, and there is no gradient.

    Args:
      hidden: (..., D); its dtype is what products are made in.
      table: a row for each token, (V, D), rounded to hidden's dtype; its gradient is summed in fp32.
      vocab_size: rows of the table that count, all by default.
      impl: "oracle", "xla" (which keeps the logits for the backward pass), "hopper" (Mosaic GPU kernels; bf16, D up to
        256) or "auto".

    Raises:
      UserError: `impl` is unknown or cannot run this call.
    """
    rows, table = hidden.reshape(-1, hidden.shape[-1]), table[:vocab_size]
    losses, correct = dispatch("linear_cross_entropy", IMPLEMENTATIONS, impl, rows, table, labels.reshape(-1))
    return losses.reshape(labels.shape), correct.reshape(labels.shape)


def _oracle(hidden: Hidden, table: Table, labels: Labels) -> tuple[Losses, Correct]:
    # XLA would leave out a rounding that is followed by its reverse.
    table = jax.lax.optimization_barrier(table.astype(hidden.dtype)).astype(jnp.float32)
    hidden = hidden.astype(jnp.float32)
    logits = einsum("nd,vd->nv", hidden, table, EXACT)
    chosen = jnp.take_along_axis(logits, jnp.maximum(labels, 0)[:, None], axis=1)[:, 0]
    losses = jax.nn.logsumexp(logits, axis=1) - chosen
    return jnp.where(labels < 0, 0.0, losses), (labels >= 0) & (chosen >= logits.max(axis=1))


@jax.custom_vjp
def _xla(hidden: Hidden, table: Table, labels: Labels) -> tuple[Losses, Correct]:
    return _xla_fwd(hidden, table, labels)[0]


def _xla_fwd(hidden, table, labels):
    dtype, precision = product_policy(hidden.dtype)
    logits = einsum("nd,vd->nv", hidden.astype(dtype), table.astype(hidden.dtype).astype(dtype), precision)
    top = logits.max(axis=1)
    # One reduction, that XLA passes over the logits once.
    terms = jnp.exp(logits - top[:, None]), jnp.where(_labelled(logits, labels), logits, 0.0)
    zero = jnp.float32(0)
    total, chosen = lax.reduce(terms, (zero, zero), lambda x, y: (x[0] + y[0], x[1] + y[1]), (1,))
    # The logits are kept: the backward pass follows at once, and would need as much memory to make them again.
    return _results(top, total, chosen, labels), (hidden, table, labels, logits, top + jnp.log(total))


def _xla_bwd(saved, cotangents):
    hidden, table, labels, logits, logarithm = saved
    dtype, precision = product_policy(hidden.dtype)
    factor = jnp.where(labels < 0, 0.0, cotangents[0])
    p = jnp.exp(logits - logarithm[:, None])
    dlogits = jnp.where(_labelled(logits, labels), p - 1.0, p) * factor[:, None]
    dlogits = dlogits.astype(hidden.dtype).astype(dtype)
    dhidden = einsum("nv,vd->nd", dlogits, table.astype(hidden.dtype).astype(dtype), precision)
    dtable = einsum("nv,nd->vd", dlogits, hidden.astype(dtype), precision)
    return dhidden.astype(hidden.dtype), dtable.astype(table.dtype), None


_xla.defvjp(_xla_fwd, _xla_bwd)


def _labelled(logits: Float[Array, "N V"], labels: Int[Array, "N"]) -> Bool[Array, "N V"]:
    """Return where the labels are: to compare is cheaper than to gather, and needs no scatter backwards."""
    return lax.broadcasted_iota(jnp.int32, logits.shape, 1) == labels[:, None]


def _results(top: Array, total: Array, chosen: Array, labels: Labels) -> tuple[Losses, Correct]:
    """Return losses and correct from the largest logits, sums of exponentials relative to them, and labels' logits."""
    asked = labels >= 0
    return jnp.where(asked, top + jnp.log(total) - chosen, 0.0), asked & (chosen >= top)


def _supports(hidden: Hidden, table: Table, labels: Labels) -> str | None:
    """Return why the kernels cannot run this call, or None."""
    if hidden.dtype != jnp.bfloat16:
        return f"hidden must be bfloat16, and is {hidden.dtype}"
    if not 0 < hidden.shape[1] <= LARGEST_DIM:
        return f"hidden must have 1 to {LARGEST_DIM} channels, and has {hidden.shape[1]}"
    if 0 in (labels.size, table.size):
        return "there must be a label and a token"
    if max(hidden.size, table.size) >= hopper.OFFSETS:
        return f"there must be fewer than {hopper.OFFSETS} elements, and are {max(hidden.size, table.size)}"
    return hopper.refusal()


def _hopper(hidden: Hidden, table: Table, labels: Labels) -> tuple[Losses, Correct]:
    def shard(hidden, table, labels):
        return _fused(*hopper.vary_alike(hidden, table, labels))

    rows = ("batch",)
    return hopper.per_shard(shard, (hidden, table, labels), (rows, (), rows), (rows, rows))


@jax.custom_vjp
def _fused(hidden, table, labels):
    return _fused_fwd(hidden, table, labels)[0]


def _fused_fwd(hidden, table, labels):
    # Pallas' GPU modules take half a second to import and are needed only here.
    from pallas_kernels.hopper import cross_entropy as kernels

    h, w, vocab = _pad(hidden), _pad(table.astype(hidden.dtype)), table.shape[0]
    tiling = kernels.forward_tiling(h.shape[1])
    pieces = number_of_pieces(hidden.shape[0], vocab, tiling, FORWARD_START)
    [statistics] = hopper.call(kernels.forward, h, w, _fill(labels, h, tiling.rows, -1), vocab=vocab, pieces=pieces)
    statistics = statistics[:, :, : hidden.shape[0]]
    tops, totals, chosen = (statistics[:, i] for i in (kernels.TOP, kernels.TOTAL, kernels.CHOSEN))
    top = tops.max(axis=0)
    total = (totals * jnp.exp(tops - top[None])).sum(axis=0)
    return _results(top, total, chosen.sum(axis=0), labels), (hidden, table, labels, top + jnp.log(total))


def _fused_bwd(saved, cotangents):
    from pallas_kernels.hopper import cross_entropy as kernels

    hidden, table, labels, logarithm = saved
    (count, dim), vocab = hidden.shape, table.shape[0]
    h, w = _pad(hidden), _pad(table.astype(hidden.dtype))
    tiling = kernels.backward_tiling(h.shape[1])
    factor = jnp.where(labels < 0, 0.0, cotangents[0])
    logarithm = logarithm * kernels.LOG2E

    pieces = number_of_pieces(count, vocab, tiling, BACKWARD_START)
    whole = _fill(labels, h, tiling.rows, -1), _fill(logarithm, h, tiling.rows, 0)
    [sums] = hopper.call(kernels.hidden_gradient, h, w, *whole, vocab=vocab, pieces=pieces)
    dhidden = (sums.sum(axis=0)[:count, :dim] * factor[:, None]).astype(hidden.dtype)

    pieces = number_of_pieces(vocab, count, tiling, BACKWARD_START)
    tokens = jnp.stack([logarithm, factor, labels.astype(jnp.float32)])
    tokens = jnp.pad(tokens, ((0, 0), (0, -count % tiling.columns)))
    [sums] = hopper.call(kernels.table_gradient, w, h, tokens, pieces=pieces)
    return dhidden, sums.sum(axis=0)[:vocab, :dim].astype(table.dtype), None


_fused.defvjp(_fused_fwd, _fused_bwd)


def number_of_pieces(rows: int, length: int, tiling, start: int) -> int:
    """Return into how many pieces to cut the walk over `length`, where blocks take some of the rows each.

    A multiprocessor holds one block, which takes a time for each tile of its piece, and that of `start` tiles beside.
    """
    blocks, tiles = -(-rows // tiling.rows), -(-length // tiling.columns)

    def duration(pieces: int) -> int:
        return -(-blocks * pieces // MULTIPROCESSORS) * (-(-tiles // pieces) + start)

    return min(range(1, min(tiles, MULTIPROCESSORS) + 1), key=duration)


def _pad(x: Float[Array, "N D"]) -> Float[Array, "_ _"]:
    """Return x with zeros up to what the kernels take."""
    from pallas_kernels.hopper import cross_entropy as kernels

    count, dim = x.shape
    rows = max(kernels.LEAST, -(-count // hopper.ROWS) * hopper.ROWS)
    return jnp.pad(x, ((0, rows - count), (0, -dim % hopper.CHUNK)))


def _fill(x: Array, hidden: Float[Array, "_ _"], rows: int, value: int) -> Array:
    """Return one value per row of hidden, up to whole blocks."""
    return jnp.pad(x, (0, -(-hidden.shape[0] // rows) * rows - x.shape[0]), constant_values=value)


IMPLEMENTATIONS = {
    "hopper": Implementation(_hopper, _supports, platform="cuda"),
    "xla": Implementation(_xla),
    "oracle": Implementation(_oracle),
}
