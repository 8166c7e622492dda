"""Commands on small runs, as their lines are typed."""

import ast
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from orbax.checkpoint import v1 as ocp
from safetensors.numpy import load_file

from based_jax.__main__ import main
from based_jax.convert import load_hf
from based_jax.data import packing
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
    assert refusal == "Config key 'steps' is 1000.0; it is an int, such as 128."


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


@pytest.mark.long
def test_recall_is_scored_compared_and_goes_on(capsys, text_run, tmp_path):
    words = ["eval", "recall", f"--model={text_run}", f"--out={tmp_path / 'rows'}", "--max-length=150", "--limit=3"]
    out = printed(capsys, *words, "--tasks=squad_questions,phonebook", "--lengths=250,300", "--name=cats")
    assert [line.split()[:5] for line in out.splitlines()[1:]] == [
        ["cats", task, length, "1", "3"] for task in ("squad_questions", "phonebook") for length in ("250", "300")
    ]
    (first,) = (tmp_path / "rows").glob("*.jsonl")
    assert first.read_text().count("\n") == 12
    again = printed(capsys, *words, "--tasks=squad_questions,phonebook", "--lengths=250,300", "--name=cats")
    assert again == out and list((tmp_path / "rows").glob("*.jsonl")) == [first]
    out = printed(capsys, "eval", "choices", f"--model={text_run}", "--tasks=lambada,arc_easy", "--limit=3")
    names = [line.split()[:2] for line in out.splitlines()]
    assert names == [["lambada", "acc"], ["lambada", "perplexity"], ["arc_easy", "acc"], ["arc_easy", "acc_norm"]]
    printed(capsys, "eval", "plot", f"--rows={tmp_path / 'rows'}", f"--out={tmp_path / 'pictures'}")
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == {
        f"recall.{ending}" for ending in ("md", "png", "svg", "pdf")
    }


@pytest.mark.long
def test_perplexity_by_slice_is_that_of_the_evaluation(capsys, text_run, tmp_path):
    """In windows of the run's own length but for what stands before: all tokens together are as likely."""
    out = printed(capsys, "eval", "perplexity", f"--model={text_run}", "--length=64", f"--out={tmp_path / 'x.csv'}")
    lines = [line.split() for line in out.splitlines()]
    assert lines[0] == ["slice", "tokens", "loss", "perplexity", "accuracy"]
    assert [line[0] for line in lines[1:4]] == ["all", "recalled", "others"]
    assert int(lines[1][1]) == int(lines[2][1]) + int(lines[3][1]) > 0
    assert float(lines[1][2]) == pytest.approx(
        table(printed(capsys, "eval", f"--workdir={text_run}"))["loss"], rel=0.05
    )
    assert (tmp_path / "x.csv").read_text().startswith("slice,tokens,loss,perplexity,accuracy\nall,")


def test_eval_prints_the_last_evaluation_of_the_run_or_that_of_a_step(capsys, mqar_run):
    rows = [json.loads(line) for line in (mqar_run / "metrics.jsonl").read_text().splitlines()]
    expected = {k.removeprefix("eval/"): v for k, v in next(r for r in rows if "eval/loss" in r).items() if k != "step"}
    found = table(printed(capsys, "eval", f"--workdir={mqar_run}"))
    assert found.pop("step") == 2
    assert found == pytest.approx(expected, abs=2e-2)
    assert found.keys() >= {"loss", "perplexity", "accuracy", "16x2/accuracy", "32x4/loss"}
    earlier = table(printed(capsys, "eval", f"--workdir={mqar_run}", "--step=1"))
    assert earlier["step"] == 1 and earlier["loss"] != found["loss"]


def test_prepare_packs_what_a_run_then_only_reads(capsys, folder, text_run, monkeypatch):
    words = [f"--config={folder / 'text.py'}", f"--config.data.cache_dir={folder / 'prepared'}"]
    out = printed(capsys, "prepare", *words).splitlines()
    assert out[0].startswith("train: 2,0") and out[1].startswith("validation: ")
    (packed,) = (folder / "prepared" / "packed_text").glob("*/")
    assert out[-1] == f"packed in {packed}"
    monkeypatch.setattr(packing, "_build", None)
    assert printed(capsys, "prepare", *words).splitlines() == out
    packed.rename(folder / "moved")
    words = [f"--config={folder / 'text.py'}", f"--config.data.path={folder / 'moved'}"]
    assert printed(capsys, "prepare", *words).splitlines() == [*out[:-1], f"packed in {folder / 'moved'}"]
    workdir = shutil.copytree(text_run, folder / "of_packed")
    assert "continuing from step 2" in printed(capsys, "train", *words, f"--workdir={workdir}", "--config.steps=3")
    assert refused(capsys, "prepare", *words, "--config.data.tokenizer=gpt2", "--config.model.vocab_size=50257") == (
        f"Packed text '{folder / 'moved'}' has ids of another tokenizer than data.tokenizer."
    )


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


