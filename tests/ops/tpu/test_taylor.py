"""Taylor attention's TPU kernels: refusals, values and gradients in the interpreter, what is compiled of them."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.cases import parametrize_some
from helpers.devices import tpus
from helpers.tpu_compiler import SLICES, compiled_text, needs_libtpu
from helpers.tpu_interpreter import interpreted

from based_jax import parallel
from based_jax.errors import UserError
from based_jax.ops.calls import LinearAttentionCall
from based_jax.ops.dispatch import Implementation, recorded_choices
from based_jax.ops.taylor import IMPLEMENTATIONS, expanded_dim, taylor_attention
from based_jax.ops.tpu import taylor as tpu_taylor
from pallas_kernels.tpu import taylor_features

COPIED = re.compile(r"= \w+\[([\d,]+)\]\S* (?:copy|transpose)\(")


@pytest.fixture
def on_cpu(monkeypatch):
    """Let a CPU take the kernels, for the interpreter."""
    monkeypatch.setitem(IMPLEMENTATIONS, "tpu_chunks", Implementation(tpu_taylor.compute))
    monkeypatch.setattr(tpu_taylor, "target_device_kind", lambda: "TPU v5 lite")


def inputs(normal, B, T, H, K, V, dtype="float32"):
    return [normal(B, T, H, size, dtype=dtype) for size in (K, K, V)]


def attend(impl, ids=None):
    return lambda q, k, v, state=None: taylor_attention(q, k, v, state=state, segment_ids=ids, impl=impl)


def run(out_and_grads, impl, arguments, cotangents, ids=None):
    """Return outputs and gradients by a form; of kernels what the interpreter has made of them."""
    if impl != "tpu":
        return out_and_grads(attend(impl, ids), arguments, cotangents)
    with interpreted():
        return jax.block_until_ready(out_and_grads(attend(impl, ids), arguments, cotangents))


@pytest.mark.parametrize("keys", [1, 8, 9, 16, 24, 32])
def test_every_feature_has_a_row_of_its_own(keys):
    padded = keys + -keys % taylor_features.KEY_MULTIPLE
    places = taylor_features.packed_places(keys, padded)
    assert len(set(places)) == len(places) == expanded_dim(keys)
    assert max(places) < taylor_features.number_of_features(padded)


# (B, T, H, K, V, packed, with a state, dtype): odd lengths, several chunks, heads in one program and in several.
CASES = [
    (1, 130, 1, 16, 64, False, False),
    (6, 257, 1, 16, 64, True, True),
    (1, 127, 2, 8, 112, False, True),
    (2, 256, 2, 24, 128, False, True),
    (1, 5, 11, 3, 9, False, False),
    (6, 300, 1, 16, 112, True, False),
]
PRECISIONS = [("float32", 1e-5), ("bfloat16", 1e-2)]
QUICK = [(*CASES[0], *PRECISIONS[0]), (*CASES[1], *PRECISIONS[1])]


@parametrize_some(
    "B, T, H, K, V, packed, with_state, dtype, tolerance", [(*x, *y) for x in CASES for y in PRECISIONS], QUICK
)
def test_kernels_equal_the_oracle(
    normal, packed_ids, out_and_grads, on_cpu, B, T, H, K, V, packed, with_state, dtype, tolerance
):
    """Nothing races, and what nothing has written is NaN."""
    ids = np.roll(packed_ids(T), -3, axis=0)[:B] if packed else None  # padding on either side, between, and alone
    past = jax.jit(lambda *qkv: taylor_attention(*qkv, impl="xla_chunks")[1])(*inputs(normal, B, 5, H, K, V))
    arguments = [*inputs(normal, B, T, H, K, V, dtype), *([past] if with_state else [])]
    cotangents = normal(B, T, H, V, dtype=dtype), normal(*past.shape, scale=0.1)
    exact = [np.asarray(x, np.float32) for x in arguments]
    wanted = run(out_and_grads, "oracle", exact, tuple(np.asarray(x, np.float32) for x in cotangents), ids)
    found = run(out_and_grads, "tpu", arguments, cotangents, ids)
    for ours, right in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
        ours, right = (np.asarray(x, np.float64) for x in (ours, right))
        assert np.isfinite(ours).all()
        assert np.linalg.norm(ours - right) <= tolerance * np.linalg.norm(right)
    if packed:
        assert not np.asarray(found[0][0], np.float32)[ids == 0].any()
