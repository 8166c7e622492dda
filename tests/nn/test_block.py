import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.cases import parametrize_some
from helpers.devices import gpus
from helpers.small_mixers import SMALL
from jax._src.ad_checkpoint import saved_residuals

from based_jax.errors import UserError
from based_jax.nn import block, projections
from based_jax.nn.block import REMAT_POLICIES, Block, Stack, Stream, repeating_patterns
from based_jax.nn.lm import LMConfig
from based_jax.ops import dispatch

D, T = 16, 9
PATTERN = (("conv", {}), ("taylor", {"num_heads": 2, "feature_dim": 4}))


def config(**options):
    return LMConfig(layers=PATTERN * 2, d_model=D, **options)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_residual_stream_is_fp32(dtype, normal):
    block, r = Block(*PATTERN[0], config(dtype=dtype), rngs=nnx.Rngs(0)), normal(2, T, D)
    out = jax.jit(lambda block, r: block.extend(Stream(r)).total())(block, r)
    stream, cache = jax.jit(lambda block, r: block.prefill(Stream(r), block.init_cache(2, T)))(block, r)
    stepped, _ = jax.jit(lambda block, r, cache: block.step(Stream(r), cache))(block, r[:, 0], cache)
    assert {x.dtype for x in (out, stream.total(), stepped.total())} == {jnp.dtype("float32")}
    assert cache.state.dtype == dtype
    assert not np.array_equal(out, out.astype(jnp.bfloat16))


@pytest.mark.parametrize("eps", [1e-5, 0.3])
def test_block_adds_mixer_and_mlp_of_the_normed_stream(eps, normal, close):
    block, r = Block(*PATTERN[1], config(dtype="float32", norm_eps=eps), rngs=nnx.Rngs(0)), normal(2, T, D)

    @jax.jit
    def by_hand(block, r):
        def normed(x):
            return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + eps)

        r = r + block.mixer(normed(r))
        value, gate = jnp.split(normed(r) @ block.mlp.fc1.kernel[...], 2, axis=-1)
        return r + (value * gate / (1 + jnp.exp(-gate))) @ block.mlp.fc2.kernel[...]

    close(jax.jit(lambda block, r: block.extend(Stream(r)).total())(block, r), by_hand(block, r))


def through(graphdef, params, r, y=None):
    return nnx.merge(graphdef, params).extend(Stream(r, y)).total()


@pytest.mark.parametrize("repeats", [1, pytest.param(2, marks=pytest.mark.long)])
def test_remat_changes_neither_values_nor_gradients(repeats, normal, out_and_grads, close):
    r, y, cotangent = normal(2, T, D), normal(2, T, D), normal(2, T, D)
    results = {}
    for remat in REMAT_POLICIES:
        stack = Stack(PATTERN, repeats, config(dtype="float32", remat=remat), rngs=nnx.Rngs(0))
        graphdef, params = nnx.split(stack)
        results[remat] = out_and_grads(functools.partial(through, graphdef), (params, r, y), cotangent)
    for remat in REMAT_POLICIES:
        close(results[remat], results["none"], what=remat)


def test_layers_in_a_row_are_those_of_a_loop(normal, out_and_grads, close, monkeypatch):
    r, cotangent = normal(2, T, D), normal(2, T, D)
    graphdef, params = nnx.split(Stack(PATTERN, 3, config(dtype="float32", remat="auto"), rngs=nnx.Rngs(0)))

    def run():
        call = functools.partial(through, graphdef)
        text = str(jax.make_jaxpr(jax.grad(lambda params: jnp.sum(call(params, r))))(params))
        return text, out_and_grads(call, (params, r), cotangent)

    text, looped = run()
    assert re.search(r"scan\[(.*\n)*?.* unroll=1\b", text) and "remat" in text
    monkeypatch.setattr(block, "target_platform", lambda: "cuda")
    text, in_a_row = run()
    assert re.findall(r"\bunroll=(\d)", text) == ["3", "3"] and "remat" not in text
    close(in_a_row, looped, what="in a row")


def test_full_remat_keeps_less_than_none():
    def residuals(remat):
        stack = nnx.eval_shape(lambda: Stack(PATTERN[:1], 4, config(dtype="float32", remat=remat), rngs=nnx.Rngs(0)))
        graphdef, params = nnx.split(stack)
        r = jax.ShapeDtypeStruct((8, 256, D), jnp.float32)
        loss = jax.grad(lambda p, r: jnp.sum(through(graphdef, p, r)))
        return jax.jit(loss).lower(params, r).compile().memory_analysis().temp_size_in_bytes

    assert residuals("full") < residuals("dots") < residuals("none")


