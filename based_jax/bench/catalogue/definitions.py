"""What the definitions share that operations are checked against: all pairs of tokens, in fp64, and their documents.

A definition is written in its paper's notation, beside the rest that the catalogue says of the operation. It takes a
dictionary of arrays and the ids of the documents (0 is padding), and returns a dictionary. Nothing is shared with the
operations themselves. Call definitions, and compile them, under `jax.enable_x64`.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

SCORE_BYTES = 1 << 29
"""Of the fp64 scores of a block of queries."""


def with_ones(v, concatenate: Callable = jnp.concatenate):
    """Return [v, 1]."""
    return concatenate([v, 0 * v[..., :1] + 1], axis=-1)


def first_document(ids):
    """Return the id of each row's first document, 0 where there is none."""
    place = jnp.argmax(ids != 0, axis=1)
    return jnp.take_along_axis(ids, place[:, None], axis=1)[:, 0]


def filled(fill, places: int):
    """Return how many of so many places each row has filled (B,): all or none for about a third of normal `fill`."""
    return jnp.round(jnp.clip(fill.astype(jnp.float32) + 0.5, 0, 1) * places).astype(jnp.int32)


def sum_over_pairs(q, k, v, ids, weights: Callable, window: int | None = None):
    """Return sum_j w_ij v_j (B, T, H, .) with w = weights(q.k / sqrt(K), visible), blocks of queries at a time."""
    batch, time, heads, width = q.shape
    block = max(1, min(time, SCORE_BYTES // (8 * batch * heads * time)))
    blocks, keys = -(-time // block), jnp.arange(time)

    def one(inputs):
        q, own, places = inputs
        near = keys[None, :] <= places[:, None]
        if window is not None:
            near &= keys[None, :] > places[:, None] - window
        same = (own[:, :, None] == ids[:, None, :]) & (ids != 0)[:, None, :]
        s = jnp.einsum("bthk,bshk->bhts", q, k) / math.sqrt(width)
        return jnp.einsum("bhts,bshv->bthv", weights(s, (near[None] & same)[:, None]), v)

    def cut(x):
        x = jnp.pad(x, [(0, 0), (0, blocks * block - time)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, blocks, block, *x.shape[2:]), 1, 0)

    # Under jax.checkpoint the backward pass keeps no scores but those of one block.
    sums = jax.lax.map(jax.checkpoint(one), (cut(q), cut(ids), jnp.arange(blocks * block).reshape(blocks, block)))
    return jnp.moveaxis(sums, 0, 1).reshape(batch, blocks * block, heads, -1)[:, :time]


def scan_tokens(token: Callable, state, inputs: tuple, ids):
    """Return (B, T, ...) outputs and the last document's state of `token(state, *inputs) -> (state, output)`.

    A document begins with zeros but the first one, which begins with `state`; padding changes nothing and outputs 0.
    """

    def only(mask, x):
        return jnp.where(mask.reshape(-1, *(1,) * (x.ndim - 1)), x, 0)

    def step(carry, inputs):
        (state, owner), (own, *inputs) = carry, inputs
        after, output = token(only(own == owner, state), *inputs)
        present = own != 0
        state = jnp.where(present.reshape(-1, *(1,) * (state.ndim - 1)), after, state)
        return (state, jnp.where(present, own, owner)), only(present, output)

    over_time = tuple(jnp.moveaxis(x, 1, 0) for x in (ids, *inputs))
    (state, _), outputs = jax.lax.scan(step, (state, first_document(ids)), over_time)
    return jnp.moveaxis(outputs, 0, 1), state
