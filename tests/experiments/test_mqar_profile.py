"""What the profile of a step measures."""

import pytest

from based_jax.sweep.trial import make_trial
from experiments.mqar_pareto import profile, sweeps


@pytest.mark.parametrize("name", profile.MODELS)
def test_every_model_takes_an_implementation(name):
    """It reaches the last mixer, in all layers of its kind, and no other."""
    trial = make_trial(sweeps.BASE, profile.with_impl(profile.MODELS[name][0], "xla"))
    last, _ = trial.model.layers[-1]
    assert {options.get("impl", "auto") for kind, options in trial.model.layers if kind == last} == {"xla"}
    assert {options.get("impl", "auto") for kind, options in trial.model.layers if kind != last} <= {"auto"}
