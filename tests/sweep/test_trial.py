"""A trial's name and what it checks, which it shares with whole runs."""

import json
from pathlib import Path

import pytest

from based_jax.errors import UserError
from based_jax.nn.lm import LMConfig
from based_jax.sweep.trial import Trial, make_trial
from based_jax.train.run import TrainConfig
from based_jax.train.tasks import TASKS
from experiments.mqar_pareto import sweeps

RESULTS = Path(sweeps.__file__).parent / "results"


def test_every_committed_row_has_the_name_and_the_values_of_its_point():
    rows = [json.loads(line) for path in sorted(RESULTS.glob("*/*.jsonl")) for line in path.read_text().splitlines()]
    assert len(rows) >= 558
    for row in rows:
        trial = make_trial(sweeps.BASE, row["overrides"])
        assert (trial.id, trial.resolved) == (row["id"], row["config"])


@pytest.mark.parametrize("variant", sweeps.VARIANTS)
def test_the_figure_s_models_start_as_zoology_s(variant):
    sweep = sweeps.get_sweep(variant)
    assert {point["model.init_recipe"] for point in sweep.points} == {"zoology"}
    trial = make_trial(sweep.base, sweep.points[0])
    before = make_trial(sweep.base, {**sweep.points[0], "model.init_recipe": "reference"})
    assert trial.resolved["model"] == before.resolved["model"] | {"init_recipe": "zoology"}
    assert trial.id != before.id and trial.signature != before.signature


def model(vocab_size):
    return LMConfig((("conv", {}),), 16, vocab_size=vocab_size)


@pytest.mark.parametrize("config", [TrainConfig, Trial])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, r"^batch_size is 0; it is at least 1\.$"),
        (
            {"model": LMConfig((("conv", {}),), 16, vocab_size=32)},
            r"^model\.vocab_size is 32, but the data has ids up to ",
        ),
    ],
)
def test_runs_and_trials_refuse_the_same(config, changes, message):
    given = {"model": model(64), "data": TASKS["mqar"](preset="tiny")}
    assert config(**given).batch_size == 64
    with pytest.raises(UserError, match=message):
        config(**given | changes)
