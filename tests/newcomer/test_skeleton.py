"""A skeleton keeps all contracts as it is written, in a file of its own and as one more mixer of a checkout."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from based_jax import config as configs
from based_jax import contracts
from based_jax.__main__ import main
from based_jax.errors import UserError
from based_jax.folders import UnwritableError
from based_jax.newcomer import skeleton

ROOT = Path(__file__).parents[2]
KEY = re.compile(r'    "\w+": \w+,')
CHANGED = (skeleton.MIXERS_FILE, skeleton.NAMES_FILE, skeleton.TESTS_FILE, skeleton.README_FILE)


@pytest.fixture
def checkout(tmp_path):
    """Return a folder with the files of this checkout that a new mixer has a line in."""
    for path in CHANGED:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, tmp_path / path)
    return tmp_path


def test_the_skeleton_keeps_all_contracts_and_can_be_read_as_it_stands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["new-mixer", "my_mixer", "--file=my_mixer.py"]) == 0
    assert capsys.readouterr().out.endswith("Next: python -m based_jax frontier my_mixer.py:MyMixer\n")
    mixer = configs.class_in_file("my_mixer.py:MyMixer")
    assert mixer.Config.__name__ == "MyMixerConfig" and "Source: " in mixer.__doc__
    assert contracts.check(mixer) == []
    ours = ["--config", "lint.isort.known-first-party=['based_jax']"]
    for lint in (
        ["check", "--select=E,F,I,UP,B,SIM,RUF,D1", "--ignore=F722,F821,D105,D107", *ours],
        ["format", "--check"],
    ):
        command = [sys.executable, "-m", "ruff", *lint, "--line-length=120", "my_mixer.py"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_a_mixer_of_a_checkout_has_a_line_in_each_table(checkout, monkeypatch, capsys):
    monkeypatch.chdir(checkout)
    before = {path: (checkout / path).read_text().splitlines() for path in CHANGED}
    assert main(["new-mixer", "my_mixer"]) == 0
    assert "pytest tests/test_contracts.py -k '[my_mixer] or -my_mixer]'" in capsys.readouterr().out
    assert (checkout / "based_jax/nn/mixers/my_mixer.py").read_text() == skeleton.source("my_mixer")
    added = {}
    for path, lines in before.items():
        after = (checkout / path).read_text().splitlines()
        added[path] = [line for line in after if line not in lines]
        assert [line for line in after if line not in added[path]] == lines
    assert added == {
        skeleton.MIXERS_FILE: ["from based_jax.nn.mixers.my_mixer import MyMixer", '    "my_mixer": MyMixer,'],
        skeleton.NAMES_FILE: ['    "my_mixer": "My mixer",'],
        skeleton.TESTS_FILE: ['    "my_mixer": {"num_heads": 2, "key_dim": 4},'],
        skeleton.README_FILE: ["| `my_mixer` | My mixer: what it is | H K V | where it is published |"],
    }
    lines = (checkout / skeleton.MIXERS_FILE).read_text().splitlines()
    imports = [line for line in lines if line.startswith("from based_jax.nn.mixers.")]
    keys = [line for line in lines if KEY.fullmatch(line)]
    assert imports == sorted(imports) and keys == sorted(keys) and len(keys) == len(imports)


@pytest.mark.parametrize("name", ["aaa", "zzz"])
def test_the_first_and_the_last_of_a_table(checkout, name):
    skeleton.write_into(name, checkout)
    keys = [line for line in (checkout / skeleton.MIXERS_FILE).read_text().splitlines() if KEY.fullmatch(line)]
    assert keys == sorted(keys) and keys[0 if name == "aaa" else -1].startswith(f'    "{name}": ')


def test_all_files_are_written_or_none(checkout, monkeypatch):
    def write_whole(path, text):
        if path.name == "README.md":
            raise UnwritableError("full")
        path.write_text(text)

    before = {path: path.read_text() for path in checkout.rglob("*.*") if path.is_file()}
    monkeypatch.setattr(skeleton, "write_whole", write_whole)
    with pytest.raises(UnwritableError):
        skeleton.write_into("my_mixer", checkout)
    assert {path: path.read_text() for path in checkout.rglob("*.*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("name", "file"), [("mixer", "the skeleton"), ("taylor_attention", skeleton.MIXERS_FILE), ("init", "based_jax/")]
)
def test_a_class_that_is_there_is_not_replaced(checkout, name, file):
    with pytest.raises(
        UserError, match=rf"^The class of '{name}' would be \w+, which {file}.* has; choose another name"
    ):
        skeleton.write_into(name, checkout)


def test_nothing_is_overwritten(checkout):
    [new, *changed] = skeleton.write_into("my_mixer", checkout)
    new.write_text("mine")
    before = {path: path.read_text() for path in (new, *changed)}
    with pytest.raises(UserError, match=r"my_mixer\.py' is there already, and stays as it is; choose another name\.$"):
        skeleton.write_into("my_mixer", checkout)
    assert {path: path.read_text() for path in before} == before
