"""The models of the study have equal states and equal parameters."""

import pytest
from flax import nnx

from based_jax.nn.accounting import state_elements
from based_jax.nn.lm import LM
from based_jax.train.run import load_config
from experiments.lm_recall import sweeps


@pytest.mark.parametrize("name", [*sweeps.MODELS, *sweeps.ORDERS])
def test_states_and_parameters_are_equal(name):
    [point] = (sweeps.MODELS | sweeps.ORDERS)[name]
    config = load_config(sweeps.BASE, point).model
    model = nnx.eval_shape(lambda: LM(config, rngs=nnx.Rngs(0)))
    assert len(config.layers) == sweeps.DEPTH
    assert abs(model.num_params() - 56e6) < 0.006 * 56e6
    if name != "attention":
        elements = state_elements(config.layers, config.d_model, 8 * sweeps.SEQ_LEN, convolution=False)
        assert abs(elements - sweeps.STATE_ELEMENTS) < 0.002 * sweeps.STATE_ELEMENTS


def test_all_points_are_runs_with_three_rates_and_two_seeds():
    study = sweeps.get_sweep()
    assert len(study.points) == 6 * len(sweeps.MODELS) and len(sweeps.get_sweep("order").points) == 6 * len(
        sweeps.ORDERS
    )
