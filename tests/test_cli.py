import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from based_jax.__main__ import main
from based_jax.convert import load_hf
from based_jax.train.run import load_run

ATTENTION = [["attention", {"num_heads": 2}]]
MQAR = {
    "model": {"layers": [["conv", {}]], "d_model": 16, "vocab_size": 64, "dtype": "float32"},
    "data": {"kind": "mqar", "preset": "tiny"},
    "optim": {"warmup_steps": 1},
    "steps": 2,
    "batch_size": 8,
    "checkpoint": {"every": 1},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cli")


def config_file(folder, name, values):
    path = folder / name
    path.write_text(f"def get_config():\n    return {values!r}\n")
    return path


@pytest.fixture(scope="module")
def mqar_config(folder):
    return config_file(folder, "mqar.py", MQAR)


@pytest.fixture(scope="module")
def mqar_run(folder, mqar_config):
    """Return the workdir of a finished run on MQAR."""
    assert main(["train", f"--config={mqar_config}", f"--workdir={folder / 'mqar'}", "--config.log_every=1"]) == 0
    return folder / "mqar"


def test_overrides_reach_what_follows_them_from_any_folder(capsys, tmp_path, monkeypatch):
    """The recipe of a family, imported from its folder, with a model and a text that fit here."""
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("The cat sat on the mat. " * 60)
    monkeypatch.chdir(tmp_path)
    family = Path(__file__).parents[1] / "configs" / "based.py"
    small = [
        "model.layers=(('conv',{}),)",
        "model.d_model=16",
        "model.vocab_size=257",
        "batch_size=8",
        "microbatches=1",
    ]
    data = ["data.path=texts", "data.cache_dir=cache", "data.tokenizer=bytes", "data.seq_len=16"]
    overrides = [f"--config.{override}" for override in (*small, *data, "steps=100")]
    printed(capsys, "train", f"--config={family}:360m", "--workdir=run", *overrides)
    written = json.loads(Path("run/config.json").read_text())
    assert (written["steps"], written["optim"]["warmup_steps"]) == (100, 1)
    places = (
        written["data"]["path"],
        written["data"]["cache_dir"],
        json.loads(Path("run/data.json").read_text())["path"],
    )
    assert places == (str(tmp_path / "texts"), str(tmp_path / "cache"), str(tmp_path / "texts"))
    refusal = refused(capsys, "train", f"--config={family}:360m", "--workdir=new", "--config.steps=1e3")
    assert refusal == "Config key 'steps' is 1000.0; it is int."


@pytest.fixture(scope="module")
def text_run(folder):
    """Return the workdir of a finished run of an attention model on a few sentences."""
    (folder / "corpus").mkdir()
    text = "The cat sat on the mat, and the dog lay by the door. " * 40
    (folder / "corpus" / "cats.txt").write_text(text)
    data = {"kind": "text", "path": str(folder / "corpus"), "tokenizer": "bytes", "seq_len": 32}
    model = {"layers": ATTENTION, "d_model": 16, "vocab_size": 257, "dtype": "float32"}
    values = MQAR | {"model": model, "data": data | {"cache_dir": str(folder / "cache")}}
    assert main(["train", f"--config={config_file(folder, 'text.py', values)}", f"--workdir={folder / 'text'}"]) == 0
    return folder / "text"


def printed(capsys, *argv):
    """Return what a command that succeeds prints."""
    capsys.readouterr()
    assert main(list(map(str, argv))) == 0
    return capsys.readouterr().out


def refused(capsys, *argv):
    """Return the sentence of a command that is refused, which is all that it prints."""
    capsys.readouterr()
    assert main(list(map(str, argv))) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith("Error: ") and error.endswith("\n") and error.count("\n") == 1
    return error.removeprefix("Error: ").rstrip("\n")


def table(out):
    """Return the metrics of printed lines 'name value'."""
    return {name: float(value) for name, value in (line.split() for line in out.splitlines() if len(line.split()) == 2)}


def test_train_takes_overrides_and_fills_the_workdir(mqar_run):
    assert json.loads((mqar_run / "config.json").read_text())["log_every"] == 1
    rows = [json.loads(line) for line in (mqar_run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2]
    assert list(mqar_run.glob("events.out.tfevents.*"))
    assert {"1", "2"} <= {path.name for path in (mqar_run / "checkpoints").iterdir()}


def test_eval_prints_the_last_evaluation_of_the_run_or_that_of_a_step(capsys, mqar_run):
    rows = [json.loads(line) for line in (mqar_run / "metrics.jsonl").read_text().splitlines()]
    expected = {k.removeprefix("eval/"): v for k, v in next(r for r in rows if "eval/loss" in r).items() if k != "step"}
    found = table(printed(capsys, "eval", f"--workdir={mqar_run}"))
    assert found.pop("step") == 2
    assert found == pytest.approx(expected, abs=2e-2)
    assert found.keys() >= {"loss", "perplexity", "accuracy", "16x2/accuracy", "32x4/loss"}
    earlier = table(printed(capsys, "eval", f"--workdir={mqar_run}", "--step=1"))
    assert earlier["step"] == 1 and earlier["loss"] != found["loss"]


def test_changed_text_is_warned_of_by_eval_and_refused_by_train(capsys, folder, text_run):
    text = folder / "corpus" / "cats.txt"
    before = text.read_text()
    text.write_text(before + "The cow jumped over the moon.")
    try:
        capsys.readouterr()
        assert main(["eval", f"--workdir={text_run}"]) == 0
        out, error = capsys.readouterr()
        assert out.startswith("step 2\n") and error.startswith("Warning: The text at ")
        assert error.endswith(" began with: cats.txt has changed.\n")
        refusal = refused(capsys, "train", f"--config={folder / 'text.py'}", f"--workdir={text_run}")
        assert refusal.endswith("cats.txt has changed; bring the text back, or choose another workdir.")
    finally:
        text.write_text(before)


def test_generate_continues_each_prompt_the_same_way_twice(capsys, text_run):
    command = ["generate", f"--workdir={text_run}", "--prompt=The cat", "--prompt=A", "--max-new-tokens=5"]
    greedy = printed(capsys, *command)
    assert greedy.startswith("The cat") and "\nA" in greedy and len(greedy) > len("The cat\nA\n")
    assert printed(capsys, *command) == greedy
    sampled = printed(capsys, *command, "--temperature=1", "--top-k=50", "--top-p=0.9", "--seed=3")
    assert sampled != greedy


def test_convert_writes_the_model_of_the_run(capsys, text_run, tmp_path):
    out = printed(capsys, "convert", f"--workdir={text_run}", f"--hf={tmp_path / 'hf'}")
    config, step, model = load_run(text_run)
    assert out == f"Wrote {model.num_params():,} parameters of step {step} to '{tmp_path / 'hf'}'.\n"
    loaded = load_hf(tmp_path / "hf", dtype="float32", scan_layers=False)
    assert loaded.config.layers[0][0] == "attention"
    ids = jax.numpy.arange(12, dtype="int32")[None]
    logits = [np.asarray(nnx.jit(m)(ids))[..., : config.model.vocab_size] for m in (model, loaded)]
    np.testing.assert_allclose(*logits, atol=1e-5)
    assert "not empty" in refused(capsys, "convert", f"--workdir={text_run}", f"--hf={tmp_path / 'hf'}")


def test_a_refusal_in_a_process_of_its_own(mqar_config, tmp_path):
    command = [sys.executable, "-m", "based_jax", "train", f"--config={mqar_config}", f"--workdir={tmp_path / 'run'}"]
    done = subprocess.run(
        [*command, "--config.model.layers=(('tailor', {}),)"], env=os.environ, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("Error: Unknown mixer 'tailor': did you mean 'taylor'?")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()
