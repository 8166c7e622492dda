"""Taylor attention's Triton kernels as far as a CPU can tell: packing, refusals, lowering, and the interpreter."""

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
from based_jax.ops.calls import LinearAttentionCall
from based_jax.ops.taylor import IMPLEMENTATIONS, expanded_dim, taylor_attention
from based_jax.ops.triton import taylor as triton_taylor
from pallas_kernels.triton import taylor_features
from pallas_kernels.triton.launch import shared_bytes


def inputs(normal, B, T, H, K, V, dtype="float32"):
    return [normal(B, T, H, size, dtype=dtype) for size in (K, K, V)]


def attend(impl="triton_chunks", **options):
    return lambda q, k, v: taylor_attention(q, k, v, impl=impl, **options)[0]


@pytest.fixture
def interpreted(monkeypatch):
    """Run the kernels in their interpreter, in fp32 too."""
    triton_interpreter.interpret(monkeypatch)
    everywhere = dispatch.Implementation(triton_taylor.compute)
    monkeypatch.setitem(IMPLEMENTATIONS, "triton_chunks", everywhere)


@pytest.mark.parametrize("K", [1, 9, 16])
def test_every_feature_has_a_row_of_its_own(K):
    places = taylor_features.packed_places(K)
    assert len(set(places)) == len(places) == expanded_dim(K)
    assert not set(places) & set(range(taylor_features.FIRST_EMPTY, taylor_features.FIRST_CHANNEL))


@parametrize_some(
    "B, T, H, K, V, packed, with_state, dtype, tolerance",
    [
        (*sizes, *precision)
        for sizes in (
            (2, 130, 2, 16, 64, False, True),
            (6, 100, 2, 16, 112, True, True),
            (3, 70, 1, 8, 24, True, True),
            (1, 70, 1, 16, 72, False, True),
            (1, 7, 2, 5, 8, False, False),
        )
        for precision in (("float32", 1e-5), ("bfloat16", 1e-2))
    ],
    {
        (3, 70, 1, 8, 24, True, True, "float32", 1e-5),
        (1, 70, 1, 16, 72, False, True, "bfloat16", 1e-2),
        (1, 7, 2, 5, 8, False, False, "float32", 1e-5),
    },
)
def test_kernels_equal_the_oracle(
    normal, packed_ids, out_and_grads, interpreted, B, T, H, K, V, packed, with_state, dtype, tolerance
):
    ids = np.roll(packed_ids(T), -3, axis=0)[:B] if packed else None  # padding on either side, between, and alone
    state = jax.jit(lambda *qkv: taylor_attention(*qkv, impl="xla_chunks")[1])(*inputs(normal, B, 5, H, K, V))
    arguments, do = (*inputs(normal, B, T, H, K, V, dtype), state), normal(B, T, H, V)
    dlast = normal(*state.shape, scale=0.1)

    def run(impl, *arguments):
        def call(q, k, v, state):
            return taylor_attention(q, k, v, state=state if with_state else None, segment_ids=ids, impl=impl)

        return jax.tree.leaves(out_and_grads(call, arguments, (np.asarray(do, arguments[2].dtype), dlast)))

    exact = run("oracle", *(np.asarray(x, np.float32) for x in arguments))
    for ours, right in zip(run("triton_chunks", *arguments), exact, strict=True):
        ours, right = (np.asarray(x, np.float64) for x in (ours, right))
        assert np.linalg.norm(ours - right) <= tolerance * np.linalg.norm(right)


def test_a_token_alone_has_its_value_and_no_scores_to_learn(normal, out_and_grads, interpreted):
    """Sums are of rounded numbers, but of the same ones with values and without."""
    arguments, do = inputs(normal, 1, 5, 1, 16, 16, "bfloat16"), normal(1, 5, 1, 16, dtype="bfloat16")
    o, (dq, dk, _) = out_and_grads(attend(segment_ids=jnp.arange(1, 6)[None]), arguments, do)
    np.testing.assert_array_equal(o, arguments[2])
    assert max(np.abs(np.asarray(x, np.float32)).max() for x in (dq, dk)) < 1e-4


def test_lanes_are_what_each_is_alone(normal, out_and_grads, interpreted):
    lanes, cotangent = [inputs(normal, 1, 9, 1, 4, 8) for _ in range(2)], np.asarray(normal(2, 1, 9, 1, 8))
    together = out_and_grads(jax.vmap(attend()), [np.stack(x) for x in zip(*lanes, strict=True)], cotangent)
    for i, arguments in enumerate(lanes):
        alone = out_and_grads(attend(), arguments, cotangent[i])
        for ours, right in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(np.asarray(ours)[i], right, rtol=1e-4, atol=1e-5)


