"""The models of the study have equal states and equal parameters, and its first runs are one of each."""

import pytest
from flax import nnx

from based_jax.nn.accounting import state_elements
from based_jax.nn.lm import LM
from based_jax.train.run import load_config
from experiments.lm_recall import mqar, sweeps
from experiments.lm_recall.__main__ import main


@pytest.mark.parametrize("name", [*sweeps.MODELS, *sweeps.ORDERS, *sweeps.RATIOS])
def test_states_and_parameters_are_equal(name):
    config = load_config(sweeps.BASE, (sweeps.MODELS | sweeps.ORDERS | sweeps.RATIOS)[name]).model
    model = nnx.eval_shape(lambda: LM(config, rngs=nnx.Rngs(0)))
    assert len(config.layers) == sweeps.DEPTH
    assert abs(model.num_params() - 56e6) < 0.006 * 56e6
    if name != "attention" and name not in sweeps.RATIOS:
        elements = state_elements(config.layers, config.d_model, 8 * sweeps.SEQ_LEN, convolution=False)
        assert abs(elements - sweeps.STATE_ELEMENTS) < 0.002 * sweeps.STATE_ELEMENTS


def test_orders_are_of_the_same_layers():
    def kinds(layers):
        return sorted(kind for kind, _ in layers)

    based = sweeps.MODELS["based"]["model.layers"]
    assert all(kinds(found["model.layers"]) == kinds(based) for found in sweeps.ORDERS.values())
    same = ("interleaved", "early", "middle", "late", "far_first", "near_first")
    assert len({str(kinds(mqar.ORDERS[name])) for name in same}) == 1 < len({str(mqar.ORDERS[name]) for name in same})
    assert {len(layers) for layers in mqar.ORDERS.values()} == {6}
    for name, models in (("a", sweeps.RATIOS), ("b", {k: {"model.layers": v} for k, v in mqar.ORDERS.items()})):
        for ratio in [ratio for ratio in models if ":" in ratio]:
            found = kinds(models[ratio]["model.layers"])
            counts = [sum(kind.endswith(word) for kind in found) for word in ("taylor", "window", "conv")]
            assert ":".join(map(str, counts)) == ratio, name


def test_the_first_runs_are_one_of_each_model():
    points = sweeps.get_sweep().points
    count = len(sweeps.MODELS)
    assert [sweeps.name_of(point["model.layers"]) for point in points[:count]] == list(sweeps.MODELS)
    assert {(point["optim.lr"], point["seed"]) for point in points[:count]} == {(sweeps.RATES[0], sweeps.SEEDS[0])}
    assert len({str(point) for point in points}) == len(points) == 6 * count
    assert {point["optim.lr"] for point in points[: 3 * count]} == set(sweeps.RATES)
    assert len(sweeps.get_sweep("order").points) == 6 * len(sweeps.SWEEPS["order"])
    assert len(mqar.get_sweep().points) == len(mqar.get_sweep("tiny").trials()) == 2 * len(mqar.ORDERS)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["prepare", "--needles=0"], "--documents is 500 and --needles 0; both are at least 1"),
        (["prepare", "--data=squad=rows.jsonl"], "Unknown set 'squad'"),
    ],
)
def test_what_cannot_be_made_is_refused(words, told, capsys):
    assert main(words) == 2
    assert told in capsys.readouterr().err
