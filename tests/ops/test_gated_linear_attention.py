import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.cases import parametrize_some
from helpers.devices import H100, gpus
from helpers.reference_cases import FORWARD, GRADIENT, assert_close, load

from based_jax.devices import H100_CROSSOVERS
from based_jax.ops.calls import MatrixStateCall
from based_jax.ops.decays import initial_state
from based_jax.ops.dispatch import choose
from based_jax.ops.gated_linear_attention import (
    CHUNK_TOKENS,
    IMPLEMENTATIONS,
    gated_linear_attention,
    gated_linear_attention_step,
)

H, K, V = 2, 5, 3
IMPLS = ("xla_steps", "xla_chunks")
LONG = 2 * CHUNK_TOKENS + 3
jitted = jax.jit(gated_linear_attention, static_argnames=("impl", "scale"))


def inputs(normal, T, per_head=False, B=6, dtype="float32"):
    """Return q, k, v, log-decays down to about -10, and a state."""
    g = -np.square(normal(B, T, H, 1 if per_head else K))
    return (*(normal(B, T, H, n, dtype=dtype) for n in (K, K, V)), g, normal(B, H, K, V))


@pytest.mark.parametrize("with_bonus", [False, True])
def test_oracle_equals_fp64(with_bonus, normal):
    *xs, s = inputs(normal, 7, B=1)
    q, k, v, g, s = (np.asarray(x, np.float64) for x in (*xs, s))
    bonus = normal(H, K) if with_bonus else None
    o, after = jitted(*xs, bonus=bonus, state=s.astype(np.float32), impl="oracle", scale=0.7)
    for t in range(7):
        kv = np.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        read = s + np.asarray(bonus)[None, ..., None] * kv if with_bonus else None
        s = np.exp(g[:, t])[..., None] * s + kv
        expected = 0.7 * np.einsum("bhk,bhkv->bhv", q[:, t], read if with_bonus else s)
        np.testing.assert_allclose(o[:, t], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(after, s, rtol=1e-5, atol=1e-5)


@parametrize_some(
    "T, per_head, with_bonus",
    [(1, False, True), (1, True, False), (37, False, False), (37, True, True)]
    + [(LONG, per_head, with_bonus) for per_head in (False, True) for with_bonus in (False, True)],
    {(1, True, False), (37, False, False), (LONG, False, True), (LONG, True, False)},
)
def test_chunked_equals_the_oracle(T, per_head, with_bonus, normal, packed_ids, out_and_grads, close):
    args, ids = inputs(normal, T, per_head), packed_ids(T)
    args = (*args, normal(H, K)) if with_bonus else args

    def call(impl):
        def run(q, k, v, g, state, bonus=None):
            return gated_linear_attention(q, k, v, g, bonus=bonus, state=state, segment_ids=ids, impl=impl)

        return run

    cotangents = normal(6, T, H, V), normal(6, H, K, V)
    expected = out_and_grads(call("oracle"), args, cotangents)
    for impl in ("xla_chunks", "xla_quadratic"):
        close(out_and_grads(call(impl), args, cotangents), expected, what=impl, tolerance=2e-5)


def test_one_chunk_of_a_long_sequence(normal, packed_ids, out_and_grads, close):
    T, K, V = H100_CROSSOVERS.one_decay_one_chunk_tokens, 16, 24
    q, k, v = normal(6, T, 1, K), normal(6, T, 1, K), normal(6, T, 1, V)
    args, ids = (q, k, v, -(normal(6, T, 1, 1) ** 2), normal(6, 1, K, V)), packed_ids(T)

    def call(impl):
        return lambda q, k, v, g, state: gated_linear_attention(q, k, v, g, state=state, segment_ids=ids, impl=impl)

    cotangents = normal(6, T, 1, V), normal(6, 1, K, V)
    close(out_and_grads(call("xla_quadratic"), args, cotangents), out_and_grads(call("xla_chunks"), args, cotangents))


def taken(kind, T, K=64, V=64, decays=1, dtype="bfloat16"):
    """Return the name of what `auto` takes on such a GPU."""
    q, v, g = jnp.zeros((2, T, 2, K), dtype), jnp.zeros((2, T, 2, V), dtype), jnp.zeros((2, T, 2, decays))
    with gpus(kind):
        return choose("gated_linear_attention", IMPLEMENTATIONS, "auto", MatrixStateCall(q, q, v, g))


def test_auto_takes_the_fastest_on_a_gpu():
    """Full chunks; one chunk for few tokens and for large states; steps where products are fp32 or channels decay."""
    short, full, known = CHUNK_TOKENS - 1, CHUNK_TOKENS, H100_CROSSOVERS
    few, one = known.one_decay_steps_tokens, known.one_decay_one_chunk_tokens
    beside = known.one_decay_one_chunk_tokens_beside_chunks
    triton, hopper, quadratic = "triton_chunks", "hopper_steps", "xla_quadratic"
    assert [taken(H100, T) for T in (short, full, few + 1)] == [quadratic, triton, triton]
    assert [taken(H100, T, 128, 256) for T in (full, beside, beside + 1)] == [quadratic, quadratic, triton]
    assert [taken(H100, T, 128, 256, dtype="float32") for T in (one, one + 1)] == [quadratic, hopper]
    assert [taken(H100, T, dtype="float32") for T in (short, few, few + 1)] == [hopper, hopper, "xla_chunks"]
    assert [taken(H100, T, 128, 256, 128) for T in (short, full, one)] == [hopper, triton, triton]
    assert [taken("NVIDIA A100", T) for T in (short, full, few + 1)] == [quadratic, triton, triton]
    assert [taken("NVIDIA V100", T) for T in (one, one + 1)] == [quadratic, "xla_chunks"]


@pytest.mark.parametrize("impl", IMPLS)
def test_bf16_stays_close(impl, normal, close):
    *xs, _ = inputs(normal, 70, dtype="bfloat16")
    o, _ = jitted(*xs, impl=impl)
    assert o.dtype == jnp.bfloat16
    exact, _ = jitted(*(np.asarray(x, np.float32) for x in xs), impl="oracle")
    close(o, exact, "bfloat16")


def test_steps_and_pieces_equal_one_call(normal, close):
    *xs, state = jax.device_get(inputs(normal, 9))
    whole, after = jax.device_get(jitted(*xs, state=state))
    _, middle = jitted(*(x[:, :4] for x in xs), state=state)
    step = jax.jit(gated_linear_attention_step)
    for t in range(4, 9):
        o, middle = step(*(x[:, t] for x in xs), middle)
        close(o, whole[:, t])
    close(middle, after)
    assert initial_state(6, H, K, V).shape == after.shape
    forms = {"triton_chunks", "hopper_steps", "tpu_chunks", "xla_chunks", "xla_quadratic", "xla_steps", "oracle"}
    assert set(IMPLEMENTATIONS) == forms


def time_first(x):
    return x.swapaxes(1, 2)


def retention(impl, log_decay, scale=None):
    """Return a call on (q, k, v) with constant log-decays (H,)."""

    def call(q, k, v):
        g = jnp.broadcast_to(jnp.asarray(log_decay)[None, None, :, None], (*q.shape[:3], 1))
        return gated_linear_attention(q, k, v, g, scale=scale, impl=impl)

    return call


def heads_first(call):
    """Return the call for arguments (B, H, T, .)."""

    def run(q, k, v):
        o, state = call(time_first(q), time_first(k), time_first(v))
        return time_first(o), state

    return run


def wkv(impl):
    def call(r, k, v, w, u, state=None):
        w = jnp.broadcast_to(-jnp.exp(w)[None, :, None], k.shape) if w.ndim == 2 else w
        r, k, v, w = map(time_first, (r, k, v, w))
        o, state = gated_linear_attention(r, k, v, w, bonus=u, scale=1.0, state=state, impl=impl)
        return time_first(o), state

    return call


def hgrn2(impl):
    def call(q, f, i):
        g = jax.nn.log_sigmoid(f)
        return gated_linear_attention(q, 1 - jnp.exp(g), i, g, impl=impl)

    return call


def hgrn(impl):
    """Return HGRN's h_t = exp(g_t) h_{t-1} + x_t, an operation with K = V = 1 and a head for each channel."""

    def call(x, g):
        one = jnp.ones_like(x)[..., None]
        o, state = gated_linear_attention(one, one, x[..., None], g[..., None], impl=impl)
        return o[..., 0], state[..., 0, 0]

    return call


def given(*names):
    """Return calls of the operation itself, with per-head gates (B, T, H) or per-channel ones."""

    def make(impl):
        def call(q, k, v, g):
            g = g[..., None] if g.ndim == 3 else g
            return gated_linear_attention(q, k, v, g, impl=impl)

        return call

    return names, make


def ssd_minimal(impl):
    """Return SSD's minimal form, whose states are (B, 1, H, P, N)."""

    def call(X, A, B, C, initial_states):
        state = initial_states[:, 0].swapaxes(2, 3)
        o, state = gated_linear_attention(C, B, X, A[..., None], scale=1.0, state=state, impl=impl)
        return o, state.swapaxes(2, 3)

    return call


def ssd(impl):
    """Return SSD with its steps, skip and gate as Mamba-2 puts them around the operation."""

    def call(x, dt, A, B, C, D, z, dt_bias):
        dt = jax.nn.softplus(dt + dt_bias[None, None])[..., None]
        B, C = (jnp.repeat(y, x.shape[2], axis=2) for y in (B, C))
        o, state = gated_linear_attention(C, B, dt * x, dt * A[None, None, :, None], scale=1.0, impl=impl)
        return (o + D[None, None, :, None] * x) * jax.nn.silu(z), state.swapaxes(2, 3)

    return call


QKV = ("q", "k", "v")
SLOPES = load("lightning_attn2_op_a").inputs["slopes"][:, 0, 0]
FILES = {
    "fla_gla_op_a": given(*QKV, "gk"),
    "fla_simple_gla_op_a": given(*QKV, "g"),
    "fla_retention_op_a": (QKV, lambda impl: retention(impl, np.log(1 - 2.0 ** (-5 - np.arange(4))))),
    "fla_lightning_op_a": (QKV, lambda impl: retention(impl, -(8 / 4) * (1 - 2 / 6) * np.arange(4.0))),
    "lightning_attn2_op_a": (QKV, lambda impl: heads_first(retention(impl, -SLOPES, scale=1.0))),
    "fla_hgrn2_op_a": (("q", "f", "i"), hgrn2),
    "fla_hgrn_op_a": (("x", "g"), hgrn),
    "mamba2_ssd_minimal_a": (("X", "A", "B", "C", "initial_states"), ssd_minimal),
    "mamba2_ssd_full_a": (("x", "dt", "A", "B", "C", "D", "z", "dt_bias"), ssd),
    "rwkv5_op_a": (("receptance", "k", "v", "time_decay", "u"), wkv),
    "fla_rwkv6_op_a": (("receptance", "k", "v", "w", "u", "initial_state"), wkv),
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", FILES)
def test_reference(name, impl, out_and_grads):
    case, (names, make) = load(name), FILES[name]
    args = tuple(np.asarray(case.inputs[n], np.float32) for n in names)
    r_state = case.inputs.get("r_state", np.zeros_like(case.outputs["final_state"]))
    (o, state), grads = out_and_grads(make(impl), args, (case.inputs["r"], r_state))
    assert_close(o, case.outputs["o"], FORWARD, "o")
    assert_close(state, case.outputs["final_state"], FORWARD, "state")
    for n, grad in zip(names, grads, strict=True):
        assert_close(grad, case.gradients[n], GRADIENT, f"gradient of {n}")
