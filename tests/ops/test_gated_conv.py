"""The gated short convolution: its forms against the oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from based_jax.ops.conv import short_conv
from based_jax.ops.gated_conv import IMPLEMENTATIONS, gated_short_conv

FAST = [name for name, entry in IMPLEMENTATIONS.items() if entry.platform is None and name != "oracle"]


def caller(impl, ids=None, run=gated_short_conv):
    def call(x, kernel, bias=None, state=None):
        return run(x, kernel, bias=bias, state=state, segment_ids=ids, impl=impl)

    return call


@pytest.fixture
def draw(normal, packed_ids):
    """Return a source of (x, kernel, bias, state), cotangents and ids."""

    def inputs(T, W, D, dtype="float32", batch=6):
        args = normal(batch, T, 2 * D, dtype=dtype), normal(W, D), normal(2 * D), normal(batch, W, D, dtype=dtype)
        return args, (normal(batch, T, D, dtype=dtype), normal(batch, W, D, dtype=dtype)), packed_ids(T)

    return inputs


def test_oracle_is_the_formula(draw, close):
    (x, kernel, bias, state), _, ids = draw(20, 3, 5)
    u, gate = np.split(np.asarray(x) + np.asarray(bias), 2, axis=-1)
    c, after = jax.jit(lambda u: short_conv(u, kernel, state=state, segment_ids=ids, impl="oracle"))(u)
    got = jax.jit(caller("oracle", ids))(x, kernel, bias, state)
    close(got, (c / (1 + np.exp(-c)) * gate, after))


@pytest.mark.parametrize(
    "dtype, case",
    [
        ("float32", (1, 3, 64)),
        ("float32", (65, 2, 5)),
        pytest.param("bfloat16", (65, 2, 5), marks=pytest.mark.long),
        ("bfloat16", (40, 9, 4)),
    ],
    ids=str,
)
def test_every_form_equals_the_oracle(case, dtype, draw, out_and_grads, close):
    args, cotangents, ids = draw(*case, dtype=dtype)
    for call in (lambda impl: (caller(impl, ids), args), lambda impl: (caller(impl), args[:2])):
        expected = out_and_grads(*call("oracle"), cotangents)
        for impl in FAST:
            close(out_and_grads(*call(impl), cotangents), expected, dtype, what=impl)


@pytest.mark.parametrize("impl", FAST)
def test_pieces_equal_one_call(impl, draw, out_and_grads, close):
    (x, kernel, bias, _), cotangents, _ = draw(20, 3, 5, batch=2)
    ids = np.int32([np.ones(20), np.arange(20) >= 6])

    def in_pieces(x, kernel, bias):
        outputs, state = [], None
        for start, stop in ((0, 1), (1, 6), (6, 8), (8, 20)):
            y, state = caller(impl, ids[:, start:stop])(x[:, start:stop], kernel, bias, state)
            outputs.append(y)
        return jnp.concatenate(outputs, axis=1), state

    expected = out_and_grads(caller("oracle", ids), (x, kernel, bias), cotangents)
    close(out_and_grads(in_pieces, (x, kernel, bias), cotangents), expected)
