"""A mixer's class in a layer list, in place of a name: all that reads layers reads it, or says what it cannot."""

import copy
import dataclasses
import functools
import json
import os
import pickle
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx
from helpers import own_mixers
from helpers.own_mixers import Sum

from based_jax import config as configs
from based_jax import parallel
from based_jax.__main__ import main
from based_jax.convert import save_hf
from based_jax.errors import UserError
from based_jax.generate import generate
from based_jax.nn import names, own_mixer
from based_jax.nn.accounting import state_elements
from based_jax.nn.describe import describe
from based_jax.nn.divided import tensor_sizes
from based_jax.nn.init_recipes import INIT_RECIPES
from based_jax.nn.lm import LM, LMConfig
from based_jax.nn.lm_config import with_options
from based_jax.nn.mixer import Mixer
from based_jax.nn.mixers import make_mixer
from based_jax.nn.mixers.taylor import TaylorAttention
from based_jax.train import loop
from based_jax.train.run import TrainConfig, load_run

CONV = ("conv", {"expand": 2})
LAYERS = (CONV, (Sum, {"decay": 0.5}))
NAME = re.compile(r"Sum@[0-9a-f]{8}")


def config_of(layers=LAYERS, **options):
    return LMConfig(**{"layers": layers, "d_model": 16, "vocab_size": 32, "dtype": "float32", "mlp": "none"} | options)


def run_config(layers=LAYERS, **options):
    segment = {"seq_len": 16, "num_kv_pairs": 2, "num_examples": 16}
    data = {"kind": "mqar", "vocab_size": 32, "train": [segment], "test": [segment]}
    model = {"layers": layers, "d_model": 16, "vocab_size": 32, "dtype": "float32", "mlp": "none"}
    values = {"model": model, "data": data, "steps": 2, "batch_size": 8, "optim": {"warmup_steps": 1}}
    return configs.build(TrainConfig, values | options)


def test_a_class_is_called_by_its_name_and_its_source():
    config = config_of()
    (_, (kind, options)) = config.layers
    assert NAME.fullmatch(kind) and kind.mixer is Sum and options == {"decay": 0.5}
    assert config == config_of() and hash(config) == hash(config_of()) and config != config_of((CONV, (Sum, {})))
    assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == config
    assert copy.deepcopy(config).layers[1][0].mixer is Sum
    assert dataclasses.replace(config, d_model=32).layers == config.layers


def test_a_class_of_the_package_is_called_by_its_own_name():
    assert config_of(((TaylorAttention, {"num_heads": 2}),)).layers == (("taylor", {"num_heads": 2}),)


@pytest.mark.parametrize("scan_layers", [False, True], ids=["in a row", "scanned"])
def test_a_model_of_it_is_one_of_any_mixer(scan_layers, rng):
    model = LM(config_of(2 * LAYERS, scan_layers=scan_layers, init_std=0.3), rngs=nnx.Rngs(0))
    ids = rng.integers(0, 32, (1, 6))
    logits = np.asarray(nnx.jit(model)(ids))[0, :, :32]
    [new] = generate(model, [ids[0].tolist()], max_new_tokens=1)
    assert new == [logits[-1].argmax()]
    assert model.state_size(9) == 2 * (3 * 16 + 16) and model.flops_per_token(9) > 2 * model.num_params() / 2


def test_facts_of_it_are_computed_as_of_any_mixer():
    [own, taylor] = describe(64, 128, [Sum, "taylor"])
    assert (own.mixer, own.params, own.state_kib, taylor.mixer) == ("Sum", 64 * 64, 0.2, "taylor")
    assert own.does_not_fit is None
    assert state_elements(LAYERS, 16, 9, convolution=False) == 16
    assert state_elements(LAYERS, 16, 9, convolution=True) == 16 + 3 * 16
    assert names.family(LAYERS) == "Sum" and names.label(LAYERS, 16) == "D 16"
    assert NAME.fullmatch(names.architecture(LAYERS)[1].partition(" decay=0.5")[0])
    assert "The axis 'heads' of 'stacks/1/blocks/0/mixer/out_proj/kernel'" in tensor_sizes(config_of())


@pytest.mark.parametrize("recipe", INIT_RECIPES)
def test_each_recipe_draws_its_parameters(recipe):
    kernel = LM(config_of(init_recipe=recipe), rngs=nnx.Rngs(0)).stacks[1].blocks[0].mixer.out_proj.kernel[...]
    expected = {"reference": 0.02 / 2, "zoology": 0.02, "torch": (1 / 3) ** 0.5 / 4}[recipe]
    np.testing.assert_allclose(np.std(kernel), expected, rtol=0.2)


def test_its_parameters_lie_on_a_mesh():
    params = nnx.state(nnx.eval_shape(lambda: make_mixer(Sum, 16, rngs=nnx.Rngs(0))), nnx.Param)
    [sharding] = jax.tree.leaves(parallel.shardings(params, parallel.abstract_mesh({"data": 2, "tensor": 4}, 8)))
    assert sharding.shard_shape((16, 16)) == (4, 16)


def test_options_of_it_are_given_by_its_name_and_checked():
    assert with_options(config_of(), ["Sum.decay=0.25"]).layers[1][1] == {"decay": 0.25}
    with pytest.raises(UserError, match=r"^Unknown option of mixer 'Sum' 'decai': did you mean 'decay'\?"):
        config_of(((Sum, {"decai": 1.0}),))
    with pytest.raises(UserError, match=r"^layers\[0\]\.decay is 2\.0; it is between 0 and 1\.$"):
        LM(config_of(((Sum, {"decay": 2.0}),)), rngs=nnx.Rngs(0))


