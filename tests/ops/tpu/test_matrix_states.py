"""The TPU kernels of matrix states by chunks: refusals, values and gradients in the interpreter, what is compiled."""

import functools

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
from based_jax.ops import dispatch
from based_jax.ops.delta_rule import delta_rule, dplr
from based_jax.ops.dispatch import recorded_choices
from based_jax.ops.gated_linear_attention import gated_linear_attention
from based_jax.ops.ssd import ssd


def linear(q, k, v, g, beta, **options):
    return gated_linear_attention(q, k, v, g, **options)


def low_rank(q, k, v, g, beta, *, scale=None, **options):
    """RWKV-7's: what lies under a removal key is lessened by a rate of each channel."""
    rates = beta[..., None] * (0.5 + 0.5 * jnp.cos(jnp.arange(k.shape[3])))[None, None, None]
    b = (k * rates).astype(k.dtype)
    return dplr(q, jnp.roll(k, 1, 3), v, g, -k, b, scale=scale, **options)


FORMS = {
    "linear": (linear, False),
    "linear by channel": (linear, True),
    "delta": (delta_rule, False),
    "delta by channel": (delta_rule, True),
    "low rank": (low_rank, False),
    "low rank by channel": (low_rank, True),
}
"""An operation, and whether each channel has a decay."""


@pytest.fixture
def on_tpu(monkeypatch):
    """Let operations take what runs on TPUs."""
    monkeypatch.setattr(dispatch, "target_platform", lambda: "tpu")


def inputs(normal, form, B, T, H, K, V, dtype="float32", correlated=0.0):
    """Return q, k of length 1, v, log-decays from 0 down, and rates from 0 to 2."""
    k = np.asarray(normal(B, T, H, K)) + correlated
    k = k / np.linalg.norm(k, axis=-1, keepdims=True)
    q, k, v = (np.asarray(x, jnp.dtype(dtype)) for x in (normal(B, T, H, K), k, normal(B, T, H, V)))
    decays = -np.square(normal(B, T, H, K if FORMS[form][1] else 1))
    return q, k, v, decays, 2 / (1 + np.exp(-np.asarray(normal(B, T, H))))


def found_and_right(out_and_grads, call, arguments, cotangents):
    """Return what `call(*arguments, impl=)` and its gradients are in the interpreter, and exactly."""
    with interpreted():
        found = out_and_grads(functools.partial(call, impl="tpu"), arguments, cotangents)
        found = jax.block_until_ready(found)
    exact, cotangents = (jax.tree.map(lambda x: np.asarray(x, np.float32), xs) for xs in (arguments, cotangents))
    return found, out_and_grads(functools.partial(call, impl="oracle"), exact, cotangents)


@parametrize_some(
    "form, dtype, sizes, packed",
    [
        (form, dtype, sizes, packed)
        for form in FORMS
        for dtype in ("float32", "bfloat16")
        for sizes, packed in (((1, 133, 3, 16, 24), True), ((2, 130, 2, 24, 40), False), ((1, 7, 1, 20, 8), False))
    ]
    + [("delta", "bfloat16", (1, 130, 1, 16, 500), True)],
    [
        ("delta by channel", "float32", (1, 133, 3, 16, 24), True),
        ("low rank by channel", "float32", (1, 133, 3, 16, 24), True),
        ("linear", "bfloat16", (1, 7, 1, 20, 8), False),
    ],
)
def test_it_equals_the_oracle(form, dtype, sizes, packed, normal, packed_ids, close, out_and_grads, on_tpu):
    """Outputs, states and all gradients; nothing races, and what nothing has written is NaN."""
    B, T, H, K, V = sizes
    operation, _ = FORMS[form]
    arguments = (*inputs(normal, form, *sizes, dtype), np.asarray(normal(B, H, K, V)))
    ids = np.asarray(packed_ids(T))[1:2] if packed else None

    def call(*arguments, impl):
        return operation(*arguments[:5], state=arguments[5], scale=0.3, segment_ids=ids, impl=impl)

    cotangents = np.asarray(normal(B, T, H, V), arguments[2].dtype), np.asarray(normal(B, H, K, V))
    found, right = found_and_right(out_and_grads, call, arguments, cotangents)
    assert found[0][0].dtype == arguments[2].dtype
    close(found, right, dtype)


@parametrize_some("form", FORMS, ["delta"])
@pytest.mark.parametrize(
    "where, decay",
    [(slice(None), -5.0), pytest.param([3, 40, 128], -np.inf, marks=pytest.mark.long)],
    ids=["saturated", "forgotten"],
)
def test_what_decays_at_once_neither_overflows_nor_drowns_the_rest(
    form, where, decay, normal, close, out_and_grads, on_tpu
):
    q, k, v, g, beta = inputs(normal, form, 1, 130, 1, 16, 16)
    g[:, where] = decay
    call = functools.partial(FORMS[form][0], scale=0.3)
    cotangents = np.asarray(normal(1, 130, 1, 16)), np.asarray(normal(1, 1, 16, 16))
    close(*found_and_right(out_and_grads, call, (q, k, v, g, beta), cotangents))


