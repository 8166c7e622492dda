"""Mamba-2's state space in Triton kernels, whose heads share B and C by groups: the interpreter, and lowering."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import cuda_plugin, triton_interpreter
from helpers.cases import parametrize_some
from helpers.devices import gpus

from based_jax import parallel
from based_jax.ops import dispatch
from based_jax.ops.ssd import ssd
from based_jax.ops.triton import chunks


def inputs(normal, B, T, H, G, N, P, dtype="float32"):
    """Return x, dt, A, B, C, the state."""
    x, b, c = (normal(*shape, dtype=dtype) for shape in ((B, T, H, P), (B, T, G, N), (B, T, G, N)))
    b = (np.asarray(b, np.float32) / np.sqrt(N)).astype(jnp.dtype(dtype))
    return x, np.abs(normal(B, T, H)) / 2, -np.abs(normal(H)), b, c, normal(B, H, N, P)


@pytest.fixture
def interpreted(monkeypatch):
    """Run the kernels in their interpreter, in fp32 too."""
    triton_interpreter.interpret(monkeypatch)
    monkeypatch.setattr(chunks, "supports", lambda *_: None)
    monkeypatch.setattr(dispatch, "target_platform", lambda: "cuda")


# One group of B and C; two of three heads, with two pieces of states and strips of channels; one a head; two programs.
CASES = [
    (*sizes, *precision)
    for sizes in ((1, 70, 4, 1, 24, 40), (1, 70, 6, 2, 130, 72), (2, 64, 3, 3, 16, 8), (1, 130, 16, 1, 32, 64))
    for precision in (("float32", 1e-4), ("bfloat16", 1e-2))
]


@parametrize_some("B, T, H, G, N, P, dtype, tolerance", CASES, {CASES[0]})
def test_kernels_equal_the_oracle(B, T, H, G, N, P, dtype, tolerance, normal, packed_ids, out_and_grads, interpreted):
    arguments, ids = inputs(normal, B, T, H, G, N, P, dtype), np.asarray(packed_ids(T))[1 : 1 + B]
    cotangents = normal(B, T, H, P, dtype=dtype), normal(B, H, N, P)

    def run(impl, *arguments):
        def call(*arguments):
            return ssd(*arguments[:5], state=arguments[5], segment_ids=ids, impl=impl)

        given = np.asarray(cotangents[0], arguments[0].dtype), cotangents[1]
        return jax.tree.leaves(out_and_grads(call, arguments, given))

    exact = run("oracle", *(np.asarray(x, np.float32) for x in arguments))
    for ours, right in zip(run("triton_chunks", *arguments), exact, strict=True):
        ours, right = (np.asarray(x, np.float64) for x in (ours, right))
        assert np.linalg.norm(ours - right) <= tolerance * np.linalg.norm(right)


@parametrize_some("G", [1, 2, 4], [1])
def test_devices_take_their_heads_and_groups(G, normal, out_and_grads, interpreted, monkeypatch):
    """One group of B and C stays whole, some are repeated for heads that lie apart, as many as heads are divided."""
    monkeypatch.setattr(jax, "shard_map", functools.partial(jax.shard_map, check_vma=False))  # for the interpreter
    *arguments, _ = inputs(normal, 2, 20, 4, G, 16, 8)
    cotangent = normal(2, 20, 4, 8)

    def call(*arguments):
        return ssd(*arguments, impl="triton_chunks")[0]

    alone = out_and_grads(call, arguments, cotangent)
    with jax.set_mesh(parallel.make_mesh({"data": 2, "tensor": 4})):
        together = out_and_grads(call, arguments, cotangent)
    for ours, right in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(ours, right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("way", ["alone", "lanes", "x64"])
def test_kernels_read_and_make_a_group_s_and_no_head_s(way, monkeypatch):
    """On an H100, at Mamba-2's sizes: nothing has the bytes of B or C for each head."""
    if way != "alone":
        cuda_plugin.without_code(monkeypatch)
    B, T, H, N, P = 2, 128, 16, 128, 64
    x, dt, A = jnp.zeros((B, T, H, P), "bfloat16"), jnp.zeros((B, T, H)), jnp.zeros(H)
    arguments = [x, dt, A, *[jnp.zeros((B, T, 1, N), "bfloat16")] * 2]

    def call(*arguments):
        def total(*arguments):
            return ssd(*arguments, impl="triton_chunks")[0].astype(jnp.float32).sum()

        return jax.grad(total, tuple(range(5)))(*arguments)

    with gpus(), jax.enable_x64(way == "x64"):
        if way == "lanes":
            call, arguments = jax.vmap(call), [jnp.stack([x] * 3) for x in arguments]
        text = jax.jit(call).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text(debug_info=True)
    names = "one_decay_forward", "one_decay_reverse", "shared_keys_gradients"
    assert [name for name in names if name not in text] == []
    assert f"x{T}x1x{N}xbf16" in text and f"x{T}x{H}x{N}x" not in text
