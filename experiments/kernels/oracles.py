"""What the operations are, in fp64 and in the papers' notation: what the kernels' results are compared with.

Each takes a dictionary of arrays and the ids of the documents (0 is padding), and returns a dictionary. Pairs of tokens
are scored all, a block of queries at a time, so that a long sequence fits into the memory of a GPU. Nothing is shared
with the operations themselves. Call them, and compile them, under `jax.enable_x64`.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

BLOCK_BYTES = 1 << 29
"""Of the fp64 scores of a block of queries."""
SCALE = 0.125
"""Of hidden states: logits of normal ones are then a few units large. A power of two, which no dtype rounds."""


def features(x, concatenate: Callable = jnp.concatenate):
    """Return phi(x) of Taylor attention: 1, x / K^(1/4), and the products x_m x_n / sqrt(K), m >= n, once each."""
    width = x.shape[-1]
    rows, columns = np.tril_indices(width)
    weights = np.where(rows == columns, math.sqrt(0.5), 1.0) / math.sqrt(width)
    products = x[..., rows] * x[..., columns] * weights.reshape((1,) * (x.ndim - 1) + (-1,))
    return concatenate([0 * x[..., :1] + 1, x / width**0.25, products], axis=-1)


def with_ones(v, concatenate: Callable = jnp.concatenate):
    """Return [v, 1]."""
    return concatenate([v, 0 * v[..., :1] + 1], axis=-1)


def taylor_attention(arrays: dict, ids: jax.Array) -> dict:
    """Return o_i = sum_j p_ij v_j / sum_j p_ij with p = 1 + s + s^2/2, and the state of the last document.

    `arrays` are q, k (B, T, H, K), v (B, T, H, V) and the first document's state (B, H, E, V+1) before the first token.
    """
    q, k, v, before = (arrays[name] for name in ("q", "k", "v", "state"))
    v1 = with_ones(v)
    first, last, present = _first(ids), _first(ids[:, ::-1]), ids != 0

    def weights(s, visible):
        return jnp.where(visible, 1 + s + s * s / 2, 0)

    sums = _over_queries(q, k, v1, ids, weights)
    read = jnp.einsum("bthe,bhev->bthv", features(q), before)
    sums = sums + jnp.where(((ids == first[:, None]) & present)[..., None, None], read, 0)
    o = sums[..., :-1] / jnp.where(present[..., None, None], sums[..., -1:], 1)
    owned = ((ids == last[:, None]) & present)[..., None, None]
    kept = jnp.where((first == last)[:, None, None, None], before, 0)
    return {"o": o, "state": kept + jnp.einsum("bthe,bthv->bhev", features(k) * owned, v1)}


def window_attention(arrays: dict, ids: jax.Array, *, window: int) -> dict:
    """Return softmax attention to the last `window` keys of the same document, the query's own included."""
    q, k, v = (arrays[name] for name in ("q", "k", "v"))

    def weights(s, visible):
        s = jnp.where(visible, s, -jnp.inf)
        top = jax.lax.stop_gradient(jnp.maximum(s.max(axis=-1, keepdims=True), -1e300))
        return jnp.exp(s - top)

    sums = _over_queries(q, k, with_ones(v), ids, weights, window)
    return {"o": sums[..., :-1] / jnp.where((ids != 0)[..., None, None], sums[..., -1:], 1)}


def gated_short_conv(arrays: dict, ids: jax.Array) -> dict:
    """Return silu(sum_w kernel_w u_{t-(W-1-w)}) g with [u, g] = x + bias; `state` is the W inputs u before."""
    u, gate = jnp.split(arrays["x"] + arrays["bias"][None, None], 2, axis=-1)
    c = _convolved(u, arrays["kernel"], arrays["state"], ids)
    return {"y": jnp.where((ids != 0)[..., None], c * jax.nn.sigmoid(c) * gate, 0)}


def short_conv(arrays: dict, ids: jax.Array) -> dict:
    """Return silu(sum_w kernel_w x_{t-(W-1-w)} + bias); `state` is the W inputs before."""
    c = _convolved(arrays["x"], arrays["kernel"], arrays["state"], ids) + arrays["bias"][None, None]
    return {"y": jnp.where((ids != 0)[..., None], c * jax.nn.sigmoid(c), 0)}


def _convolved(u: jax.Array, kernel: jax.Array, state: jax.Array, ids: jax.Array) -> jax.Array:
    taps = len(kernel)
    inputs = jnp.concatenate([state, u], axis=1)
    owners = jnp.concatenate([jnp.repeat(_first(ids)[:, None], taps, axis=1), ids], axis=1)
    c = jnp.zeros_like(u)
    for tap in range(taps):
        seen = slice(tap + 1, tap + 1 + u.shape[1])
        same = (owners[:, seen] == ids) & (ids != 0)
        c = c + jnp.where(same[..., None], inputs[:, seen], 0) * kernel[tap][None, None]
    return c


def residual_norm(arrays: dict, ids: jax.Array) -> dict:
    """Return r + y, and it over the root of its mean square, times `scale`; with a `bias` less its mean, plus it."""
    total = arrays["r"] + arrays.get("y", 0)
    bias = arrays["bias"][None, None] if "bias" in arrays else 0
    rows = total - jnp.mean(total, axis=-1, keepdims=True) if "bias" in arrays else total
    root = jnp.sqrt(jnp.mean(rows**2, axis=-1, keepdims=True) + 1e-5)
    return {"r": total, "x": rows / root * arrays["scale"][None, None] + bias}


def steps_and_rates(dt, A):
    """Return steps above 0 and rates below it, of arrays of any sign: softplus(dt - 2) and -exp(A)."""
    return jax.nn.softplus(dt - 2), -jnp.exp(A)


