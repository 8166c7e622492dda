import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.reference_cases import FORWARD, GRADIENT, assert_close, load

from based_jax.ops.gated_slot_attention import SlotState, gated_slot_attention, gated_slot_attention_step

B, H, K, V, M = 6, 2, 4, 3, 5
IMPLS = ("xla_steps", "xla_chunks")


def inputs(normal, T, dtype="float32"):
    g = -(normal(B, T, H, M) ** 2)
    q, k, v = (normal(B, T, H, n, dtype=dtype) for n in (K, K, V))
    return q, k, v, 1 - jnp.exp(g), g


@pytest.mark.parametrize("T", [1, 37, pytest.param(131, marks=pytest.mark.long)])
def test_two_passes_equal_the_oracle(T, normal, packed_ids, out_and_grads, close):
    args, ids = (*inputs(normal, T), SlotState(normal(B, H, K, M), normal(B, H, M, V))), packed_ids(T)

    def call(impl):
        def run(q, k, v, s, g, state):
            return gated_slot_attention(q, k, v, s, g, state=state, segment_ids=ids, impl=impl)

        return run

    cotangents = normal(B, T, H, V), SlotState(normal(B, H, K, M), normal(B, H, M, V))
    close(*(out_and_grads(call(impl), args, cotangents) for impl in ("xla_chunks", "oracle")), tolerance=3e-5)


def test_steps_and_bf16(normal, close):
    args = inputs(normal, 5, "bfloat16")
    whole, after = jax.jit(gated_slot_attention)(*args)
    assert whole.dtype == jnp.bfloat16
    state, step = jax.tree.map(np.zeros_like, after), jax.jit(gated_slot_attention_step)
    for t in range(5):
        o, state = step(*(np.asarray(x)[:, t] for x in args), state)
        close(o, whole[:, t], "bfloat16")
    close(state, after)


@pytest.mark.parametrize("impl", IMPLS)
def test_reference(impl, out_and_grads):
    case, names = load("fla_gsa_op_a"), ("q", "k", "v", "s", "g")
    args = tuple(jnp.asarray(case.inputs[n]) for n in names)
    r = jnp.asarray(case.inputs["r"]), SlotState(*(jnp.asarray(case.inputs[f"r_state_{i}"]) for i in (0, 1)))
    (o, state), grads = out_and_grads(functools.partial(gated_slot_attention, impl=impl), args, r)
    assert_close(o, case.outputs["o"], FORWARD, "o")
    for i, leaf in enumerate(state):
        assert_close(leaf, case.outputs[f"final_state_{i}"], FORWARD, f"state {i}")
    for n, grad in zip(names, grads, strict=True):
        assert_close(grad, case.gradients[n], GRADIENT, f"gradient of {n}")
    assert np.isfinite(o).all()
