"""Triton kernels by chunks of tokens as far as a CPU can tell: refusals, lowering for an H100, the interpreter."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import cuda_plugin, triton_interpreter
from helpers.cases import parametrize_some
from helpers.devices import gpus

from based_jax import parallel
from based_jax.errors import UserError
from based_jax.ops import dispatch
from based_jax.ops.delta_rule import delta_rule, dplr
from based_jax.ops.gated_linear_attention import gated_linear_attention
from based_jax.ops.triton import chunks
from pallas_kernels.triton.launch import shared_bytes


def linear(q, k, v, g, beta, **options):
    return gated_linear_attention(q, k, v, g, **options)


def low_rank(q, k, v, g, beta, **options):
    """Read and write in other directions than the keys'."""
    direction, rate = jnp.roll(k, 1, axis=-1).astype(jnp.float32), beta[..., None]
    return dplr(q, k, v, g, direction * jnp.exp(g / 2), -rate * direction, **options)


FORMS = {
    "delta rule": delta_rule,
    "linear attention": linear,
    "delta rule, decays of channels": delta_rule,
    "linear attention, decays of channels": linear,
    "low rank, decays of channels": low_rank,
}
REPRESENTATIVES = "linear attention", "delta rule, decays of channels"
"""The least and nearly the most of what the kernels do; the interpreter takes long for the others."""


def forms_where(chosen=lambda form: True):
    """Return the parametrisation over forms, all but the representatives long."""
    marks = {form: () if form in REPRESENTATIVES else pytest.mark.long for form in FORMS if chosen(form)}
    return pytest.mark.parametrize("form", [pytest.param(form, marks=marks[form]) for form in marks])


forms = forms_where()


def inputs(normal, form, B, T, H, K, V, dtype="float32", correlated=0.0):
    """Return q, k of length 1, v, log-decays from 0 down, and rates."""
    k = np.asarray(normal(B, T, H, K)) + correlated
    k = k / np.linalg.norm(k, axis=-1, keepdims=True)
    q, k, v = (np.asarray(x, jnp.dtype(dtype)) for x in (normal(B, T, H, K), k, normal(B, T, H, V)))
    return q, k, v, -np.square(normal(B, T, H, decays(form, K))), 1 / (1 + np.exp(-1 - np.asarray(normal(B, T, H))))


def outputs(form, impl="triton_chunks", **options):
    """Return a form as a function of its inputs to its outputs alone."""
    return lambda *arguments: FORMS[form](*arguments, impl=impl, **options)[0]


def decays(form, K):
    """Return the decays of a head."""
    return K if "channels" in form else 1


@pytest.fixture
def interpreted(monkeypatch):
    """Run the kernels in their interpreter, in fp32 too."""
    triton_interpreter.interpret(monkeypatch)
    monkeypatch.setattr(chunks, "supports", lambda *_: None)
    monkeypatch.setattr(dispatch, "target_platform", lambda: "cuda")


@forms
@parametrize_some(
    "B, T, H, K, V, packed, with_state, correlated, dtype, tolerance",
    [
        (*sizes, *precision)
        for sizes in (
            (2, 130, 2, 32, 64, False, True, 0.0),
            (6, 100, 2, 24, 40, True, True, 0.0),
            (1, 70, 1, 24, 40, True, True, 0.0),
            (1, 64, 1, 64, 128, False, False, 5.0),
            (2, 7, 3, 16, 8, False, True, 0.0),
        )
        for precision in (("float32", 1e-4), ("bfloat16", 1e-2))
    ],
    {
        (1, 70, 1, 24, 40, True, True, 0.0, "float32", 1e-4),
        (1, 64, 1, 64, 128, False, False, 5.0, "bfloat16", 1e-2),
        (2, 7, 3, 16, 8, False, True, 0.0, "float32", 1e-4),
    },
)
def test_kernels_equal_the_oracle(
    normal,
    packed_ids,
    out_and_grads,
    interpreted,
    form,
    B,
    T,
    H,
    K,
    V,
    packed,
    with_state,
    correlated,
    dtype,
    tolerance,
):
    arguments = (*inputs(normal, form, B, T, H, K, V, dtype, correlated), np.asarray(normal(B, H, K, V)))
    ids = np.roll(packed_ids(T), 2, axis=0)[:B] if packed else None
    do, dlast = normal(B, T, H, V), normal(B, H, K, V)

    def run(impl, *arguments):
        def call(q, k, v, g, beta, state):
            state = state if with_state else None
            options = {"scale": 0.3, "state": state, "segment_ids": ids, "impl": impl}
            return FORMS[form](q, k, v, g, beta, **options)

        return jax.tree.leaves(out_and_grads(call, arguments, (np.asarray(do, arguments[2].dtype), dlast)))

    if correlated:  # gradients of alike keys cancel
        tolerance = 2 * tolerance
    exact = run("oracle", *(x.astype(np.float32) for x in arguments))
    for ours, right in zip(run("triton_chunks", *arguments), exact, strict=True):
        ours, right = (np.asarray(x, np.float64) for x in (ours, right))
        assert np.linalg.norm(ours - right) <= tolerance * np.linalg.norm(right)