def selective_scan(arrays: dict, ids: jax.Array) -> dict:
    """Return y_t = C_t . h_t with h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t, and the last document's h.

    `arrays` are u and dt (B, T, D), A (D, N), B, C (B, T, N) and the first document's `state` before the first token.
    """
    dt, A = steps_and_rates(arrays["dt"], arrays["A"])

    def token(carry, inputs):
        (h, owner), (u, dt, B, C, own) = carry, inputs
        present = own != 0
        before = jnp.where((own == owner)[:, None, None], h, 0)
        after = jnp.exp(dt[..., None] * A[None]) * before + (dt * u)[..., None] * B[:, None]
        h = jnp.where(present[:, None, None], after, h)
        y = jnp.where(present[:, None], jnp.einsum("bdn,bn->bd", h, C), 0)
        return (h, jnp.where(present, own, owner)), y

    inputs = [jnp.moveaxis(x, 1, 0) for x in (arrays["u"], dt, arrays["B"], arrays["C"], ids)]
    (state, _), y = jax.lax.scan(token, (arrays["state"], _first(ids)), tuple(inputs))
    return {"y": jnp.moveaxis(y, 0, 1), "state": state}


def decays_and_directions(g, direction):
    """Return log-decays below 0, and what a state loses along a direction: a and b of the recurrence."""
    unit = direction * jax.lax.rsqrt(jnp.sum(direction * direction, axis=-1, keepdims=True) + 1)
    return -jax.nn.softplus(2 * g), -unit, 0.5 * unit


def recurrence(arrays: dict, ids: jax.Array) -> dict:
    """Return o_t = S_t^T q_t / sqrt(K) with S_t = diag(w_t) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T, and the last S.

    `arrays` are q, k, `g` (or of one channel) and any `direction` (B, T, H, K), v (B, T, H, V) and the first document's
    `state` before the first token; without a direction a and b are zero.
    """
    g = jnp.broadcast_to(arrays["g"], arrays["k"].shape)
    log_decay, a, b = decays_and_directions(g, arrays.get("direction", jnp.zeros_like(g)))
    return _recurrence(arrays, arrays["k"], log_decay, a, b, ids)


def keys_and_rates(k, g, beta):
    """Return keys of length 1, about, log-decays below 0, and rates (B, T, H) of a delta rule that stays bounded."""
    return k / 8, -jax.nn.softplus(2 * g), 0.5 * jax.nn.sigmoid(beta)[..., 0]


def gated_delta_rule(arrays: dict, ids: jax.Array) -> dict:
    """Return `recurrence` with a = w k, b = -beta k and beta k for k; `g` and `beta` are (B, T, H, 1)."""
    k, log_decay, rate = keys_and_rates(*(arrays[name] for name in ("k", "g", "beta")))
    written = rate[..., None] * k
    return _recurrence(arrays, written, log_decay, jnp.exp(log_decay) * k, -written, ids)


def _recurrence(arrays: dict, k, log_decay, a, b, ids) -> dict:
    q, v = arrays["q"], arrays["v"]

    def token(carry, inputs):
        (S, owner), (q, k, v, w, a, b, own) = carry, inputs
        present = own != 0
        before = jnp.where((own == owner)[:, None, None, None], S, 0)
        u = jnp.einsum("bhk,bhkv->bhv", a, before)
        after = w[..., None] * before + b[..., None] * u[..., None, :] + k[..., None] * v[..., None, :]
        S = jnp.where(present[:, None, None, None], after, S)
        o = jnp.einsum("bhk,bhkv->bhv", q, S) * q.shape[-1] ** -0.5
        return (S, jnp.where(present, own, owner)), jnp.where(present[:, None, None], o, 0)

    inputs = [jnp.moveaxis(x, 1, 0) for x in (q, k, v, jnp.exp(log_decay), a, b, ids)]
    (state, _), o = jax.lax.scan(token, (arrays["state"], _first(ids)), tuple(inputs))
    return {"o": jnp.moveaxis(o, 0, 1), "state": state}


def labels(ids: jax.Array, vocab: int) -> jax.Array:
    """Return a label for each token that depends on its place alone, -1 for padding and for every fifth token."""
    places = jnp.arange(ids.shape[1])
    spread = jnp.where(places % 5 == 4, -1, places * 104729 % vocab)[None]
    return jnp.where(ids == 0, -1, spread).astype(jnp.int32)


def linear_cross_entropy(arrays: dict, ids: jax.Array) -> dict:
    """Return log sum_v exp(h . table_v) - h . table_label, of scaled hidden states, 0 without a label."""
    logits = jnp.einsum("btd,vd->btv", SCALE * arrays["hidden"], arrays["table"])
    chosen = labels(ids, logits.shape[-1])
    own = jnp.take_along_axis(logits, jnp.maximum(chosen, 0)[..., None], axis=-1)
    losses = jax.nn.logsumexp(logits, axis=-1, keepdims=True) - own
    return {"losses": jnp.where((chosen >= 0)[..., None], losses, 0)}


def _over_queries(q, k, v, ids, weights: Callable, window: int | None = None):
    """Return sum_j w_ij v_j (B, T, H, .) with w = weights(q.k / sqrt(K), visible), blocks of queries at a time."""
    batch, time, heads, width = q.shape
    block = max(1, min(time, BLOCK_BYTES // (8 * batch * heads * time)))
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


def _first(ids):
    """Return the id of each row's first document, 0 where there is none."""
    place = jnp.argmax(ids != 0, axis=1)
    return jnp.take_along_axis(ids, place[:, None], axis=1)[:, 0]
