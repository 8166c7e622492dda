"""The initial values of every mixer by the recipe "zoology", parameter by parameter, as the public code draws them.

Sources: zoology is HazyResearch/zoology@d88d6f5 and model.py its zoology/model.py, which draws all linear layers of a
model again, fla is fla-org/flash-linear-attention@bc3b101, based is HazyResearch/based@32c1bd4.
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import distributions
from helpers.cases import parametrize_some
from helpers.distributions import CONSTANT, DEPTH, RANDOM, D

from based_jax.errors import UserError
from based_jax.nn.block import Block
from based_jax.nn.init_recipes import INIT_RECIPES, rule
from based_jax.nn.lm import LM, LMConfig
from based_jax.nn.mixers import MIXERS

SEEDS = 64
OPTIONS = {
    "attention": {"num_heads": 4, "bias": True},
    "gated_deltanet": {"num_heads": 16},
    "gsa": {"num_slots": 8},
    "h3": {"d_state": 16},
    "hgrn2": {"expand_ratio": 16},
    "hyena": {"l_max": 32, "filter_order": 16},
    "implicit_conv": {"l_max": 32},
    "kda": {"num_heads": 16, "head_dim": 4},
    "linear": {"num_heads": 4, "feature_dim": 8, "feature_map": "all_poly"},
    "long_conv": {"l_max": 32},
    "mamba2": {"headdim": 8, "d_state": 16},
    "prefix": {"num_heads": 4, "feature_dim": 8},
    "rwkv5": {"head_size": 16},
    "rwkv7": {"head_dim": 16},
    "taylor": {"num_heads": 4, "feature_dim": 8},
    "taylor_window": {"num_heads": 4, "feature_dim": 8},
    "window": {"num_heads": 4, "bias": True},
}
LINES = (Path(__file__).parent / "assets" / "zoology_init.txt").read_text().splitlines()
"""Parameter | distribution, as in `helpers/distributions.py` | source."""
ROWS = {name: (values, source) for name, values, source in (line.split(" | ") for line in LINES)}

REFERENCE_DIFFERS = {
    "deltanet": {"out_proj/kernel"},
    "gated_deltanet": {"A_log", "out_proj/kernel"},
    "gla": {"out_proj/kernel"},
    "gsa": {"out_proj/kernel"},
    "h3": {"out_proj/kernel"},
    "hgrn2": {"out_proj/kernel"},
    "hyena": {
        *(f"filter/hidden/{i}/{part}" for i in range(3) for part in ("kernel", "bias")),
        "filter/out/kernel",
    },
    "implicit_conv": {"hidden/kernel", "hidden/bias", "out/kernel", "out/bias"},
    "kda": {"out_proj/kernel"},
    "lightning": {"out_proj/kernel"},
    "linear": {"feature_map/proj_1/kernel", "feature_map/proj_2/kernel", "out_proj/kernel"},
    "retnet": {"out_proj/kernel"},
    "rwkv4": {"mix", "out_proj/kernel", "time_decay", "time_first"},
    "rwkv4_channel_mix": {"mix", "value/kernel"},
    "rwkv5": {"bonus", "mix", "out_proj/kernel", "time_decay"},
    "rwkv6": {"bonus", "out_proj/kernel"},
    "rwkv7": {"k_a", "k_k", "mix", "out_proj/kernel"},
    "rwkv7_channel_mix": {"mix", "value/kernel"},
    "simple_gla": {"out_proj/kernel"},
    "taylor": {"out_proj/kernel"},
}
"""By mixer: the parameters that start otherwise by the recipe "reference"; of the mixers left out none does."""


def model_config(kind, recipe, **changes):
    fields = {"d_model": D, "vocab_size": 512, "mlp": "none", "dtype": "float32", "init_recipe": recipe} | changes
    return LMConfig(((kind, OPTIONS.get(kind, {})),) * DEPTH, **fields)


def parameters(module):
    return {"/".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(module, nnx.Param))}


def drawn(kind, recipe):
    """Return the parameters of a mixer of a model of three, by name, along a first axis those of each seed."""
    config = model_config(kind, recipe)

    def one(key):
        return parameters(Block(*config.layers[0], config, rngs=nnx.Rngs(key)).mixer)

    return jax.device_get(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0, impl="rbg"), SEEDS)))


def differing(kind, recipe):
    found = drawn(kind, recipe)
    assert {f"{kind}/{name}" for name in found} == {name for name in ROWS if name.startswith(f"{kind}/")}
    return {name for name, values in found.items() if not distributions.follows(values, ROWS[f"{kind}/{name}"][0])}


def test_the_table_has_every_mixer():
    assert {name.partition("/")[0] for name in ROWS} == set(MIXERS)
    assert {values for values, _ in ROWS.values()} <= {*RANDOM, *CONSTANT}


@pytest.mark.parametrize("kind", MIXERS)
def test_zoology_draws_each_parameter_as_the_public_code_does(kind):
    assert differing(kind, "zoology") == set()


@parametrize_some("kind", MIXERS, ("attention", "mamba", *REFERENCE_DIFFERS))
def test_reference_draws_these_parameters_otherwise(kind):
    assert differing(kind, "reference") == REFERENCE_DIFFERS.get(kind, set())


NORMAL_MODEL = {
    "embed/embedding": "N(0, 0.02)",
    "head/kernel": "N(0, 0.02)",
    "mlp/fc1/kernel": "N(0, 0.02)",
    "mlp/fc2/kernel": "N(0, 0.02/sqrt(2L))",
    "mixer/out_proj/kernel": "N(0, 0.02/sqrt(2L))",
    "mixer/qkv/bias": "0",
}
TORCH_MODEL = dict.fromkeys(NORMAL_MODEL, "U(1/sqrt(fan_in))") | {
    "embed/embedding": "N(0, 1)",
    "mixer/qkv/bias": "U(1/sqrt(D))",
}


@parametrize_some(
    "recipe, scan_layers",
    [(recipe, scan_layers) for recipe in ("reference", "zoology", "torch") for scan_layers in (False, True)],
    [("reference", False), ("zoology", True), ("torch", False), ("torch", True)],
)
def test_a_whole_model_follows_the_recipe_stacked_or_not(recipe, scan_layers):
    expected = TORCH_MODEL if recipe == "torch" else NORMAL_MODEL
    config = model_config("attention", recipe, mlp="swiglu", tie_embeddings=False, scan_layers=scan_layers)
    found = jax.device_get(parameters(jax.jit(lambda: LM(config, rngs=nnx.Rngs(0)))()))
    for name, distribution in expected.items():
        layers = [values for path, values in found.items() if path.endswith(name)]
        assert len(layers) == (1 if name.partition("/")[0] in ("embed", "head") or scan_layers else DEPTH)
        values = layers[0] if scan_layers and len(layers[0].shape) > 2 else np.stack(layers)
        assert distributions.follows(values, distribution), name


def test_every_rule_says_where_it_comes_from_and_is_followed_by_something():
    names = [*ROWS, "embed/embedding", "head/kernel", "mlp/fc1/kernel", "mlp/fc2/kernel"]
    for recipe, rules in INIT_RECIPES.items():
        assert all(rule.source for rule in rules)
        assert {rule(recipe, name) for name in names} == set(rules)


def test_zoology_s_rwkv7_never_learns_to_remove(rng):
    """Its removal keys start at 0, and where they are 0 nothing has a gradient to them."""
    config = model_config("rwkv7", "zoology")
    ids = rng.integers(512, size=(2, 16))

    @jax.jit
    def gradients():
        model = LM(dataclasses.replace(config, layers=config.layers[:1]), rngs=nnx.Rngs(0))
        return nnx.grad(lambda model: jnp.sum(model.hidden(ids) ** 3))(model)

    found = parameters(gradients().stacks[0].blocks[0].mixer)
    assert not np.any(found["k_k"])
    assert all(np.any(found[name]) for name in ("k_a", "r_k", "mix"))


def test_torch_takes_no_deviation():
    with pytest.raises(UserError, match=r"^init_std is 0\.1, but init_recipe 'torch' takes none; leave it out\.$"):
        model_config("taylor", "torch", init_std=0.1)
    with pytest.raises(UserError, match="init_recipe 'zoologi'"):
        model_config("taylor", "zoologi")
