"""Caches with a budget: each policy against lists of tokens, and what it shares with the cache of everything."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.cases import parametrize_some
from helpers.decoding import prefill_then_step

from based_jax.errors import UserError
from based_jax.nn import eviction, multihead
from based_jax.nn.mixers import make_mixer

D, HEADS, GROUPS = 16, 4, 2
EVICTING = [name for name, policy in eviction.POLICIES.items() if policy is not None]


@functools.cache
def mixer_of(policy="full", budget=None, sinks=2, dtype=jnp.float32):
    options = {"cache_policy": policy, "cache_budget": budget, "cache_sinks": sinks}
    heads = {"num_heads": HEADS, "num_kv_heads": GROUPS}
    return make_mixer("attention", D, std=0.5, out_std=0.2, dtype=dtype, rngs=nnx.Rngs(0), **heads, **options)


def turned(mixer, x):
    """Return vectors (N, K) at each of N places: (N, places, K)."""
    vectors = jnp.broadcast_to(jnp.float32(x)[:, None, None], (len(x), len(x), 1, x.shape[1]))
    return np.asarray(multihead.rotary(vectors, jnp.arange(len(x)), mixer.rotary_dim, 10000.0))[:, :, 0]


def dropped(policy, tokens, budget, sinks):
    """Return which of a head's tokens, oldest first, makes room for the next one."""
    mean = [token["sum"] / token["count"] for token in tokens]
    if policy == "window":
        return 0
    if policy == "streaming":
        return sinks
    if policy == "h2o":
        old = len(tokens) - (budget // 2 - 1)
        return min(range(old), key=lambda i: tokens[i]["sum"])
    old = len(tokens) - (min(eviction.ROCO_NEWEST, budget // 2) - 1)
    deviation = [np.std(token["paid"]) for token in tokens[:old]]
    asked = sorted(range(old), key=deviation.__getitem__)[: budget - int(eviction.ROCO_EXEMPT * budget)]
    return min(asked, key=mean.__getitem__)


def read_by_lists(mixer, q, k, v, policy, budget, sinks):
    """Return the outputs (T, queries, V) of one group of one row, from its q (T, queries, K), k and v (T, .)."""
    tokens, outputs, k, q = [], [], turned(mixer, k), np.stack([turned(mixer, x) for x in np.moveaxis(q, 1, 0)])
    for t in range(len(v)):
        if len(tokens) == budget:
            tokens.pop(dropped(policy, tokens, budget, sinks))
        tokens.append({"place": t, "k": k[t], "v": v[t], "paid": [], "sum": 0.0, "count": 0})
        places = range(len(tokens)) if policy == "streaming" else [token["place"] for token in tokens]
        keys = np.stack([token["k"][place] for token, place in zip(tokens, places, strict=True)])
        p = np.exp(q[:, t, places[-1]] @ keys.T / np.sqrt(q.shape[-1]))
        p /= p.sum(axis=1, keepdims=True)
        for token, weight in zip(tokens, p.mean(axis=0), strict=True):
            token["paid"].append(weight)
            token["sum"] += weight
            token["count"] += 1
        outputs.append(p @ np.stack([token["v"] for token in tokens]))
    return np.stack(outputs)


@parametrize_some(
    "policy, budget, T",
    [(policy, budget, T) for policy in EVICTING for budget, T in ((6, 17), (3, 9), (24, 40))],
    [(policy, 6, 17) for policy in ("streaming", "roco")],
)
def test_steps_keep_what_lists_of_tokens_keep(policy, budget, T, normal, close):
    mixer, x = mixer_of(policy, budget), normal(1, T, D)
    y, _, _ = prefill_then_step(mixer, x, 1)
    q, k, v = (np.asarray(z[0], np.float64) for z in mixer.unrotated_qkv(x))
    groups = np.split(q, GROUPS, axis=1)
    o = [read_by_lists(mixer, queries, k[:, g], v[:, g], policy, budget, 2) for g, queries in enumerate(groups)]
    close(y[0], mixer.out_proj(jnp.float32(np.concatenate(o, axis=1)).reshape(T, D)), tolerance=3e-5)


@parametrize_some("policy, budget", [(policy, budget) for policy in EVICTING for budget in (12, 4)], [("streaming", 4)])
def test_a_prefill_keeps_what_steps_keep(policy, budget, normal, close):
    """Whether all of it fits, the cache is full before it ends, or it is longer than the budget."""
    mixer, x = mixer_of(policy, budget), normal(2, 15, D)
    expected, _, steps = prefill_then_step(mixer, x, 1)
    prefill, cache, y = jax.jit(mixer.prefill), mixer.init_cache(2, 15), []
    for part in jnp.split(x, 3, axis=1):
        more, cache = prefill(part, cache)
        y.append(more)
    close((jnp.concatenate(y, axis=1), cache), (expected, steps))


@pytest.mark.parametrize(("policy", "token_by_token"), [("window", False), ("streaming", False), ("h2o", True)])
def test_what_leaves_for_its_place_is_read_at_once(policy, token_by_token):
    """No loop has as many turns as there are tokens, where scores do not decide."""
    mixer, T = mixer_of(policy, 12), 31
    cache = jax.eval_shape(lambda: mixer.init_cache(2, 40))
    program = jax.make_jaxpr(mixer.prefill)(jax.ShapeDtypeStruct((2, T, D), jnp.float32), cache)
    assert (f"length={T}" in str(program)) == token_by_token


IDS = """
    1 1 1 1 0 1 1 1 1 1 1 1
    0 0 0 0 0 0 0 0 0 1 1 1
    1 1 1 1 1 1 1 1 2 2 2 0
    1 2 2 2 2 0 2 2 2 2 2 2
    0 0 0 0 0 0 0 0 0 0 0 0
"""


@parametrize_some("policy", EVICTING, ["streaming"])
def test_padding_is_inert_and_documents_begin_anew(policy, normal, close):
    ids = np.asarray([row.split() for row in IDS.strip().splitlines()], np.int32)
    mixer, x, more = mixer_of(policy, 5), np.asarray(normal(*ids.shape, D)), np.asarray(normal(len(ids), 4, D))

    @jax.jit
    def read(x, more, ids):
        y, cache = mixer.prefill(x, mixer.init_cache(x.shape[0], 40), ids)
        _, rest = jax.lax.scan(lambda cache, x: mixer.step(x, cache)[::-1], cache, jnp.moveaxis(more, 1, 0))
        return y, jnp.moveaxis(rest, 0, 1)

    y, rest = read(x, more, ids)
    last = ids == np.asarray([row[row != 0][-1] if row.any() else -1 for row in ids])[:, None]
    alone = np.zeros((len(ids), ids.shape[1] + 4, D), np.float32)
    for row, there in enumerate(last):
        alone[row, : there.sum() + 4] = np.concatenate([x[row, there], more[row]])
    expected, _, _ = prefill_then_step(mixer, jnp.asarray(alone), 1)
    for row, there in enumerate(last):
        close(np.concatenate([y[row][there], rest[row]]), expected[row, : there.sum() + 4], what=f"row {row}")


@parametrize_some(
    "policy, budget, dtype",
    [(policy, budget, dtype) for policy in EVICTING for budget in (16, 99) for dtype in ("float32", "bfloat16")],
    [("streaming", 16, "float32")],
)
def test_a_budget_of_all_tokens_is_no_budget_bit_for_bit(policy, budget, dtype, normal):
    x = normal(2, 16, D, dtype=dtype)
    full, some = (mixer_of(*of, dtype=jnp.dtype(dtype)) for of in ((), (policy, budget)))
    (y, _, cache), (expected, _, everything) = (prefill_then_step(mixer, x, 9) for mixer in (some, full))
    np.testing.assert_array_equal(y, expected)
    jax.tree.map(np.testing.assert_array_equal, cache.state.tokens, everything.state.tokens)


@pytest.mark.parametrize("policy", EVICTING)
def test_what_it_holds_is_counted(policy):
    mixer = mixer_of(policy, 8, 3)
    for tokens in (1, 5, 8, 100):
        cache = jax.eval_shape(lambda tokens=tokens: mixer.init_cache(3, tokens))
        floats = [leaf.size for leaf in jax.tree.leaves(cache) if leaf.dtype == jnp.float32]
        assert sum(floats) == 3 * mixer.state_size(tokens)
    assert mixer.state_size(100) == mixer.state_size(8) < mixer_of().state_size(12)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"cache_policy": "h20", "cache_budget": 8}, "did you mean 'h2o'"),
        ({"cache_policy": "window"}, "cache_budget is None; cache_policy 'window' keeps so many"),
        ({"cache_budget": 8}, "cache_budget is 8; cache_policy 'full' keeps all"),
        ({"cache_policy": "streaming", "cache_budget": 4}, "cache_budget is 4; it is at least 5"),
        ({"cache_policy": "roco", "cache_budget": 1}, "cache_budget is 1; it is at least 2"),
    ],
)
def test_impossible_budgets_are_refused(options, words):
    with pytest.raises(UserError, match=words):
        make_mixer("attention", D, num_heads=HEADS, rngs=nnx.Rngs(0), **options)