def test_full_remat_keeps_the_sum_of_the_stream_alone():
    stack = nnx.eval_shape(lambda: Stack(PATTERN, 1, config(remat="full"), rngs=nnx.Rngs(0)))
    graphdef, params = nnx.split(stack)
    r, y = (jax.ShapeDtypeStruct((8, 256, D), dtype) for dtype in ("float32", "bfloat16"))
    kept = saved_residuals(functools.partial(through, graphdef), params, r, y)
    assert [x.dtype for x, _ in kept if x.shape == r.shape] == [jnp.float32]


def test_stacked_blocks_differ_and_carry_the_layer_axis():
    stack = Stack(PATTERN, 3, config(), rngs=nnx.Rngs(0))
    kernel = stack.blocks[1].mixer.proj_q.kernel
    assert kernel.shape == (3, D, 8)
    assert kernel.get_metadata()["out_sharding"] == ("layers", "embed", "heads")
    assert len({float(x) for x in np.asarray(kernel[...])[:, 0, 0]}) == 3


def test_arrays_of_another_number_of_repeats_are_refused():
    """Parameters that `nnx.update` put in, and caches."""
    stack, other = (Stack(PATTERN, repeats, config(), rngs=nnx.Rngs(0)) for repeats in (2, 3))
    r, cache = jnp.zeros((1, T, D)), stack.init_cache(1, T)
    with pytest.raises(UserError, match=r"cache '0/state' .* repeated 2 times has shape \(3, .*its first axis is 2\.$"):
        stack.step(Stream(r[:, 0]), other.init_cache(1, T))
    nnx.update(stack, nnx.state(other))
    for call in (lambda: stack.extend(Stream(r)), lambda: stack.prefill(Stream(r), cache)):
        with pytest.raises(UserError, match=r"parameter '0/.*' of a pattern .* 2 times has shape \(3,"):
            call()
    single = Stack(PATTERN, 1, config(), rngs=nnx.Rngs(0))
    nnx.update(single, nnx.state(other))
    with pytest.raises(UserError, match=r"not repeated has stacked arrays: its norm's scale is \(3, 16\)\.$"):
        single.extend(Stream(r))


def based(layers, taylor):
    return ["taylor" if i in taylor else "window" if i - 1 in taylor else "conv" for i in range(layers)]


@pytest.mark.parametrize(
    ("layers", "groups"),
    [
        ("a", [("a", 1)]),
        ("ab", [("a", 1), ("b", 1)]),
        ("aaaa", [("a", 4)]),
        ("abab", [("ab", 2)]),
        ("aabaab", [("aab", 2)]),
        ("abbbba", [("a", 1), ("b", 4), ("a", 1)]),
        ("abcabcab", [("abc", 2), ("a", 1), ("b", 1)]),
    ],
)
def test_repeating_patterns(layers, groups):
    assert repeating_patterns(layers) == groups


def test_repeating_patterns_of_the_reference_models():
    small = repeating_patterns(based(27, range(1, 22, 5)))
    assert [(len(pattern), repeats) for pattern, repeats in small] == [(5, 5), (1, 2)]
    large = repeating_patterns(based(36, (1, 6, 11, 16, 21, 27, 33)))
    assert sum(len(pattern) for pattern, _ in large) <= 13
    assert repeating_patterns(["attention"] * 24) == [(["attention"], 24)]


def test_repeating_patterns_put_together_are_the_layers(rng):
    for _ in range(200):
        layers = list(rng.integers(0, 3, size=rng.integers(1, 30)))
        groups = repeating_patterns(layers)
        assert [x for pattern, repeats in groups for x in list(pattern) * repeats] == layers


@pytest.mark.parametrize(("norm", "operation"), [("rms", "few_tokens_residual_norm"), ("layer", "residual_layer_norm")])
def test_the_norm_behind_a_decode_step_s_layer_computes_its_last_product(norm, operation):
    """On a GPU; no block leaves its sum to a product of its own, which RMS norm would not read."""
    stack = Stack(PATTERN, 1, config(norm=norm), rngs=nnx.Rngs(0))
    with gpus(), dispatch.recorded_choices() as choices:
        stream, _ = jax.eval_shape(lambda r: stack.step(Stream(r), stack.init_cache(3, T)), jnp.zeros((3, D)))
    assert isinstance(stream.y, projections.Projected) and operation in choices
    assert ("residual_rms_norm" in choices) == ("few_tokens_residual_norm" in choices) == (norm == "rms")


@parametrize_some("kind", sorted({*SMALL, "conv"}), ["taylor"])
def test_every_mixer_takes_a_decode_step_on_a_gpu(kind):
    """What its layers leave to the norm behind them, it does not touch."""
    pattern = ((kind, SMALL.get(kind, {})),)
    stack = Stack(pattern, 1, LMConfig(layers=pattern, d_model=D), rngs=nnx.Rngs(0))
    with gpus():
        found = jax.eval_shape(lambda r: stack.step(Stream(r), stack.init_cache(3, T))[0].total(), jnp.zeros((3, D)))
    assert found == jax.ShapeDtypeStruct((3, D), jnp.float32)
