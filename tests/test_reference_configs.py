"""The reference configs are the released models, and train by their schedule."""

import math
from pathlib import Path

import pytest
from flax import nnx

from based_jax import config as configs
from based_jax.nn.lm import LM
from based_jax.optim import schedule
from based_jax.train.run import TrainConfig

CONFIGS = Path(__file__).parents[1] / "configs"
PARAMETERS = {
    "based_360m": 362_620_928,
    "based_1b": 1_349_453_056,
    "attn_360m": 359_810_048,
    "attn_1b": 1_327_080_720,
    "mamba_360m": 358_190_080,
    "mamba_1b": 1_319_311_360,
}
SHAPED = ("gla_360m", "h3_360m", "hyena_360m", "rwkv_360m", "gated_deltanet_360m")  # published without a config
TOKENS = {"10b": 20_000, "30b": 60_000, "50b": 100_000}


def run_config(name, variant="10b"):
    return configs.build(TrainConfig, configs.load(f"{CONFIGS / name}.py:{variant}"))


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters(name):
    model = nnx.eval_shape(lambda: LM(run_config(name).model, rngs=nnx.Rngs(0)))
    assert model.num_params() == PARAMETERS[name]


@pytest.mark.parametrize("name", SHAPED)
def test_the_other_baselines_have_the_paper_s_size(name):
    """Table 1 says 362M for those that it has; the docstring of a config gives its count."""
    model = nnx.eval_shape(lambda: LM(run_config(name).model, rngs=nnx.Rngs(0)))
    assert abs(model.num_params() / 362e6 - 1) < 0.01
    assert f"{model.num_params():,} parameters" in (CONFIGS / f"{name}.py").read_text()


@pytest.mark.parametrize("name", [*PARAMETERS, *SHAPED])
@pytest.mark.parametrize("variant", TOKENS)
def test_recipe(name, variant):
    config = run_config(name, variant)
    assert (config.steps, config.batch_size, config.data.seq_len) == (TOKENS[variant], 256, 2048)
    assert config.optim.warmup_steps == TOKENS[variant] // 100


@pytest.mark.parametrize(
    ("variant", "step", "lr"),
    [
        ("10b", 0, 1e-6),
        ("10b", 100, 4.005e-4),
        ("10b", 200, 8e-4),
        ("10b", 10_000, 8e-5 + 3.6e-4 * (1 + math.cos(math.pi * 9_800 / 19_800))),  # 4.457e-4
        ("10b", 20_000, 8e-5),
        ("30b", 600, 8e-4),
        ("30b", 60_000, 8e-5),
        ("50b", 1_000, 8e-4),
        ("50b", 100_000, 8e-5),
    ],
)
def test_learning_rate(variant, step, lr):
    config = run_config("based_360m", variant)
    assert float(schedule(config.optim, config.steps)(step)) == pytest.approx(lr, abs=1e-9)