@forms_where(lambda form: form.startswith("delta"))
@pytest.mark.parametrize("rate", [*(pytest.param(rate, marks=pytest.mark.long) for rate in (0.0, 1.0)), 2.0])
def test_similar_keys_that_nothing_decays_are_solved_for(normal, out_and_grads, interpreted, form, rate):
    q, k, v, g, beta = inputs(normal, form, 1, 130, 1, 32, 64, correlated=5.0)
    arguments, cotangent = (q, k, v, 0 * g, np.full_like(beta, rate)), normal(1, 130, 1, 64)
    found, right = (
        jax.tree.leaves(out_and_grads(outputs(form, impl), arguments, cotangent))
        for impl in ("triton_chunks", "oracle")
    )
    for ours, exact in zip(found, right, strict=True):
        assert np.linalg.norm(ours - exact) <= 1e-4 * np.linalg.norm(exact)


def test_rates_from_nothing_to_two_and_keys_in_two_pieces(normal, packed_ids, out_and_grads, interpreted):
    q, k, v, g, beta = inputs(normal, "delta rule", 1, 70, 1, 136, 72)
    beta[:, ::3], beta[:, 1::5], ids = 0.0, 2.0, np.asarray(packed_ids(70))[1:2]
    arguments, cotangents = (q, k, v, g, beta, normal(1, 1, 136, 72)), (normal(1, 70, 1, 72), normal(1, 1, 136, 72))

    def run(impl):
        def call(*arguments):
            return delta_rule(*arguments[:5], state=arguments[5], segment_ids=ids, impl=impl)

        return jax.tree.leaves(out_and_grads(call, arguments, cotangents))

    for ours, right in zip(run("triton_chunks"), run("oracle"), strict=True):
        assert np.linalg.norm(ours - right) <= 1e-4 * np.linalg.norm(right)


@forms
@pytest.mark.parametrize(
    "places, decay",
    [
        pytest.param([0, 40, 63], -500.0, marks=pytest.mark.long),
        ([40], -np.inf),
        pytest.param(range(70), -6.0, marks=pytest.mark.long),
        pytest.param(range(70), -100.0, marks=pytest.mark.long),
    ],
)
def test_what_decays_at_once_is_forgotten(normal, out_and_grads, interpreted, form, places, decay):
    q, k, v, g, beta = inputs(normal, form, 1, 70, 1, 16, 64)
    g[:, np.asarray(places)] = decay
    arguments, cotangent = (q, k, v, g, beta), normal(1, 70, 1, 64)
    found, right = (
        jax.tree.leaves(out_and_grads(outputs(form, impl), arguments, cotangent))
        for impl in ("triton_chunks", "oracle")
    )
    for ours, exact in zip(found, right, strict=True):
        np.testing.assert_allclose(ours, exact, atol=1e-5 + 1e-4 * np.abs(exact).max())


@parametrize_some("form", FORMS, REPRESENTATIVES[:1])
def test_lanes_are_what_each_is_alone(normal, out_and_grads, interpreted, form):
    lanes = [inputs(normal, form, 2, 70, 2, 16, 64) for _ in range(3)]
    cotangent = np.asarray(normal(3, 2, 70, 2, 64))
    call = outputs(form)
    together = out_and_grads(jax.vmap(call), [np.stack(x) for x in zip(*lanes, strict=True)], cotangent)
    for i, arguments in enumerate(lanes):
        alone = out_and_grads(call, arguments, cotangent[i])
        for ours, right in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(np.asarray(ours)[i], right, rtol=1e-4, atol=1e-5)


@parametrize_some("form", FORMS, REPRESENTATIVES[:1])
def test_devices_take_their_rows_and_heads(normal, out_and_grads, interpreted, monkeypatch, form):
    monkeypatch.setattr(jax, "shard_map", functools.partial(jax.shard_map, check_vma=False))  # for the interpreter
    arguments, cotangent = inputs(normal, form, 4, 70, 2, 16, 64), normal(4, 70, 2, 64)
    ids = np.sort(np.arange(70) % 3 + np.arange(4)[:, None] % 2, axis=1).astype(np.int32)
    call = outputs(form, segment_ids=ids)
    alone = out_and_grads(call, arguments, cotangent)
    with jax.set_mesh(parallel.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})):
        together = out_and_grads(call, arguments, cotangent)
    for ours, right in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(ours, right, rtol=1e-4, atol=1e-5)


