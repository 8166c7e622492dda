"""The README's commands and programs, run as they stand there; training is cut to two steps, and to one layer."""

import dataclasses
import re
import shlex
from pathlib import Path
from typing import ClassVar

import jax.numpy as jnp
import pytest
from helpers.serving import served

from based_jax import config as configs
from based_jax import contracts
from based_jax.__main__ import main
from based_jax.errors import UserError
from based_jax.nn import layers
from based_jax.nn.mixer import Mixer
from based_jax.ops import scan
from based_jax.train import loop
from based_jax.train.run import TrainConfig

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PROGRAMS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = re.findall(r"^python -m based_jax (.*)$", README, re.MULTILINE)


def program(marker):
    (found,) = (text for text in PROGRAMS if marker in text)
    return found


def run(command, folder, *training):
    """Run a command with what it writes in this folder, on a text of its own: a run ends with all that is held out."""
    arguments = shlex.split(re.sub(r"(?<=[= ])runs", str(folder), command))
    if arguments[0] == "train":
        arguments += ["--config.steps=2", "--config.optim.warmup_steps=1", *training]
        if "text" in command:
            (folder / "texts").mkdir()
            (folder / "texts" / "readme.txt").write_text(README)
            arguments += [f"--config.data.path={folder / 'texts'}", f"--config.data.cache_dir={folder / 'cache'}"]
    assert main(arguments) == 0, command


@pytest.mark.parametrize(
    "training",
    [pytest.param([], id="all layers", marks=pytest.mark.long), ["--config.model.layers=(('taylor', {}),)"]],
    ids=str,
)
def test_the_commands_in_their_order(training, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    names = ["train", "train", "plot", "eval", "generate", "export", "describe", "sweep", "sweep", "serve"]
    assert [command.split()[0] for command in COMMANDS] == names
    for command in COMMANDS[:7]:
        run(command, tmp_path, *training)
    names = {}
    exec(program("ocp.load").replace("runs/", f"{tmp_path}/"), names)
    assert names["params"]["embed/embedding"].shape[0] == 264
    assert "It was a " in capsys.readouterr().out
    targets = re.findall(r"^make ([\w-]+)", README, re.MULTILINE)
    assert targets == ["demo", "test", "test-all"]
    assert all(f"\n{target}:" in (ROOT / "Makefile").read_text() for target in targets)


@pytest.mark.long
def test_the_server_and_its_client(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    run(COMMANDS[1], tmp_path)
    words = shlex.split(re.sub(r"(?<=[= ])runs", str(tmp_path), COMMANDS[9]))
    capsys.readouterr()
    assert served(words, lambda port: exec(program("from openai").replace(":8000", f":{port}"), {})) == 0
    out = capsys.readouterr().out
    assert out.startswith("Serving 'text' at http://127.0.0.1:") and out.count("\n") >= 1


def test_training_from_a_notebook(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(loop, "train", lambda config, workdir: (config, workdir))
    names = {}
    exec(program("import TrainConfig, load_config, train"), names)
    config, workdir = names["results"]
    assert isinstance(config, TrainConfig) and workdir == "runs/notebook"
    assert (config.steps, config.optim.lr) == (1000, 1e-3)


@pytest.mark.long
def test_the_sweep_s_commands(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for command in COMMANDS[7:9]:
        run(command, tmp_path)
    assert "[4/4" in capsys.readouterr().out and (tmp_path / "pictures" / "frontier.html").exists()


def test_the_mixture():
    names = {}
    exec(f"data = {{'kind': 'text', {program('my_wiki')}}}", names)
    values = {"model": {"layers": [["conv", {}]], "d_model": 8, "vocab_size": 50257}, "data": names["data"]}
    mixture = configs.build(TrainConfig, values).data.mixture
    assert (mixture["wiki"].weight, mixture["code"].weight) == (3.0, 1.0)


def test_the_library():
    names = {}
    exec(program("from based_jax import LM, LMConfig"), names)
    assert names["logits"].shape == (1, 128, 264)
    assert [len(ids) for ids in names["new_ids"]] == [16]


def test_the_config():
    names = {}
    exec(program("def get_config"), names)
    config = configs.build(TrainConfig, configs.overridden(names["get_config"](), {"steps": 1000}))
    assert len(config.model.layers) == 12 and config.mesh == {"fsdp": 4} and config.optim.warmup_steps == 10


def test_the_sweep():
    names = {}
    exec(program("def get_sweep"), names)
    trials = [trial for _, trial in names["get_sweep"]().trials()]
    assert len(trials) == 30 and len({trial.signature for trial in trials}) == 5


def test_the_mixer_keeps_the_contract_in_under_60_lines():
    text = program("class Ema")
    assert text.count("\n") < 60
    names = {
        "dataclasses": dataclasses,
        "ClassVar": ClassVar,
        "jnp": jnp,
        "layers": layers,
        "Mixer": Mixer,
        "UserError": UserError,
        "scan": scan,
    }
    exec(text, names)
    assert contracts.check(names["Ema"]) == []
