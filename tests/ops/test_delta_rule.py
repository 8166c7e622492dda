import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.devices import H100, gpus
from helpers.reference_cases import FORWARD, GRADIENT, assert_close, load

from based_jax.devices import H100_CROSSOVERS
from based_jax.ops.calls import MatrixStateCall
from based_jax.ops.delta_rule import (
    CHUNK_TOKENS,
    DPLR_IMPLEMENTATIONS,
    IMPLEMENTATIONS,
    delta_rule,
    delta_rule_step,
    dplr,
    dplr_step,
)
from based_jax.ops.dispatch import choose

H, K, V, B = 2, 5, 3, 6
IMPLS = ("xla_steps", "xla_chunks")
jitted = functools.partial(jax.jit, static_argnames=("impl", "scale"))


def unit(x):
    return np.asarray(x) / np.linalg.norm(x, axis=-1, keepdims=True)


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x)))


def inputs(normal, T, per_head=False, dtype="float32"):
    """Return q, k of length 1, v, log-decays, and rates."""
    g = -np.square(normal(B, T, H, 1 if per_head else K))
    q, k, v = normal(B, T, H, K), unit(normal(B, T, H, K)), normal(B, T, H, V)
    return *(np.asarray(x, jnp.dtype(dtype)) for x in (q, k, v)), g, sigmoid(normal(B, T, H))


def low_rank(normal, T):
    """Return a and b of length at most 1, as RWKV-7 has them, so that the state stays bounded."""
    direction = unit(normal(B, T, H, K))
    return -direction, direction * sigmoid(normal(B, T, H, 1))


def test_oracle_is_the_delta_rule_in_fp64(normal):
    args = inputs(normal, 8)
    q, k, v, g, beta = (np.asarray(x, np.float64) for x in args)
    o, _ = jitted(delta_rule)(*args, impl="oracle", scale=0.5)
    s = np.zeros((B, H, K, V))
    for t in range(8):
        s = np.exp(g[:, t])[..., None] * s
        error = v[:, t] - np.einsum("bhk,bhkv->bhv", k[:, t], s)
        s = s + beta[:, t, :, None, None] * np.einsum("bhk,bhv->bhkv", k[:, t], error)
        np.testing.assert_allclose(o[:, t], 0.5 * np.einsum("bhk,bhkv->bhv", q[:, t], s), atol=1e-5)


