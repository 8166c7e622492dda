"""The points of the sweeps are the models that zoology builds for them (zoology/experiments/models_repo.py)."""

import dataclasses

import pytest
from flax import nnx

from based_jax.nn.lm import LM
from based_jax.sweep.trial import make_trial
from experiments.mqar_pareto import sweeps

RWKV7_RANKS = {"decay_low_rank_dim": 16, "gate_low_rank_dim": 64, "a_low_rank_dim": 16, "v_low_rank_dim": 16}


def model_of(point):
    return make_trial(sweeps.BASE, point).model


@pytest.mark.parametrize(("kind", "parameters"), [("mamba", 81_920), ("mamba2", 72_012)])
def test_mamba_has_the_parameters_of_its_own_blocks(kind, parameters):
    """At D 64, N 16 and 256 tokens: a norm of 64 in each layer, of 128 at the end, and no second one."""
    configs = map(model_of, sweeps.FIGURE2[kind])
    [config] = [x for x in configs if x.d_model == 64 and x.layers[0][1]["d_state"] == 16]
    model = nnx.eval_shape(lambda: LM(dataclasses.replace(config, vocab_size=256), rngs=nnx.Rngs(0)))
    assert model.num_params() == parameters
    assert (config.mlp, config.embed_dropout) == ("none", 0.0)
    assert (type(model.stacks[0].blocks[0].norm1), type(model.norm)) == (nnx.RMSNorm, nnx.LayerNorm)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("gated_deltanet", {"num_heads": 2, "use_gate": False}),
        ("rwkv7", {"head_dim": 64} | RWKV7_RANKS),
    ],
)
def test_options_of_the_reference(family, options):
    for point in sweeps.FIGURE2[family]:
        (_, _), (kind, found) = model_of(point).layers
        assert (kind, found) == (family, options)


@pytest.mark.parametrize("variant", ["figure2", "figure3", "figure3_k16", "ablation", "disputed"])
def test_all_but_mamba_drop_a_tenth_of_the_embedding(variant):
    for point in sweeps.get_sweep(variant).points:
        config = model_of(point)
        assert config.embed_dropout == (0.0 if config.layers[0][0] in ("mamba", "mamba2") else 0.1)


def test_a_window_sees_its_width_and_the_query_s_own_key():
    found = [model_of(point).layers[-1][1]["window"] for point in sweeps.FIGURE2["window"]]
    assert found == [width + 1 for width in (8, 16, 32, 64, 128, 256, 512, 1024)]


def test_the_headline_is_part_of_the_figure():
    points = [point for space in sweeps.FIGURE2.values() for point in space]
    assert all(point in points for point in sweeps.HEADLINE)
    assert len(sweeps.rest(wide=False)) + len(sweeps.rest(wide=True)) + len(sweeps.HEADLINE) == len(points) == 59


@pytest.mark.parametrize("variant", ["needle", "forgetting"])
def test_demands_are_trained_at_256_tokens_and_tested_to_4096(variant):
    """Two rates and two seeds of configurations of the figure, which the engine takes for lanes of one program each."""
    sweep = sweeps.get_sweep(variant)
    points = [point for space in sweeps.FIGURE2.values() for point in space]
    assert all(point in points for point in sweeps.DEMANDS)
    assert len(sweep.points) == 4 * len(sweeps.DEMANDS)
    data = make_trial(sweep.base, sweep.points[0]).data
    assert max(segment.seq_len for segment in data.train) == 256
    assert {segment.seq_len for segment in data.test} == {256, 512, 1024, 2048, 4096}