@forms
@pytest.mark.parametrize(
    "way", [pytest.param("alone", marks=pytest.mark.long), pytest.param("lanes", marks=pytest.mark.long), "mesh", "x64"]
)
@pytest.mark.parametrize("K, V", [(32, 64), *(pytest.param(K, 256, marks=pytest.mark.long) for K in (128, 256))])
def test_lowers_for_an_h100(form, way, K, V, monkeypatch):
    """Alone down to code; the other ways are calls of the same kernels."""
    if way != "alone":
        cuda_plugin.without_code(monkeypatch)
    arguments = [jnp.zeros(x, "bfloat16") for x in ((4, 128, 2, K), (4, 128, 2, K), (4, 128, 2, V))]
    arguments += [jnp.zeros((4, 128, 2, decays(form, K))), jnp.zeros((4, 128, 2))]

    def call(*arguments):
        def total(*arguments):
            return outputs(form)(*arguments).astype(jnp.float32).sum()

        return jax.value_and_grad(total, tuple(range(5)))(*arguments)

    mesh = {"shape": (2, 2), "names": ("data", "tensor")} if way == "mesh" else {}
    with gpus(**mesh), jax.enable_x64(way == "x64"):
        if way == "lanes":
            call, arguments = jax.vmap(call), [jnp.stack([x] * 3) for x in arguments]
        text = jax.jit(call).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text(debug_info=True)
    walks = "forward", "reverse"
    if "channels" in form:
        more = "sums", "products", "pair_gradients", "state_gradients", "token_gradients", "gradients"
        kernels = [f"channel_decays_{name}" for name in (*walks, *more)]
    elif form == "delta rule":
        more = "products", "outputs", "pair_gradients", "gradients"
        kernels = [f"delta_rule_{name}" for name in (*walks, *more)]
    else:
        kernels = [f"one_decay_{name}" for name in (*walks, "gradients")]
    kernels += [] if "linear" in form else ["inverses_of_halves", "inverses_of_chunks"]
    assert [name for name in kernels if name not in text] == []


@parametrize_some(
    "form, K, V", [(form, 256, 512) for form in FORMS] + [(REPRESENTATIVES[0], 64, 64)], {(REPRESENTATIVES[0], 64, 64)}
)
def test_they_fit_into_the_memory_of_ada(form, K, V, monkeypatch):
    kernels = cuda_plugin.compiled_kernels(monkeypatch)
    shapes = (64, 64, 2, K), (64, 64, 2, K), (64, 64, 2, V), (64, 64, 2, decays(form, K)), (64, 64, 2)
    arguments = [jnp.zeros(x, "bfloat16" if n < 3 else "float32") for n, x in enumerate(shapes)]

    def total(*arguments):
        return outputs(form)(*arguments).astype(jnp.float32).sum()

    with gpus("NVIDIA L40S"):
        jax.jit(jax.grad(total, tuple(range(5)))).trace(*arguments).lower(lowering_platforms=("cuda",))
        assert kernels and max(kernel.shared_bytes for kernel in kernels) <= shared_bytes()


@pytest.mark.parametrize(
    "changed, reason",
    [
        ({"dtype": "float32"}, "v must be bfloat16, and is float32"),
        ({"K": 320}, "K must be at most 256, and is 320"),
        ({"T": 0}, "none of its axes but the batch may be empty"),
    ],
)
def test_says_what_it_does_not_take(changed, reason):
    sizes = {"dtype": "bfloat16", "K": 32, "T": 8} | changed
    q, v = (jnp.zeros((1, sizes["T"], 1, size), sizes["dtype"]) for size in (sizes["K"], 64))
    with gpus(), pytest.raises(UserError, match=reason):
        delta_rule(q, q, v, jnp.zeros((1, sizes["T"], 1, 1)), jnp.zeros((1, sizes["T"], 1)), impl="triton_chunks")


@forms
def test_needs_a_gpu(form):
    x = jnp.zeros((1, 8, 1, 16), "bfloat16")
    with pytest.raises(UserError, match="it needs cuda, and this is cpu"):
        FORMS[form](x, x, x, jnp.zeros((1, 8, 1, decays(form, 16))), jnp.zeros((1, 8, 1)), impl="triton_chunks")