def test_devices_take_their_rows_and_heads(normal, out_and_grads, interpreted, monkeypatch):
    monkeypatch.setattr(jax, "shard_map", functools.partial(jax.shard_map, check_vma=False))  # for the interpreter
    arguments, cotangent = inputs(normal, 2, 9, 2, 4, 8), normal(2, 9, 2, 8)
    call = attend(segment_ids=np.int32([[1] * 9, [1] * 3 + [0] * 2 + [2] * 4]))
    alone = out_and_grads(call, arguments, cotangent)
    with jax.set_mesh(parallel.make_mesh({"data": 2, "tensor": 2}, devices=jax.devices()[:4])):
        together = out_and_grads(call, arguments, cotangent)
    for ours, right in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(ours, right, rtol=1e-4, atol=1e-5)


def lowered(kind, sizes=(4, 100, 4, 16, 112), **mesh):
    """Return what forward and gradients are lowered to for such GPUs."""
    B, T, H, K, V = sizes
    q, v = (jnp.zeros((B, T, H, size), jnp.bfloat16) for size in (K, V))

    def total(q, k, v):
        return attend(segment_ids=jnp.ones((B, T), jnp.int32))(q, k, v).astype(jnp.float32).sum()

    with gpus(kind, **mesh):
        traced = jax.jit(jax.value_and_grad(total, (0, 1, 2))).trace(q, q, v)
        return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    "kind, times, names",
    [
        ("NVIDIA A100-SXM4-80GB", (63, 64, 4096), ["xla_quadratic", "triton_chunks", "triton_chunks"]),
        ("NVIDIA V100", (64, 4096), ["xla_quadratic", "xla_chunks"]),
        ("NVIDIA H200", (64,), ["hopper_chunks"]),
    ],
)
def test_auto_takes_them_where_there_is_nothing_faster(kind, times, names):
    def taken(T):
        q, v = (jnp.zeros((1, T, 1, size), jnp.bfloat16) for size in (16, 64))
        return dispatch.choose("taylor_attention", IMPLEMENTATIONS, "auto", LinearAttentionCall(q, q, v))

    with gpus(kind):
        assert [taken(T) for T in times] == names


@pytest.mark.parametrize("kind", [pytest.param("NVIDIA A100-SXM4-80GB", marks=pytest.mark.long), "NVIDIA L40S"])
def test_two_programs_share_a_multiprocessor(kind, monkeypatch):
    kernels = cuda_plugin.compiled_kernels(monkeypatch)
    lowered(kind)
    passes = ["states", "states", "outputs", "query_gradients", "key_gradients"]
    assert sorted(kernel.name for kernel in kernels) == sorted(f"taylor_{name}" for name in passes)
    with gpus(kind):
        assert max(kernel.shared_bytes for kernel in kernels) <= shared_bytes() // 2


def test_each_device_has_its_rows_and_heads(monkeypatch):
    cuda_plugin.without_code(monkeypatch)
    kernels = lowered("NVIDIA H200", shape=(2, 2), names=("data", "tensor")).splitlines()
    kernels = [line for line in kernels if "@triton_kernel_call" in line]
    assert len(kernels) == 5 and all("tensor<2x100x2x16xbf16>" in line for line in kernels)


@pytest.mark.parametrize(
    "changed, reason",
    [
        ({"dtype": "float32"}, "q, k and v must be bfloat16, and are float32"),
        ({"K": 17}, "K must be at most 16, and is 17"),
        ({"B": 0}, "no dimension may be empty, and q is"),
    ],
)
def test_says_what_it_does_not_take(changed, reason):
    sizes = {"B": 1, "K": 16, "dtype": "bfloat16"} | changed
    q, v = (jnp.zeros((sizes["B"], 8, 1, size), sizes["dtype"]) for size in (sizes["K"], 64))
    with gpus(), pytest.raises(UserError, match=reason):
        attend()(q, q, v)


def test_needs_a_gpu():
    x = jnp.zeros((1, 8, 1, 16), "bfloat16")
    with pytest.raises(UserError, match="it needs cuda, and this is cpu"):
        attend()(x, x, x)
