"""The delta rule's Hopper kernels by chunks as far as a CPU can tell: refusals, lowering, and the interpreter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.cases import parametrize_some
from helpers.devices import gpus
from helpers.interpreted import replace_products
from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import get_races
from jax.experimental.pallas import mosaic_gpu as plgpu

from based_jax.ops import delta_rule, segments
from based_jax.ops.calls import MatrixStateCall
from based_jax.ops.hopper import delta_rule as hopper_delta_rule
from pallas_kernels.hopper import inverses


def call_of(T=256, K=128, V=128, dtype=jnp.bfloat16, B=2, H=2, decays=1):
    q, v = (jnp.zeros((B, T, H, size), dtype) for size in (K, V))
    return MatrixStateCall(q, q, v, jnp.zeros((B, T, H, decays)), beta=jnp.zeros((B, T, H)))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (call_of(K=136, decays=136), "at most 128, and is 136"),
        (call_of(dtype=jnp.float32), "bfloat16, and is float32"),
        (call_of(K=264), "at most 256, and is 264"),
        (call_of(T=0), "may be empty"),
    ],
)
def test_refusals_name_the_value(call, words):
    with gpus():
        assert words in hopper_delta_rule.supports(call)
        assert hopper_delta_rule.supports(call_of(T=1, K=70, V=300)) is None


def test_other_devices_are_refused():
    with gpus("NVIDIA A100-SXM4-80GB"):
        assert "A100" in hopper_delta_rule.supports(call_of())


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (call_of(T=63), "less than a chunk of 64"),
        (call_of(K=64), "here are 64 and 128"),
        (call_of(V=64), "here are 128 and 64"),
    ],
)
def test_short_and_narrow_calls_are_left_to_others(call, words):
    with gpus():
        assert words in hopper_delta_rule.slower(call)
        assert hopper_delta_rule.slower(call_of(T=64, K=65, V=65)) is None


def _through_both_passes(call):
    def run(*given):
        out, pull = jax.vjp(call, *given)
        return out, pull(jax.tree.map(jnp.ones_like, out))

    return run


@parametrize_some("decays", [1, 100], [1])
def test_lanes_of_shards_lower_for_an_h100(decays):
    given = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (
            *(((2, 70, 2, size), jnp.bfloat16) for size in (100, 100, 130)),
            *(((2, 70, 2, *rest), jnp.float32) for rest in ((decays,), ())),
        )
    ]
    both = _through_both_passes(lambda *x: delta_rule.delta_rule(*x, impl="hopper_chunks"))
    lanes = [jax.ShapeDtypeStruct((3, *x.shape), x.dtype) for x in given]
    with gpus(shape=(2,)):
        text = jax.jit(jax.vmap(both)).trace(*lanes).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu_v2") == 4


# (T, H, K, V, decays): one chunk, filled up; more chunks than are taken at once; several parts of keys and strips of
# values. Decays of channels are up to e^8 a token, and as small as e^-8.
CASES = [
    (50, 1, 100, 70, 1),
    (50, 1, 100, 70, 100),
    (200, 1, 128, 128, 1),
    (70, 2, 256, 256, 1),
    (200, 1, 128, 128, 128),
    (70, 2, 64, 256, 64),
]


@parametrize_some("T, H, K, V, decays", CASES, CASES[:2])
def test_they_equal_the_oracle(T, H, K, V, decays, normal, packed_ids, out_and_grads, interpreted_chunks):
    k = normal(1, T, H, K)
    k = (k / jnp.linalg.norm(k, axis=-1, keepdims=True)).astype(jnp.bfloat16)
    q, v, do = (normal(1, T, H, size, dtype="bfloat16") for size in (K, V, V))
    g, beta = -jnp.exp((2 if decays == 1 else 3) * normal(1, T, H, decays)), 2 * jax.nn.sigmoid(normal(1, T, H))
    state, dstate = normal(1, H, K, V), normal(1, H, K, V)
    ids = packed_ids(T)[4:5] if T < 64 else None  # documents, and padding between them

    def kernels(*given):
        *given, state = given
        numbers = None if ids is None else segments.numbered(ids)
        call = MatrixStateCall(*given[:4], beta=given[4], scale=K**-0.5, state=state, segment_ids=numbers)
        return hopper_delta_rule.compute(call)

    def oracle(*given):
        *given, state = given
        return delta_rule.delta_rule(*given, state=state, segment_ids=ids, impl="xla_steps")

    given = q, k, v, g, beta, state
    got = out_and_grads(kernels, given, (do, dstate))
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), (given, do))
    right = out_and_grads(oracle, wide[0], (wide[1], dstate))
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(right), strict=True):
        x, y = (np.asarray(z, np.float64) for z in (x, y))
        assert np.linalg.norm(x - y) < 5e-3 * np.linalg.norm(y)
    assert not get_races().races_found


class _Tile:
    """What a function that saves to shared memory and multiplies with it asks of a tile."""

    dtype = jnp.dtype(jnp.bfloat16)

    def __setitem__(self, _, value):
        self.value = value

    def __getitem__(self, _):
        return self.value


@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("spread", [10.0, 0.3, 0.02])
def test_inverses_are_rounded_once_however_much_keys_agree(beta, spread, rng, monkeypatch):
    """Products of bf16 alone are wrong by up to 5e-2 where keys agree and rates are 2."""
    replace_products(monkeypatch)

    def places(columns=64):
        return tuple(jax.lax.broadcasted_iota(jnp.int32, (64, columns), i) for i in range(2))

    monkeypatch.setattr(inverses, "places", places)
    monkeypatch.setattr(plgpu, "commit_smem", lambda: None)
    k = rng.normal(size=(1, 64)) + spread * rng.normal(size=(64, 64))
    k /= np.linalg.norm(k, axis=1, keepdims=True)
    M = np.float32(beta * np.tril(k @ k.T, -1))
    right = np.linalg.inv(np.eye(64) + M)
    for inverse, tiles in ((inverses.inverse, 2), (inverses.inverse_by_strips, 4)):
        got = jax.jit(lambda M, inverse=inverse, tiles=tiles: inverse(M, *(_Tile() for _ in range(tiles))))(M)
        assert np.linalg.norm(got - right) < 3e-3 * np.linalg.norm(right)