def test_generate_stops_where_it_is_told_and_lists_its_tokens(capsys, text_run):
    command = ["generate", f"--workdir={text_run}", "--prompt=", "--prompt=A", "--max-new-tokens=5"]
    command += ["--temperature=1", "--seed=3", "--dtype=float32", "--log-probs"]
    lines = printed(capsys, *command).splitlines()
    tokens = [line.split(maxsplit=1) for line in lines[1:6]]
    assert all(float(log_prob) < 0 for log_prob, _ in tokens)
    stop = ast.literal_eval(tokens[0][1])
    assert lines[0].startswith(stop) and stop.isascii()
    assert printed(capsys, *command, f"--stop={stop}").splitlines() == ["", lines[1], *lines[6:]]
    assert printed(capsys, *command, f"--stop-id={ord(stop)}").splitlines() == ["", *lines[6:]]


def test_drafted_tokens_change_no_text_and_are_counted(capsys, text_run):
    """By lookup, and by the model itself, all of whose tokens are right."""
    command = ["generate", f"--workdir={text_run}", "--prompt=A cat, a cat", "--max-new-tokens=9", "--dtype=float32"]
    command += ["--temperature=1", "--seed=3"]
    expected = printed(capsys, *command)
    for drafts, told in (
        ("lookup:3", r"\d+ tokens were drafted and \d right: 9 in \d steps"),
        (f"{text_run}:2", "in 3 steps"),
    ):
        assert main([*command, f"--drafts={drafts}"]) == 0
        out, error = capsys.readouterr()
        assert out == expected and re.search(told, error.splitlines()[-1])


@pytest.mark.long
def test_a_prompt_goes_on_from_a_saved_state_as_from_its_text(capsys, text_run, tmp_path):
    command = ["generate", f"--workdir={text_run}", "--max-new-tokens=5", "--temperature=1", "--seed=3"]
    saved = f"{tmp_path / 'cat.safetensors'}"
    assert printed(capsys, *command, "--prompt=The cat", f"--save-state={saved}").startswith("The cat")
    whole = printed(capsys, *command, "--prompt=The cat sat")
    assert "The cat" + printed(capsys, *command, "--prompt= sat", f"--load-state={saved}") == whole
    table = printed(capsys, "state", "inspect", saved)
    assert table.split()[:5] == ["layer", "mixer", "elements", "bytes", "norm"] and "Tokens read: 7." in table


def test_export_writes_the_model_of_the_run(capsys, text_run, tmp_path):
    targets = {"hf": "hf", "orbax": "new/orbax", "safetensors": "model.safetensors"}
    words = [f"--{name}={tmp_path / path}" for name, path in targets.items()]
    out = printed(capsys, "export", text_run, *words)
    config, step, model = load_run(text_run)
    written = f"Wrote {model.num_params():,} parameters of step {step} to "
    layouts = {"hf": " in the layout 'based'"}
    assert out == "".join(f"{written}'{tmp_path / targets[name]}'{layouts.get(name, '')}.\n" for name in targets)
    loaded = load_hf(tmp_path / "hf", dtype="float32", scan_layers=False)
    assert loaded.config == dataclasses.replace(config.model, mlp_dim=32, layers=loaded.config.layers)
    ids = jax.numpy.arange(12, dtype="int32")[None]
    logits = [np.asarray(nnx.jit(m)(ids))[..., : config.model.vocab_size] for m in (model, loaded)]
    np.testing.assert_allclose(*logits, atol=1e-5)
    flat = {"/".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(nnx.state(model))}
    for read in (load_file(tmp_path / "model.safetensors"), ocp.load(tmp_path / "new" / "orbax")):
        assert read.keys() == flat.keys()
        for name, array in read.items():
            np.testing.assert_array_equal(array, flat[name][...])
    for word in words:
        assert "not empty" in refused(capsys, "export", text_run, word)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "model.safetensors", "new"]


def test_generate_takes_the_tokenizer_that_the_folder_names(capsys, text_run, tmp_path):
    printed(capsys, "export", text_run, f"--hf={tmp_path / 'hf'}")
    words = ("--prompt=The cat", "--max-new-tokens=5")
    continued = printed(capsys, "generate", f"--hf={tmp_path / 'hf'}", *words)
    assert continued.startswith("The cat") and len(continued) > len("The cat\n")
    assert "the model knows ids 0 to 256" in refused(
        capsys, "generate", f"--hf={tmp_path / 'hf'}", "--tokenizer=gpt2", *words
    )
    path = tmp_path / "hf" / "config.json"
    fields = json.loads(path.read_text())
    del fields["based_jax"]["tokenizer"]
    path.write_text(json.dumps(fields))
    assert "names no tokenizer; give --tokenizer=bytes" in refused(capsys, "generate", f"--hf={path.parent}", *words)
    assert printed(capsys, "generate", f"--hf={path.parent}", "--tokenizer=bytes", *words) == continued


def test_a_refusal_in_a_process_of_its_own(mqar_config, tmp_path):
    command = [sys.executable, "-m", "based_jax", "train", f"--config={mqar_config}", f"--workdir={tmp_path / 'run'}"]
    done = subprocess.run(
        [*command, "--config.model.layers=(('tailor', {}),)"], env=os.environ, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("Error: Unknown mixer 'tailor': did you mean 'taylor'?")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()
