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
from based_jax.ops.dispatch import Implementation, recorded_choices
from based_jax.ops.taylor import IMPLEMENTATIONS, expanded_dim, taylor_attention
from based_jax.ops.tpu import taylor as tpu_taylor
from pallas_kernels.tpu import taylor_features

COPIED = re.compile(r"= \w+\[([\d,]+)\]\S* (?:copy|transpose)\(")


@pytest.fixture
def on_cpu(monkeypatch):
    """Let a CPU take the kernels, for the interpreter."""
    monkeypatch.setitem(IMPLEMENTATIONS, "tpu_chunks", Implementation(tpu_taylor.compute))


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


@pytest.mark.parametrize(
    "mesh", [{"data": 2, "tensor": 4}, pytest.param({"data": 4, "sequence": 2}, marks=pytest.mark.long)], ids=str
)
def test_eight_devices_take_their_rows_heads_and_pieces_of_time(mesh, normal, out_and_grads, on_cpu):
    arguments, ids = inputs(normal, 4, 20, 4, 4, 8), np.repeat(np.int32([[1, 1, 0, 2, 2]] * 4), 4, axis=1)
    past = jax.jit(lambda *qkv: taylor_attention(*qkv, impl="xla_chunks")[1])(*inputs(normal, 4, 5, 4, 4, 8))
    arguments, cotangents = [*arguments, past], (normal(4, 20, 4, 8), normal(*past.shape, scale=0.1))
    wanted = run(out_and_grads, "oracle", arguments, cotangents, ids)
    with jax.set_mesh(parallel.make_mesh(mesh)):
        found = run(out_and_grads, "tpu", arguments, cotangents, ids)
    for ours, right in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
        np.testing.assert_allclose(ours, right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"dtype": "float16"}, "q, k and v must all be bfloat16 or float32, and are float16, float16 and float16"),
        ({"K": 33}, "K must be at most 32, and is 33"),
        ({"V": 129}, "V must be at most 128, and is 129"),
        ({"B": 0}, "no dimension may be empty, and q is \\(0, 8, 1, 16\\)"),
    ],
)
def test_refusals_name_the_value(changed, reason):
    sizes = {"B": 1, "K": 16, "V": 64, "dtype": "bfloat16"} | changed
    q, v = (jnp.zeros((sizes["B"], 8, 1, sizes[size]), sizes["dtype"]) for size in "KV")
    with tpus(), pytest.raises(UserError, match=reason):
        attend("tpu")(q, q, v)


@pytest.mark.parametrize(("time", "name"), [(127, "xla_chunks"), (128, "tpu_chunks")])
def test_auto_takes_them_for_a_register_of_tokens_and_more(time, name):
    q, v = (jnp.zeros((1, time, 1, size), jnp.bfloat16) for size in (16, 64))
    with tpus(), recorded_choices() as choices:
        jax.eval_shape(attend("auto"), q, q, v)
    assert list(choices["taylor_attention"]) == [name]


def mixed(H, x, *kernels):
    """Return Taylor attention of the projections of x (B, T, D), and its gradients, as its mixer computes them."""

    def loss(x, w_q, w_k, w_v, w_o):
        q, k, v = ((x @ w).reshape(*x.shape[:2], H, -1) for w in (w_q, w_k, w_v))
        o, _ = taylor_attention(q, k, v, impl="tpu_chunks")
        return jnp.sum((o.reshape(*x.shape[:2], -1) @ w_o).astype(jnp.float32) ** 2)

    return jax.value_and_grad(loss, argnums=(0, 1, 2, 3, 4))(x, *kernels)


@needs_libtpu
@pytest.mark.long
@pytest.mark.parametrize("name", SLICES)
def test_nothing_is_turned_over_between_projections_and_kernels(name):
    B, T, D, H, K, V = 2, 1024, 1024, 16, 16, 64
    shapes = [(B, T, D), (D, H * K), (D, H * K), (D, H * V), (H * V, D)]
    arguments = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    text = compiled_text(name, functools.partial(mixed, H), *arguments)
    assert text.count('custom_call_target="tpu_custom_call"') == 3
    tokens = {f"{B},{T},{H * size}" for size in (K, V)} | {f"{B},{T},{H},{size}" for size in (K, V)}
    entry = text[text.index("\nENTRY ") :]  # in fusions nothing is written between
    assert (tokens | {f"{B},{H},{size},{T}" for size in (K, V)}).isdisjoint(COPIED.findall(entry))


@needs_libtpu
@pytest.mark.long
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("sizes", [(8, 112), (24, 128), (32, 128)], ids=str)
@pytest.mark.parametrize("name", SLICES)
def test_each_generation_compiles_them(name, sizes, dtype):
    """Packed documents, states and their gradients included."""
    B, T, H, (K, V) = 2, 300, 8, sizes
    arrays = [*((B, T, H, size) for size in (K, K, V)), (B, H, expanded_dim(K), V + 1)]
    *qkv, state = (jax.ShapeDtypeStruct(x, y) for x, y in zip(arrays, [dtype] * 3 + ["float32"], strict=True))

    def total(q, k, v, state, ids):
        o, after = attend("tpu", ids)(q, k, v, state)
        return o.astype(jnp.float32).sum() + after.sum()

    text = compiled_text(name, jax.grad(total, (0, 1, 2, 3)), *qkv, state, jax.ShapeDtypeStruct((B, T), jnp.int32))
    assert text.count('custom_call_target="tpu_custom_call"') == 3
