import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from based_jax import inside
from based_jax.errors import UserError
from based_jax.evals.evaluate import evaluate, model_sums
from based_jax.nn import multihead
from based_jax.nn.block import Stream
from based_jax.nn.lm import LM, LMConfig
from based_jax.nn.mixers import make_mixer

B, T, D = 2, 9, 16
LAYERS = (
    ("conv", {}),
    ("taylor", {"num_heads": 2, "feature_dim": 4}),
    ("window", {"num_heads": 2, "window": 4}),
    ("attention", {"num_heads": 4, "num_kv_heads": 2}),
)
MAPPED = LAYERS[1:]


def model_of(these=LAYERS, **options):
    config = LMConfig(these, D, vocab_size=32, init_std=0.3, dtype="float32", mlp="none", **options)
    return LM(config, rngs=nnx.Rngs(0))


@pytest.fixture
def ids(rng):
    return jax.device_put(rng.integers(0, 32, (B, T)).astype(np.int32))


@pytest.mark.parametrize(("kind", "options"), MAPPED, ids=[kind for kind, _ in MAPPED])
def test_a_map_of_values_is_what_the_mixer_gives(kind, options, normal, close):
    mixer, x = make_mixer(kind, D, std=0.4, out_std=0.4, rngs=nnx.Rngs(0), **options), normal(B, T, D)

    @jax.jit
    def both(mixer, x):
        _, _, v = mixer.qkv(x) if kind == "taylor" else mixer.rotated_qkv(x, jnp.zeros(1, jnp.int32), None)
        values = v if kind == "taylor" else mixer.for_each_query(v)
        weights = inside.attention_weights(mixer, x)
        o = jnp.einsum("BHTS,BSHV->BTHV", weights, values)
        return mixer.out_proj(multihead.merge_heads(o)), mixer(x), weights, inside.softmax_weights(mixer, x)

    by_map, whole, weights, softmax = both(mixer, x)
    close(by_map, whole)
    np.testing.assert_allclose(np.sum(weights, axis=-1), 1, rtol=1e-5)
    assert np.triu(weights, 1).max() == 0 and (kind != "window" or np.tril(weights, -4).max() == 0)
    apart = inside.total_variation(weights, softmax)
    assert np.all(apart > 1e-3) if kind == "taylor" else np.all(apart < 1e-5)


