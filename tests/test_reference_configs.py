"""The reference configs are the released models, and train by their schedule."""

import math
from pathlib import Path

import pytest
from flax import nnx

from based_jax import config as configs
from based_jax.errors import UserError
from based_jax.nn.lm import LM
from based_jax.optim import schedule
from based_jax.train.run import TrainConfig

CONFIGS = Path(__file__).parents[1] / "configs"
PARAMETERS = {
    ("based", "360m"): 362_620_928,
    ("based", "1b"): 1_349_453_056,
    ("attention", "360m"): 359_810_048,
    ("attention", "1b"): 1_327_080_720,
    ("mamba", "360m"): 358_190_080,
    ("mamba", "1b"): 1_319_311_360,
    ("gated_deltanet", "1b"): 1_438_996_224,
    ("kda", "1b"): 1_362_810_240,
    ("mamba2", "1b"): 1_343_757_312,
    ("rwkv7", "1b"): 1_336_958_976,
}
FIRST_SIZES = {"kda": "1b", "mamba2": "1b", "rwkv7": "1b"}
"""Of families that have no 360m."""
SHAPED = [(family, "360m") for family in ("gla", "h3", "hyena", "rwkv", "gated_deltanet")]  # published without a config
TOKENS = {"10b": 20_000, "30b": 60_000, "50b": 100_000}


def run_config(family, variant, overrides=()):
    return configs.build(TrainConfig, configs.load(f"{CONFIGS / family}.py:{variant}", overrides))


def num_params(family, size):
    return nnx.eval_shape(lambda: LM(run_config(family, size).model, rngs=nnx.Rngs(0))).num_params()


@pytest.mark.parametrize(("family", "size"), PARAMETERS)
def test_parameters(family, size):
    assert num_params(family, size) == PARAMETERS[family, size]
    assert f"{size} ({PARAMETERS[family, size]:,} parameters)" in (CONFIGS / f"{family}.py").read_text()


@pytest.mark.parametrize(("family", "size"), SHAPED)
def test_the_other_baselines_have_the_paper_s_size(family, size):
    """Table 1 says 362M for those that it has; the docstring of a config gives its count."""
    count = num_params(family, size)
    assert abs(count / 362e6 - 1) < 0.01
    assert f"{size} ({count:,} parameters)" in (CONFIGS / f"{family}.py").read_text()


@pytest.mark.parametrize(("family", "size"), [*PARAMETERS, *SHAPED])
@pytest.mark.parametrize("tokens", TOKENS)
def test_recipe(family, size, tokens):
    config = run_config(family, f"{size}_{tokens}")
    assert (config.steps, config.batch_size, config.data.seq_len) == (TOKENS[tokens], 256, 2048)
    assert config.optim.warmup_steps == TOKENS[tokens] // 100


@pytest.mark.parametrize(("family", "size"), [*PARAMETERS, *SHAPED])
def test_a_size_alone_is_its_10b_recipe(family, size):
    assert run_config(family, size) == run_config(family, f"{size}_10b")
    default = configs.build(TrainConfig, configs.load(f"{CONFIGS / family}.py"))
    assert default == run_config(family, FIRST_SIZES.get(family, "360m"))


def test_the_warmup_follows_the_steps():
    assert run_config("based", "360m", [("steps", "1000")]).optim.warmup_steps == 10
    assert run_config("mamba", "1b_50b", [("steps", "1000"), ("optim.warmup_steps", "7")]).optim.warmup_steps == 7


@pytest.mark.parametrize("variant", ["360", "10b", "360m_20b", "1b"])
def test_an_unknown_variant_lists_all(variant):
    with pytest.raises(UserError, match=f"'{variant}': .*Allowed: 360m, 360m_10b, 360m_30b, 360m_50b.$"):
        run_config("gla", variant)


def test_every_family_is_listed_here():
    families = {path.stem for path in CONFIGS.glob("*.py")} - {"recipe", "mqar_tiny", "text_tiny", "dna"}
    assert families == {family for family, _ in [*PARAMETERS, *SHAPED]}


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
    config = run_config("based", f"360m_{variant}")
    assert float(schedule(config.optim, config.steps)(step)) == pytest.approx(lr, abs=1e-9)