@pytest.mark.parametrize(
    "T, per_head",
    [
        (1, True),
        pytest.param(37, False, marks=pytest.mark.long),
        pytest.param(2 * CHUNK_TOKENS + 3, True, marks=pytest.mark.long),
        (2 * CHUNK_TOKENS + 3, False),
    ],
)
def test_chunked_equals_the_oracle(T, per_head, normal, packed_ids, out_and_grads, close):
    q, k, v, g, _ = inputs(normal, T, per_head)
    args, ids = (q, k, v, g, *low_rank(normal, T), normal(B, H, K, V)), packed_ids(T)

    def call(impl):
        def run(q, k, v, g, a, b, state):
            return dplr(q, k, v, g, a, b, state=state, segment_ids=ids, impl=impl)

        return run

    cotangents = normal(B, T, H, V), normal(B, H, K, V)
    close(*(out_and_grads(call(impl), args, cotangents) for impl in ("xla_chunks", "oracle")), tolerance=5e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_decay_per_head_is_one_for_all_its_channels(impl, normal, out_and_grads, close):
    """Gated DeltaNet's gate, whose layer has no published arrays, is KDA's with equal channels."""
    q, k, v, g, beta = inputs(normal, CHUNK_TOKENS + 5, per_head=True)

    def call(widen):
        return lambda q, k, v, g, beta: delta_rule(q, k, v, widen(g), beta, impl=impl)

    cotangents = normal(*v.shape), normal(B, H, K, V)
    per_head, per_channel = (
        out_and_grads(call(widen), (q, k, v, g, beta), cotangents)
        for widen in (lambda g: g, lambda g: jnp.broadcast_to(g, k.shape))
    )
    close(per_head, per_channel, tolerance=2e-5)


def test_without_decay_a_key_of_length_one_is_overwritten(normal):
    """With beta 1, a repeated key answers with its last value."""
    k, v = unit(normal(1, 1, 1, K)), normal(1, 3, 1, V)
    keys, zeros = jnp.repeat(k, 3, axis=1), jnp.zeros((1, 3, 1, 1))
    o, _ = jitted(delta_rule)(keys, keys, v, zeros, jnp.ones((1, 3, 1)), scale=1.0)
    np.testing.assert_allclose(o, v, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_bf16_stays_close(impl, normal, close):
    args = inputs(normal, 70, dtype="bfloat16")
    o, _ = jitted(delta_rule)(*args, impl=impl)
    assert o.dtype == jnp.bfloat16
    exact, _ = jitted(delta_rule)(*(x.astype(np.float32) for x in args), impl="oracle")
    close(o, exact, "bfloat16")


def test_auto_takes_what_was_timed_and_is_fastest():
    """Full chunks go by chunks, but token by token where channels decay, heads are many and states small."""

    def taken(kind, T, decays=1, dtype="bfloat16", table=IMPLEMENTATIONS, batch=2, K=64, V=64, **mesh):
        def note(x, v, g, beta):
            rest = {"beta": beta} if table is IMPLEMENTATIONS else {"a": x, "b": x}
            names.append(choose("delta_rule", table, "auto", MatrixStateCall(x, x, v, g, **rest)))

        names = []
        shapes = (batch, T, 2, K), (batch, T, 2, V), (batch, T, 2, decays), (batch, T, 2)
        with gpus(kind, **mesh):
            jax.eval_shape(note, *map(jax.ShapeDtypeStruct, shapes, (dtype, dtype, "float32", "float32")))
        return names[0]

    few = H100_CROSSOVERS.dplr_steps_heads
    assert [taken(H100, T) for T in (CHUNK_TOKENS - 1, CHUNK_TOKENS, 4096)] == [
        "hopper_steps",
        "triton_chunks",
        "triton_chunks",
    ]
    wide = [taken("NVIDIA H200", 2048, n, K=256, V=512) for n in (1, 256)]
    assert wide == ["hopper_chunks", "triton_chunks"]
    assert taken("NVIDIA A100", 2048, K=256, V=512) == "triton_chunks"
    assert taken(H100, 256, dtype="float32") == "hopper_steps"
    assert taken(H100, CHUNK_TOKENS, batch=few // 2) == "triton_chunks"
    for options, chunks in (({"decays": 64}, "hopper_chunks"), ({"table": DPLR_IMPLEMENTATIONS}, "triton_chunks")):
        assert [taken(H100, T, **options) for T in (CHUNK_TOKENS - 1, CHUNK_TOKENS)] == [
            "hopper_steps",
            "triton_chunks",
        ]
        many = options | {"batch": few // 2}
        sizes = [taken(H100, CHUNK_TOKENS, **many, K=K, V=V) for K, V in ((64, 64), (128, 256))]
        assert sizes == ["hopper_steps", chunks]
        assert taken(H100, CHUNK_TOKENS, **options | {"batch": few // 2 - 1}) == "triton_chunks"
        assert (
            taken(H100, CHUNK_TOKENS, **many, shape=(2,), names=("data",)) == "triton_chunks"
        )  # half of them on a device
        assert taken(H100, CHUNK_TOKENS, **many, shape=(2,), names=("other",)) == "hopper_steps"
        assert taken(H100, 2**18, **many) == "triton_chunks"  # more elements than steps can count
        assert taken("NVIDIA L40S", CHUNK_TOKENS, **many) == "triton_chunks"
    assert [taken("NVIDIA A100", T) for T in (CHUNK_TOKENS - 1, CHUNK_TOKENS)] == ["xla_chunks", "triton_chunks"]
    assert taken("NVIDIA V100", 256) == "xla_chunks"


def test_steps_equal_one_call(normal, close):
    args, (a, b) = inputs(normal, 6), low_rank(normal, 6)
    for whole_call, step, xs in ((delta_rule, delta_rule_step, args), (dplr, dplr_step, (*args[:4], a, b))):
        whole, after = jax.device_get(jitted(whole_call)(*xs))
        state, step = jnp.zeros((B, H, K, V)), jax.jit(step)
        for t in range(6):
            o, state = step(*(x[:, t] for x in xs), state)
            close(o, whole[:, t])
        close(state, after)


def kda(impl):
    def call(q, k, v, g, beta):
        return delta_rule(q, k, v, g, beta, impl=impl)

    return call


def rwkv7(impl):
    def call(receptance, k, v, w, a, b, initial_state):
        return dplr(receptance, k, v, w, a, b, scale=1.0, state=initial_state, impl=impl)

    return call


FILES = {
    "fla_kda_op_a": (("q", "k", "v", "g", "beta"), kda),
    "fla_rwkv7_op_a": (("receptance", "k", "v", "w", "a", "b", "initial_state"), rwkv7),
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", FILES)
def test_reference(name, impl, out_and_grads):
    case, (names, make) = load(name), FILES[name]
    args = tuple(np.asarray(case.inputs[n], np.float32) for n in names)
    cotangents = case.inputs["r"], case.inputs["r_state"]
    (o, state), grads = out_and_grads(make(impl), args, cotangents)
    assert_close(o, case.outputs["o"], FORWARD, "o")
    assert_close(state, case.outputs["final_state"], FORWARD, "state")
    for n, grad in zip(names, grads, strict=True):
        assert_close(grad, case.gradients[n], GRADIENT, f"gradient of {n}")