@pytest.mark.long
@pytest.mark.parametrize("form", ["delta", "delta by channel"])
@pytest.mark.parametrize("rate", [1.0, 2.0])
def test_similar_keys_that_nothing_decays_are_solved_for(form, rate, normal, close, out_and_grads, on_tpu):
    q, k, v, g, beta = inputs(normal, form, 1, 130, 1, 32, 16, correlated=5.0)
    arguments = q, k, v, 0 * g, np.full_like(beta, rate)
    cotangents = np.asarray(normal(1, 130, 1, 16)), np.asarray(normal(1, 1, 32, 16))
    close(*found_and_right(out_and_grads, FORMS[form][0], arguments, cotangents), tolerance=1e-4)


@parametrize_some("form", FORMS, ["delta by channel"])
def test_devices_take_their_rows_and_heads(form, normal, close, out_and_grads, on_tpu):
    arguments = inputs(normal, form, 4, 20, 2, 16, 16)
    cotangents = np.asarray(normal(4, 20, 2, 16)), np.asarray(normal(4, 2, 16, 16))
    with jax.set_mesh(parallel.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})):
        close(*found_and_right(out_and_grads, FORMS[form][0], arguments, cotangents))


def test_groups_of_heads_share_what_a_state_space_reads_and_writes(normal, close, out_and_grads, on_tpu):
    x, dt, A = normal(1, 20, 4, 8), np.exp(normal(1, 20, 4)), -np.exp(normal(4))
    arguments = x, dt, A, normal(1, 20, 2, 16), normal(1, 20, 2, 16)
    cotangents = np.asarray(normal(1, 20, 4, 8)), np.asarray(normal(1, 4, 16, 8))
    close(*found_and_right(out_and_grads, ssd, arguments, cotangents))


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"dtype": "float16"}, "v must be bfloat16 or float32, and is float16"),
        ({"K": 320}, "K must be at most 256 and V 512, and they are 320 and 64"),
        ({"V": 520}, "K must be at most 256 and V 512, and they are 32 and 520"),
    ],
)
def test_refusals_name_the_value(sizes, words):
    given = {"dtype": "bfloat16", "K": 32, "V": 64} | sizes
    q, v = (jnp.zeros((1, 8, 1, size), given["dtype"]) for size in (given["K"], given["V"]))
    with tpus(), pytest.raises(UserError, match=words):
        delta_rule(q, q, v, jnp.zeros((1, 8, 1, 1)), jnp.zeros((1, 8, 1)), impl="tpu")


def trained(form, K=128, V=128, T=256, H=4, dtype="bfloat16"):
    """Return a call with all its gradients, and its arguments."""
    operation, by_channel = FORMS[form]
    arrays = [jnp.zeros((2, T, H, size), dtype) for size in (K, K, V)]
    arguments = *arrays, jnp.zeros((2, T, H, K if by_channel else 1)), jnp.zeros((2, T, H))

    def call(*arguments, impl="auto"):
        out, pullback = jax.vjp(functools.partial(operation, impl=impl), *arguments)
        return pullback(out)

    return call, arguments


@pytest.mark.parametrize(("shape", "rows", "heads"), [((1,), 2, 4), ((2, 2), 1, 2)], ids=str)
def test_auto_lowers_for_tpus_each_with_its_rows_and_heads(shape, rows, heads):
    call, arguments = trained("delta")
    with tpus(shape=shape), recorded_choices() as choices:
        text = jax.jit(call).trace(*arguments).lower(lowering_platforms=("tpu",)).as_text()
    assert [*choices.values()] == [{"tpu_chunks": None}]
    assert text.count("@tpu_custom_call(") == 2
    assert f"tensor<{rows}x{heads}x256x128xbf16>" in text


def test_lanes_are_programs_of_the_same_kernels():
    """The interpreter takes no `jax.vmap`: it wants to know of each dimension of a grid whether it is parallel."""
    call, arguments = trained("delta by channel", K=16, V=16, T=20, H=1)
    lanes = [jnp.stack([x] * 3) for x in arguments]
    with tpus():
        text = jax.jit(jax.vmap(call)).trace(*lanes).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("@tpu_custom_call(") == 2 and "tensor<3x2x1x32x16xbf16>" in text


@needs_libtpu
@pytest.mark.long
@pytest.mark.parametrize("name", SLICES)
@pytest.mark.parametrize(
    ("form", "sizes"),
    [
        ("linear", {"K": 64, "V": 112}),
        ("delta", {"K": 256, "V": 512}),
        ("low rank by channel", {"K": 64, "V": 64}),
        ("delta by channel", {"K": 20, "V": 24, "T": 48, "H": 3, "dtype": "float32"}),
        ("linear by channel", {}),
    ],
)
def test_each_generation_compiles_them(form, sizes, name):
    call, arguments = trained(form, **sizes)
    text = compiled_text(name, functools.partial(call, impl="tpu"), *arguments)
    assert text.count('custom_call_target="tpu_custom_call"') == 2
