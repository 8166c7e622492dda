"""Cross-entropy of a linear layer in Hopper kernels: which calls they take, gradients, and how walks are cut.

Logits are made anew wherever they are needed, on the chip. Kernels: `pallas_kernels/hopper/cross_entropy.py`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from based_jax.labels import NO_LABEL
from based_jax.ops import sharded
from based_jax.ops.calls import Correct, CrossEntropyCall, Losses
from based_jax.ops.hopper import limits

MAX_CHANNELS = 256
FORWARD_START_TILES, BACKWARD_START_TILES = 2, 6
"""What a block of a kernel takes beside its walk, in tiles of it; the backward's leave more results, to be added up."""


def supports(call: CrossEntropyCall) -> str | None:
    """Return why the kernels cannot run this call, or None."""
    hidden, table = call.hidden, call.table
    if hidden.dtype != jnp.bfloat16:
        return f"hidden must be bfloat16, and is {hidden.dtype}"
    if not 0 < hidden.shape[1] <= MAX_CHANNELS:
        return f"hidden must have 1 to {MAX_CHANNELS} channels, and has {hidden.shape[1]}"
    if 0 in (call.labels.size, table.size):
        return "there must be a label and a token"
    if max(hidden.size, table.size) >= limits.MAX_ELEMENTS:
        return f"there must be fewer than {limits.MAX_ELEMENTS} elements, and are {max(hidden.size, table.size)}"
    return limits.refusal()


def compute(call: CrossEntropyCall) -> tuple[Losses, Correct]:
    """Return losses, and whether no token has a larger logit than the label, each device for its rows."""

    def shard(hidden, table, labels):
        return _fused(*sharded.vary_alike(hidden, table, labels))

    rows = ("tokens",)
    return sharded.per_shard(shard, call, (rows, (), rows), (rows, rows))


@jax.custom_vjp
def _fused(hidden, table, labels):
    return _fused_fwd(hidden, table, labels)[0]


def _fused_fwd(hidden, table, labels):
    # Pallas' GPU modules take half a second to import and are needed only here.
    from pallas_kernels.hopper import cross_entropy as kernels

    h, w, vocab = _pad(hidden), _pad(table.astype(hidden.dtype)), table.shape[0]
    tiling = kernels.forward_tiling(h.shape[1])
    pieces = number_of_pieces(hidden.shape[0], vocab, tiling, FORWARD_START_TILES)
    whole = _fill(labels, h, tiling.rows, NO_LABEL)
    [statistics] = sharded.launch(kernels.forward, h, w, whole, vocab=vocab, pieces=pieces)
    statistics = statistics[:, :, : hidden.shape[0]]
    tops, totals, chosen = (statistics[:, i] for i in (kernels.TOP, kernels.TOTAL, kernels.CHOSEN))
    top = tops.max(axis=0)
    total = (totals * jnp.exp(tops - top[None])).sum(axis=0)
    logarithm, chosen = top + jnp.log(total), chosen.sum(axis=0)
    return (logarithm - chosen, chosen >= top), (hidden, table, labels, logarithm)


def _fused_bwd(saved, cotangents):
    from pallas_kernels.hopper import cross_entropy as kernels

    hidden, table, labels, logarithm = saved
    (count, dim), vocab = hidden.shape, table.shape[0]
    h, w = _pad(hidden), _pad(table.astype(hidden.dtype))
    tiling = kernels.backward_tiling(h.shape[1])
    factor, logarithm = cotangents[0], logarithm * kernels.LOG2E

    pieces = number_of_pieces(count, vocab, tiling, BACKWARD_START_TILES)
    whole = _fill(labels, h, tiling.rows, NO_LABEL), _fill(logarithm, h, tiling.rows, 0)
    [sums] = sharded.launch(kernels.hidden_gradient, h, w, *whole, vocab=vocab, pieces=pieces)
    dhidden = (sums.sum(axis=0)[:count, :dim] * factor[:, None]).astype(hidden.dtype)

    pieces = number_of_pieces(vocab, count, tiling, BACKWARD_START_TILES)
    tokens = jnp.stack([logarithm, factor, labels.astype(jnp.float32)])
    tokens = jnp.pad(tokens, ((0, 0), (0, -count % tiling.columns)))
    [sums] = sharded.launch(kernels.table_gradient, w, h, tokens, pieces=pieces)
    return dhidden, sums.sum(axis=0)[:vocab, :dim].astype(table.dtype), None


_fused.defvjp(_fused_fwd, _fused_bwd)


def number_of_pieces(rows: int, length: int, tiling, start: int) -> int:
    """Return into how many pieces to cut the walk over `length`, where blocks take some of the rows each.

    A multiprocessor holds one block, which takes a time for each tile of its piece, and that of `start` tiles beside.
    """
    blocks, tiles, places = -(-rows // tiling.rows), -(-length // tiling.columns), limits.multiprocessors()

    def duration(pieces: int) -> int:
        return -(-blocks * pieces // places) * (-(-tiles // pieces) + start)

    return min(range(1, min(tiles, places) + 1), key=duration)


def _pad(x: Float[Array, "N D"]) -> Float[Array, "_ _"]:
    """Return x with zeros up to what the kernels take."""
    from pallas_kernels.hopper import cross_entropy as kernels

    count, dim = x.shape
    rows = max(kernels.MIN_ROWS, -(-count // limits.COPY_ROWS) * limits.COPY_ROWS)
    return jnp.pad(x, ((0, rows - count), (0, -dim % limits.CHUNK_TOKENS)))


def _fill(x: Array, hidden: Float[Array, "_ _"], rows: int, value: int) -> Array:
    """Return one value per row of hidden, up to whole blocks."""
    return jnp.pad(x, (0, -(-hidden.shape[0] // rows) * rows - x.shape[0]), constant_values=value)
