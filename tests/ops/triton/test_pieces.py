"""Sequences with one decay a head that are walked over in pieces, in Triton's interpreter, and how many pieces."""

import jax
import numpy as np
import pytest
from helpers import triton_interpreter
from helpers.cases import parametrize_some

from based_jax.ops import dispatch
from based_jax.ops.gated_linear_attention import gated_linear_attention
from based_jax.ops.ssd import ssd
from based_jax.ops.triton import chunks
from pallas_kernels.triton import pieces


@pytest.fixture
def in_pieces(monkeypatch):
    """Run the kernels in their interpreter, in fp32 too, and three pieces of each sequence side by side."""
    triton_interpreter.interpret(monkeypatch)
    monkeypatch.setattr(chunks, "supports", lambda *_: None)
    monkeypatch.setattr(dispatch, "target_platform", lambda: "cuda")
    monkeypatch.setattr(pieces, "count", lambda walks, chunks: 3)


def inputs(normal, B, T, H, K, V):
    """Return q, k, v, log-decays that leave something of a piece, and a state."""
    q, k, v = (normal(B, T, H, size) for size in (K, K, V))
    return q, k / np.sqrt(K), v, -np.square(normal(B, T, H, 1)) / 50, normal(B, H, K, V)


def equal(ours, right, tolerance=1e-4):
    for x, exact in zip(ours, right, strict=True):
        assert np.linalg.norm(np.asarray(x) - exact) <= tolerance * np.linalg.norm(exact)


# The last piece has a part of a chunk; a piece has nothing, and there are two rows and two strips.
CASES = (1, 250, 1, 16, 40, False), (2, 70, 2, 24, 72, True)


@parametrize_some("B, T, H, K, V, packed", CASES, CASES[:1])
def test_pieces_equal_the_oracle(B, T, H, K, V, packed, normal, packed_ids, out_and_grads, in_pieces):
    arguments, cotangents = inputs(normal, B, T, H, K, V), (normal(B, T, H, V), normal(B, H, K, V))
    ids = np.roll(packed_ids(T), 2, axis=0)[:B] if packed else None

    def run(impl):
        def call(*arguments):
            return gated_linear_attention(*arguments[:4], state=arguments[4], segment_ids=ids, impl=impl)

        return jax.tree.leaves(out_and_grads(call, arguments, cotangents))

    equal(run("triton_chunks"), run("oracle"))


@pytest.mark.long
def test_heads_that_share_keys(normal, out_and_grads, in_pieces):
    x, dt, A = normal(1, 200, 4, 40), np.abs(normal(1, 200, 4)) / 9, -np.abs(normal(4))
    arguments, cotangent = (x, dt, A, normal(1, 200, 2, 16) / 4, normal(1, 200, 2, 16)), normal(1, 200, 4, 40)

    def run(impl):
        return jax.tree.leaves(out_and_grads(lambda *x: ssd(*x, impl=impl)[0], arguments, cotangent))

    equal(run("triton_chunks"), run("oracle"))


@pytest.mark.long
def test_lanes_are_what_each_is_alone(normal, in_pieces):
    lanes = [inputs(normal, 1, 200, 1, 16, 64) for _ in range(2)]

    def call(q, k, v, g, state):
        return gated_linear_attention(q, k, v, g, state=state, impl="triton_chunks")

    together = jax.jit(jax.vmap(call))(*(np.stack(x) for x in zip(*lanes, strict=True)))
    for i, lane in enumerate(lanes):
        equal([x[i] for x in together], jax.jit(call)(*lane), 1e-6)


@pytest.mark.parametrize(
    "walks, chunks, wanted",
    [
        (16, 256, 16),  # one long sequence of 16 heads: as many walks as a GPU takes at once
        (16, 250, 10),  # no part is empty
        (16, 257, 16),  # a prime number of chunks is filled up
        (64, 64, 4),
        (16, 13, 3),  # pieces of four chunks, at least
        (16, 11, 1),
        (96, 64, 1),  # enough walks
        (512, 64, 1),
    ],
)
def test_few_walks_are_cut_into_pieces(walks, chunks, wanted):
    assert pieces.count(walks, chunks) == wanted