def test_a_run_of_it_is_loaded_and_goes_on_where_its_class_is_given(tmp_path):
    config = run_config()
    loop.train(config, tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())["model"]["layers"]
    assert NAME.fullmatch(written[1][0])
    loaded, step, model = load_run(tmp_path, mixers=[Sum])
    assert (loaded, step) == (config, 2) and isinstance(model.stacks[1].blocks[0].mixer, Sum)
    loop.train(run_config(steps=3), tmp_path)
    assert load_run(tmp_path, mixers=[Sum])[1] == 3
    with pytest.raises(UserError, match=f"'{written[1][0]}' is a mixer from outside the package, of which"):
        load_run(tmp_path)


def test_commands_take_its_class_from_a_file(tmp_path, capsys):
    run = str(tmp_path / "run")
    loop.train(run_config(), run)
    assert main(["eval", "--workdir", run]) == 2
    assert "--mixer=FILE.py:Sum" in capsys.readouterr().err
    mixer = f"--mixer={own_mixers.__file__}:Sum"
    assert main(["eval", "--workdir", run, mixer]) == 0
    assert "step 2\n" in capsys.readouterr().out
    assert main(["export", run, f"--safetensors={tmp_path}/sum.safetensors", mixer]) == 0
    assert "parameters of step 2" in capsys.readouterr().out


def test_a_folder_of_weights_has_no_place_for_it(tmp_path):
    model = LM(config_of(), rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match="is a mixer from outside the package"):
        save_hf(model, tmp_path / "hf", layout="based_jax")
    assert not (tmp_path / "hf").exists()


def test_ids_of_runs_tell_classes_apart():
    class Other(Sum):
        """Another one."""

    assert run_config().id == run_config().id != run_config((CONV, (Other, {"decay": 0.5}))).id


SOURCE = """
import dataclasses
from helpers.own_mixers import Sum, SumConfig
FACTOR = {factor}
def scale(x):
    return {scale}
class Scaled(Sum):
    limit = {limit}
    def _average(self, x, state):
        return super()._average(scale(x) * FACTOR, state)
"""


def written_mixer(folder, factor=2, scale="x", limit=1, space=""):
    path = folder / f"mixer_{len(list(folder.iterdir()))}.py"
    path.write_text(space + SOURCE.format(factor=factor, scale=scale, limit=limit))
    return configs.class_in_file(f"{path}:Scaled")


def test_what_a_class_uses_of_its_file_is_a_part_of_it(tmp_path):
    mixer = functools.partial(written_mixer, tmp_path)
    same = own_mixer.fingerprint(mixer())
    assert same == own_mixer.fingerprint(mixer()) == own_mixer.fingerprint(mixer(space="\n# moved\nunused = 1\n"))
    changed = [mixer(factor=3), mixer(scale="2 * x"), mixer(limit=2)]
    assert len({same, *map(own_mixer.fingerprint, changed)}) == 4


TOLD_APART = """
import dataclasses
from based_jax.nn import own_mixer
PLACES = frozenset({"first", "middle", "last"})
@dataclasses.dataclass(frozen=True)
class Config:
    one: int = 1
    two: int = 2
    three: int = 3
class Mixer:
    def step(self, x):
        return x in {"one", "two", "three"} or x in PLACES
    Config = Config
print(own_mixer.fingerprint(Mixer))
"""


def test_a_class_has_one_name_in_every_process():
    """Each process has an order of sets of its own, those in what a dataclass generates too."""
    environments = ({**os.environ, "PYTHONHASHSEED": seed} for seed in "12")
    command = [sys.executable, "-c", TOLD_APART]
    processes = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for env in environments]
    names = {process.communicate()[0] for process in processes}
    assert len(names) == 1 and re.fullmatch(r"[0-9a-f]{8}\n", names.pop())


def test_a_class_without_a_file_has_a_name_too():
    def made(text):
        names = {"__name__": "nowhere", "Sum": Sum}
        exec(SOURCE.format(factor=2, scale=text, limit=1), names)
        return own_mixer.fingerprint(names["Scaled"])

    assert made("x") == made("x") != made("2 * x")


class NoConfig(Mixer):
    """Nothing but a name."""


class LacksParts(Mixer):
    Config = own_mixers.SumConfig

    def __init__(self, d_model, config, init):
        pass


@pytest.mark.parametrize(
    ("mixer", "sentence"),
    [
        (int, "layers[0]: The class int is no mixer; it is a subclass of based_jax.nn.mixer.Mixer."),
        (NoConfig, "layers[0]: The mixer NoConfig has no Config; it is a frozen dataclass, whose defaults hold."),
        (LacksParts, "layers[0]: The mixer LacksParts lacks __call__, _initial_state, _prefill, _step,"),
        (3, "layers[0] is of 3; it is of a mixer's name or class."),
        ("Sum@0123abcd", "'Sum@0123abcd' is a mixer from outside the package, of which a file keeps no more"),
    ],
    ids=str,
)
def test_what_is_no_mixer_is_refused_in_a_sentence(mixer, sentence):
    with pytest.raises(UserError, match=f"^{re.escape(sentence)}"):
        config_of(((mixer, {}),))
