"""Convolutions' Triton kernels as far as a CPU can tell: refusals, the interpreter, and lowering for an H100."""

import jax.numpy as jnp
import pytest
from helpers import triton_interpreter
from helpers.cases import parametrize_some

from based_jax.ops import segments
from based_jax.ops.calls import LongConvCall
from based_jax.ops.long_conv import long_conv
from based_jax.ops.triton import toeplitz

# (T, L, D): less than a block, several, filters that end within one and behind it.
CASES = [(130, 130, 2), (200, 64, 1), (257, 66, 1), (5, 5, 3)]


def padded(kernel, T):
    """Return a filter of T taps."""
    return jnp.pad(kernel, ((0, T - len(kernel)), (0, 0)))


@parametrize_some("T, L, D", CASES, CASES[:1])
@pytest.mark.parametrize("packed", [True, False])
def test_they_equal_the_oracle(T, L, D, packed, normal, packed_ids, out_and_grads, close, monkeypatch):
    triton_interpreter.interpret(monkeypatch)
    u, kernel, cotangent = normal(3, T, D, dtype="bfloat16"), normal(L, D), normal(3, T, D, dtype="bfloat16")
    kernel = kernel.astype(jnp.bfloat16).astype(jnp.float32)
    ids = packed_ids(T)[1:4] if packed else None
    compute = segments.without_padding(lambda call: toeplitz.convolve(*call), "u")

    def tiles(u, kernel):
        return compute(LongConvCall(u, kernel, None if ids is None else segments.numbered(ids)))

    def oracle(u, kernel):
        return long_conv(u, padded(kernel, T), segment_ids=ids, impl="oracle")

    (y, grads), expected = (out_and_grads(call, (u, kernel), cotangent) for call in (tiles, oracle))
    close((y, grads), expected, "bfloat16")
    close(grads[1], expected[1][1], tolerance=1e-5)