def test_measures_of_maps_that_are_known():
    here = np.eye(T, dtype=np.float32)[None, None]
    first = np.zeros((1, 1, T, T), np.float32)
    first[..., 0] = 1
    even = np.tril(np.ones((T, T), np.float32)) / np.arange(1, T + 1, dtype=np.float32)[:, None]
    maps = np.concatenate([here, first, even[None, None]], axis=1)
    np.testing.assert_allclose(inside.effective_range(maps), [0, (T - 1) / 2, (T - 1) / 4], rtol=1e-6)
    np.testing.assert_allclose(inside.entropy(maps), [0, 0, np.mean(np.log(np.arange(1, T + 1)))], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(inside.total_variation(maps[:, :1], maps[:, 1:2]), [1 - 1 / T], rtol=1e-6)


@pytest.mark.parametrize("scan_layers", [False, True], ids=["in a row", "scanned"])
def test_layers_one_by_one_are_the_model(scan_layers, ids, close):
    model = model_of(2 * LAYERS[:2], scan_layers=scan_layers)
    assert [block.kind for block in inside.blocks_of(model)] == ["conv", "taylor"] * 2
    assert len(inside.attention_maps(model, ids)) == 2

    @jax.jit
    def one_by_one(model, ids):
        r, read = model.embedded(ids), []
        for block in inside.blocks_of(model):
            read.append(block.norm1(r))
            r = r + block.mixer(read[-1])
        return read, model.norm(r)

    read, hidden = one_by_one(model, ids)
    close(inside.mixer_inputs(model, ids), read)
    close(jax.jit(lambda model, ids: model.hidden(ids))(model, ids), hidden)


@pytest.mark.parametrize("scan_layers", [False, True], ids=["in a row", "scanned"])
def test_a_model_without_a_layer_skips_its_block(scan_layers, ids, close):
    model = model_of(2 * LAYERS[:2], scan_layers=scan_layers, tie_embeddings=False)

    @jax.jit
    def skipped(model, ids):
        r = model.embedded(ids)
        for block in (block for i, block in enumerate(inside.blocks_of(model)) if i != 1):
            r = r + block.mixer(block.norm1(r))
        return model.logits(model.norm(r))

    left = inside.without_layer(model, 1)
    close(jax.jit(lambda model, ids: model(ids))(left, ids), skipped(model, ids))
    assert left.config.layers == (LAYERS[0], LAYERS[0], LAYERS[1])
    assert left.num_params() == model.num_params() - sum(
        leaf.size for leaf in jax.tree.leaves(nnx.state(inside.blocks_of(model)[1], nnx.Param))
    )


@pytest.mark.parametrize("scan_layers", [False, True], ids=["in a row", "scanned"])
def test_norms_of_states_are_those_of_caches(scan_layers, ids):
    model = model_of(2 * LAYERS[1:3], scan_layers=scan_layers)
    norms = np.asarray(inside.state_norms(model, ids))
    assert norms.shape == (B, T, 4)

    @jax.jit
    def caches_of(model, ids):
        stream, caches = Stream(model.embedded(ids)), []
        for block in inside.blocks_of(model):
            stream, cache = block.prefill(stream, block.init_cache(B, T))
            caches.append(cache)
        return caches

    for layer, cache in enumerate(caches_of(model, ids[:, :4])):
        floats = [x for x in jax.tree.leaves(cache.state) if jnp.issubdtype(x.dtype, jnp.floating)]
        expected = np.sqrt(sum(np.sum(np.square(np.asarray(x)).reshape(B, -1), axis=1) for x in floats))
        np.testing.assert_allclose(norms[:, 3, layer], expected, rtol=1e-5)


def test_the_layer_that_is_missed_most_stands_first(rng):
    model = model_of(LAYERS[:2])
    batches = [("own", {"inputs": (x := rng.integers(0, 32, (4, T)).astype(np.int32)), "labels": best(model, x)})]
    found = inside.removal_costs(model, batches)
    assert {(x.layer, x.kind) for x in found} == set(enumerate(kind for kind, _ in LAYERS[:2]))
    assert all(a.cost >= b.cost for a, b in itertools.pairwise(found)) and found[0].cost > 0
    left = evaluate(model_sums(inside.without_layer(model, found[0].layer)), batches)
    assert (found[0].accuracy, found[0].loss) == (left["accuracy"], left["loss"])
    np.testing.assert_allclose(found[0].cost, 1 - left["accuracy"])


def best(model, ids):
    """Return the tokens that the model itself holds for the likeliest, so that its accuracy is 1."""
    return np.asarray(jax.jit(lambda model, ids: model(ids))(model, ids))[..., :32].argmax(axis=-1).astype(np.int32)


def test_what_has_no_map_or_no_layer_is_refused_in_a_sentence(ids):
    convolutions = model_of(LAYERS[:1])
    with pytest.raises(UserError, match=r"^No layer of the model has an attention map; those of Attention, Window"):
        inside.attention_maps(convolutions, ids)
    with pytest.raises(UserError, match=r"^GatedConv has no attention map: it is no weighted mean of values\.$"):
        inside.attention_weights(inside.blocks_of(convolutions)[0].mixer, jnp.ones((1, 2, D)))
    with pytest.raises(UserError, match=r"^The input has 5000 tokens; maps are made of 4096 at most\.$"):
        inside.attention_weights(make_mixer("window", D, num_heads=2, rngs=nnx.Rngs(0)), jnp.ones((1, 5000, D)))
    with pytest.raises(UserError, match=r"^index is 1; the model has layers 0 to 0\.$"):
        inside.without_layer(convolutions, 1)
    with pytest.raises(UserError, match=r"^index is 0, and the model has no other layer; it keeps one at least\.$"):
        inside.without_layer(convolutions, 0)
