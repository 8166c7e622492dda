"""RWKV-7's Hopper kernels by chunks as far as a CPU can tell: refusals, and the interpreter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.cases import parametrize_some
from helpers.devices import gpus
from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import get_races

from based_jax.ops import delta_rule, segments
from based_jax.ops.calls import MatrixStateCall
from based_jax.ops.hopper import dplr as hopper_dplr


@pytest.mark.parametrize(
    ("K", "dtype", "words"),
    [
        (65, jnp.bfloat16, "at most 64, and is 65"),
        (64, jnp.float32, "bfloat16, and is float32"),
        (64, jnp.bfloat16, None),
    ],
)
def test_refusals_name_the_value(K, dtype, words):
    x = jnp.zeros((1, 64, 1, K), dtype)
    with gpus():
        refusal = hopper_dplr.supports(MatrixStateCall(x, x, x, x, a=x, b=x))
    assert refusal is None if words is None else words in refusal


# (T, H, K, V, documents, log-decays of a token and channel): one chunk, filled up; more chunks than are taken at once,
# as wide as heads are; two strips of values, and three that a block each takes.
CASES = [
    (50, 1, 40, 50, True, lambda x: -jnp.exp(3 * x)),
    (70, 1, 64, 64, False, lambda x: jnp.where(x > 0, -5.0, -1e-3)),
    (200, 2, 64, 64, False, lambda x: -0.6 * jax.nn.sigmoid(x)),
    (70, 1, 64, 100, False, lambda x: jnp.full_like(x, -5.0)),
    (130, 1, 64, 192, True, lambda x: -1e4 * (x > 1)),
]


@parametrize_some("T, H, K, V, documents, log_decays", CASES, CASES[:1])
def test_they_equal_the_oracle(
    T, H, K, V, documents, log_decays, normal, packed_ids, out_and_grads, interpreted_chunks
):
    q, k, v, do = (normal(1, T, H, size, dtype="bfloat16") for size in (K, K, V, V))
    unit = normal(1, T, H, K)
    unit = unit / jnp.linalg.norm(unit, axis=-1, keepdims=True)
    a, b = (x.astype(jnp.bfloat16).astype(jnp.float32) for x in (-unit, unit * jax.nn.sigmoid(normal(1, T, H, 1))))
    state, dstate = normal(1, H, K, V), normal(1, H, K, V)
    ids = packed_ids(T)[4:5] if documents else None

    def kernels(*given):
        *given, a, b, state = given
        numbers = None if ids is None else segments.numbered(ids)
        call = MatrixStateCall(*given, a=a, b=b, scale=K**-0.5, state=state, segment_ids=numbers)
        return hopper_dplr.compute(call)

    def oracle(*given):
        *given, state = given
        return delta_rule.dplr(*given, state=state, segment_ids=ids, impl="xla_steps")

    given = q, k, v, log_decays(normal(1, T, H, K)), a, b, state
    out, pullback = jax.vjp(kernels, *given)  # each kernel a program of its own: in one, threads wait for each other
    got = out, pullback((do, dstate))
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), (given, do))
    right = out_and_grads(oracle, wide[0], (wide[1], dstate))
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(right), strict=True):
        x, y = (np.asarray(z, np.float64) for z in (x, y))
        assert np.linalg.norm(x - y) < 5e-3 * np.linalg.norm(y)
    assert not get_races().races_found
