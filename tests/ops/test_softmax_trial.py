"""Attention of tokens that are read on trial, behind a ring that each row has filled to another length."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.cases import parametrize_some

from based_jax import parallel
from based_jax.errors import UserError
from based_jax.ops.softmax_trial import attention_trial

trial = jax.jit(attention_trial, static_argnames=("head_dim", "impl"))

S, LENGTHS = 11, [0, 1, 6, 11, 12, 30]
# (T, G, R, K, V, dtype): fewer tokens than the ring has slots, as many, and more.
CASES = [(3, 2, 2, 8, 5, "float32"), (11, 1, 1, 8, 8, "bfloat16"), (14, 3, 1, 4, 8, "float32")]


@pytest.fixture
def arrays(normal):
    """Return a source of the arguments of six rows."""

    def draw(T, G, R, K, V, dtype="float32"):
        shapes = (T, G * R, K), (T, G, K), (T, G, V), (S, G, K), (S, G, V)
        return *(normal(6, *shape, dtype=dtype) for shape in shapes), jnp.asarray(LENGTHS)

    return draw


def by_definition(q, k, v, past_k, past_v, length, head_dim):
    """Return each token's attention to the S newest ones up to it, which stand in a list."""
    o = np.zeros((*q.shape[:3], v.shape[3]))
    repeats = q.shape[2] // k.shape[2]
    for b, count in enumerate(length.tolist()):
        places = range(max(0, count - S), count)
        keys, values = ([x[b, place % S] for place in places] for x in (past_k, past_v))
        for t in range(q.shape[1]):
            keys, values = [*keys, k[b, t]][-S:], [*values, v[b, t]][-S:]
            for h in range(q.shape[2]):
                s = np.asarray([q[b, t, h] @ key[h // repeats] for key in keys]) / np.sqrt(head_dim)
                p = np.exp(s - s.max())
                o[b, t, h] = (p / p.sum()) @ np.asarray([value[h // repeats] for value in values])
    return o


@parametrize_some("T, G, R, K, V, dtype", CASES, CASES[:1])
def test_all_forms_are_the_definition(T, G, R, K, V, dtype, arrays, close):
    call = arrays(T, G, R, K, V, dtype)
    expected = by_definition(*(np.asarray(x, np.float64) for x in call[:5]), call[5], K - 1)
    for impl in ("oracle", "xla"):
        close(trial(*call, head_dim=K - 1, impl=impl), expected, dtype)


def test_a_cache_of_all_tokens_is_read_as_a_prefill_does(arrays, close):
    *call, _ = arrays(3, 2, 2, 8, 8)
    length = jnp.asarray([0, 1, 2, 5, 7, 8])
    expected = trial(*call, length, impl="oracle")
    close(
        jax.jit(attention_trial, static_argnames=("is_ring", "impl"))(*call, length, is_ring=False, impl="prefill"),
        expected,
    )
    with pytest.raises(UserError, match="the cache must hold all tokens, and is a ring"):
        trial(*call, length, impl="prefill")


@pytest.mark.long
def test_each_device_reads_its_own_rows_and_heads(arrays, close):
    call = [x[:4] for x in arrays(3, 2, 2, 8, 8)]
    mesh = parallel.make_mesh({"data": 4, "tensor": 2})
    specs = [jax.P("data", None, "tensor")] * 5 + [jax.P("data")]
    placed = [jax.device_put(x, jax.NamedSharding(mesh, spec)) for x, spec in zip(call, specs, strict=True)]
    with jax.set_mesh(mesh):
        compiled = trial.lower(*placed).compile()
        close(compiled(*placed), trial(*call, impl="oracle"))
    assert not any(word in compiled.as_text() for word in ("all-gather", "all-reduce", "collective-permute"))


def test_heads_that_do_not_divide_are_refused():
    q, k = jnp.zeros((1, 2, 3, 4)), jnp.zeros((1, 2, 2, 4))
    with pytest.raises(UserError, match="have 2 heads; these divide the 3 of the queries"):
        attention_trial(q, k, k, k, k, jnp.zeros(1, jnp.int32))
