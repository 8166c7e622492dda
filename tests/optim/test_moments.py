"""Moments in bf16: what is kept, and that rounding favours no direction."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from based_jax import optim
from based_jax.optim import OptimConfig
from based_jax.optim.moments import kept_in, stochastically_rounded

BF16_STEP = 2.0**-7


def test_a_number_becomes_one_of_its_neighbours_and_itself_on_average(rng):
    x = rng.normal(size=200).astype(np.float32)
    drawn = jax.jit(jax.vmap(stochastically_rounded, (None, 0)))(x, np.arange(4000, dtype=np.uint32))
    error = np.asarray(drawn, np.float32) - x
    assert (np.abs(error) <= BF16_STEP * np.abs(x)).all()
    assert (np.abs(error.mean(0)) < 5 * BF16_STEP * np.abs(x) / np.sqrt(4 * 4000)).all()


def test_what_bf16_holds_stays_and_what_is_not_finite_too():
    held = np.float32([0.0, -1.5, 2.0**-120, np.inf, -np.inf, np.nan])
    found = jax.jit(stochastically_rounded)(held, np.uint32(1))
    np.testing.assert_array_equal(np.asarray(found, np.float32), held)


def test_a_state_has_half_the_bytes_and_the_first_update_is_the_same(rng):
    params = {"kernel": np.zeros((8, 8), np.float32), "bias": np.zeros(8, np.float32)}
    grads = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), params)
    config = {dtype: OptimConfig(schedule="constant", moment_dtype=dtype) for dtype in ("float32", "bfloat16")}
    found = {}
    for dtype, values in config.items():
        tx = optim.optimizer(values, 10)
        found[dtype] = jax.jit(lambda grads, params, tx=tx: tx.update(grads, tx.init(params), params))(grads, params)
    (updates, state), (expected, whole) = found["bfloat16"], found["float32"]
    jax.tree.map(np.testing.assert_array_equal, updates, expected)
    kinds = {optim.path_of(keys).split("/")[-1]: x.dtype for keys, x in jax.tree_util.tree_leaves_with_path(state)}
    assert {kinds["kernel"], kinds["bias"]} == {jnp.dtype("bfloat16")} and kinds["count"] == jnp.int32
    assert sum(x.nbytes for x in jax.tree.leaves(state)) < 0.6 * sum(x.nbytes for x in jax.tree.leaves(whole))


def test_a_second_moment_follows_gradients_that_become_smaller(rng):
    """A decay of 0.999 changes it by less than half of a bf16 step: rounded to the nearest it would stay at 1."""
    tx = kept_in("bfloat16", optax.scale_by_adam(0.9, 0.999))

    def update(state, _):
        return tx.update(jnp.full(64, 0.1), state)[1], None

    begin = tx.init(jnp.zeros(64))
    begin = begin._replace(count=jnp.int32(10_000), nu=jnp.ones(64, jnp.bfloat16))
    after, _ = jax.jit(lambda state: jax.lax.scan(update, state, length=1000))(begin)
    expected = 0.01 + 0.99 * 0.999**1000
    assert float(after.nu.astype(jnp.float32).mean()) == pytest.approx(expected, rel=0.03)
    assert after.nu.dtype == jnp.bfloat16
