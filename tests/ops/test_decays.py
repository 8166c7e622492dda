"""Every XLA form equals the tokens one by one whatever decays: from none at all to those that leave nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from based_jax.ops.delta_rule import delta_rule, dplr
from based_jax.ops.diagonal_ssm import diagonal_ssm
from based_jax.ops.gated_linear_attention import CHUNK_TOKENS, gated_linear_attention
from based_jax.ops.gated_slot_attention import gated_slot_attention
from based_jax.ops.selective_scan import selective_scan
from based_jax.ops.ssd import ssd
from based_jax.ops.wkv4 import wkv4

T, K = CHUNK_TOKENS + 7, 3
STRENGTHS = (0.0, 1e-3, 1.0, 5.0, 50.0, 1e4, 1e6, 1e30, np.inf)


def ssd_by_heads(x, decay, B, C, **options):
    """Return Mamba-2's scan with rows as heads, each of which has one rate, that of its first token."""
    x, B, C = (jnp.swapaxes(y, 0, 2) for y in (x, B, C))
    y, state = ssd(x, jnp.ones(x.shape[:3]), decay[:, 0, 0, 0], B, C, **options)
    return jnp.swapaxes(y, 0, 2), jnp.moveaxis(state, 1, 0)


def with_bonus(*arrays, **options):
    return gated_linear_attention(*arrays, bonus=jnp.ones((1, K)), **options)


# An operation, the channels that its decays are of, what it takes of `inputs`, and its forms.
CHUNKS, ATTENTION, DELTA = ("xla_chunks",), ("q", "k", "v", "decay"), ("q", "unit", "v", "decay", "rate")
OPERATIONS = {
    "gated_linear_attention": (gated_linear_attention, K, ATTENTION, ("xla_chunks", "xla_quadratic")),
    "one decay": (gated_linear_attention, 1, ATTENTION, ("xla_chunks", "xla_quadratic")),
    "a bonus": (with_bonus, K, ATTENTION, CHUNKS),
    "delta_rule": (delta_rule, K, DELTA, CHUNKS),
    "delta_rule, one decay": (delta_rule, 1, DELTA, CHUNKS),
    "dplr": (dplr, K, ("q", "k", "v", "decay", "unit", "minus"), CHUNKS),
    "gated_slot_attention": (gated_slot_attention, K, ("q", "k", "v", "k", "decay"), CHUNKS),
    "ssd": (ssd_by_heads, 1, ("v", "decay", "k", "q"), CHUNKS),
}


def inputs(rng, normal, channels):
    """Return arrays whose rows decay alike, each by one of `STRENGTHS`, and three by all of them, often by little."""
    alone = np.broadcast_to(-np.asarray(STRENGTHS)[:, None, None, None], (len(STRENGTHS), T, 1, channels))
    mixed = -rng.choice(STRENGTHS, (3, T, 1, channels), p=[0.2, 0.3, 0.2, *[0.05] * 6])
    decay = np.concatenate([alone, mixed]).astype(np.float32)
    q, k, v, rate = (np.asarray(normal(len(decay), T, 1, *width)) for width in ((K,), (K,), (K,), ()))
    unit, rate = k / np.linalg.norm(k, axis=-1, keepdims=True), 1 / (1 + np.exp(-rate))
    minus = -rate[..., None] * unit
    return {"q": q, "k": k, "v": v, "decay": decay, "unit": unit, "rate": rate, "minus": minus}


# The others' chunks are made of the same parts.
FEW = ("one decay", "delta_rule", "gated_slot_attention")


@pytest.mark.parametrize("name", [x if x in FEW else pytest.param(x, marks=pytest.mark.long) for x in OPERATIONS])
def test_chunks_equal_steps_whatever_decays(name, rng, normal, out_and_grads, close):
    """Row by row, since a weak gradient is small beside a strong one."""
    operation, channels, names, forms = OPERATIONS[name]
    given = inputs(rng, normal, channels)
    args = [given[x] for x in names]
    calls = {form: functools.partial(operation, impl=form) for form in ("xla_steps", *forms)}
    cotangents = jax.tree.map(lambda x: normal(*x.shape), jax.eval_shape(calls["xla_steps"], *args))
    found = {form: jax.tree.map(np.asarray, out_and_grads(call, args, cotangents)) for form, call in calls.items()}
    expected = found.pop("xla_steps")
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(expected))
    for form, results in found.items():
        for i, strength in enumerate(given["decay"][:, 0, 0, 0]):
            own = (jax.tree.map(lambda x, i=i: x[i], tree) for tree in (results, expected))
            close(*own, what=f"{form}, row {i} from {strength}", floor=1e-30)


RATES = {  # operations of one rate a channel: the rate r, x (B, T, 1) and steps (B, T, 1)
    "wkv4": lambda r, x, dt, **options: wkv4(x, x, r, jnp.zeros(1), **options),
    "selective_scan": lambda r, x, dt, **options: selective_scan(x, dt, r[:, None], x, x, **options),
    "ssd": lambda r, x, dt, **options: ssd(x[..., None], dt, r, x[..., None], x[..., None], **options),
    "diagonal_ssm": lambda r, x, dt, **options: diagonal_ssm(
        x[..., None], *(jax.lax.complex(y, jnp.zeros(1))[:, None] for y in (r, jnp.ones(1), jnp.ones(1))), **options
    ),
}


@pytest.mark.parametrize("name", RATES)
def test_a_rate_of_minus_infinity_leaves_nothing_but_of_a_step_of_0(name, normal, close):
    """Values and gradients, of documents with padding, as a rate that is very strong has them."""
    x, dt = normal(1, 5, 1), jnp.asarray([[[1.0], [0.0], [1.0], [2.0], [1.0]]])
    ids = jnp.asarray([[1, 1, 0, 1, 2]])

    @functools.partial(jax.jit, static_argnums=1)
    def result(rate, impl):
        def call(x):
            return RATES[name](jnp.full(1, rate), x, dt, segment_ids=ids, impl=impl)[0]

        y, gradient = jax.vjp(call, x)
        return y, gradient(jnp.ones_like(y))

    expected = result(-1e6, "xla_steps")
    for impl in ("xla_steps", "xla_chunks"):
        close(result(-jnp.inf, impl), expected, what=impl)
