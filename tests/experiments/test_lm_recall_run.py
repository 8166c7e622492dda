"""A run of the study at toy size: prepared, trained, asked; its row makes tables and the picture."""

import json
import shutil
import tarfile

import pytest

from based_jax.__main__ import main as based_jax
from based_jax.data.tokenizer_file import named_tokenizer
from based_jax.errors import UserError
from based_jax.evals.recall_tasks import Selection
from based_jax.store import Store
from based_jax.sweep.trial import load_sweep
from experiments.lm_recall import plot, questions, results, sweeps, table
from experiments.lm_recall.__main__ import main

LENGTH = 768


def write_texts(folder):
    """Write texts to train on and to validate with, in which pairs are repeated that training has not."""
    folder.mkdir(exist_ok=True)
    for name, count, rare in (("train", 40, ""), ("val", 2, "~Q~Q~Q")):
        line = "{} green bottles hanging on the wall, and {} after one fell. "
        texts = [{"text": line.format(i, i - 1) * 20 + rare} for i in range(count)]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, texts)))


@pytest.fixture(scope="module")
def asked_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("asked") / "questions.xz"
    parts = [part for part in questions.parts_of(LENGTH) if part.length < 4 * LENGTH]
    limits = dict.fromkeys((*questions.DOCUMENTS, *questions.NEEDLES), 2)
    questions.write(path, questions.made(parts, Selection(named_tokenizer("bytes")), limits))
    return path


@pytest.fixture(scope="module")
def asked(asked_path):
    return questions.read(asked_path)


def test_questions_are_of_their_lengths_and_whole(asked):
    assert [x.part.task for x in asked] == [*questions.DOCUMENTS, *(x for x in questions.NEEDLES for _ in range(2))]
    for found in asked[2:]:
        assert all(LENGTH / 2 < len(ids) <= found.part.length - 48 for ids in found.prompts)
        assert [len(x) for x in found.answers] == [1, 1] and len(found.prompts) == len(found.groups) == 2
    assert {x.part.length for x in questions.warming(asked)} == {LENGTH, 2 * LENGTH}


def test_a_file_of_other_things_is_refused(tmp_path):
    with pytest.raises(UserError, match="There are no questions at"):
        questions.read(tmp_path / "none.xz")
    (tmp_path / "other.xz").write_text("[]")
    with pytest.raises(UserError, match="holds no questions"):
        questions.read(tmp_path / "other.xz")


SWEEP = """
import functools
from pathlib import Path
from based_jax.sweep import Sweep, param
from experiments.lm_recall.measures import StudyMeasures
LAYERS = ("conv", {{}}), ("taylor", {{"num_heads": 1, "feature_dim": 4}})
BASE = {{
    "model": {{"vocab_size": 257, "d_model": 16, "layers": LAYERS}},
    "data": {{"kind": "text", "tokenizer": "bytes", "seq_len": 768, "path": {path!r}, "cache_dir": {cache!r}}},
    "optim": {{"lr": 3e-3, "warmup_steps": 1, "final_lr": 1e-4}},
    "steps": 40,
    "batch_size": 2,
}}
def get_sweep(variant="toy"):
    measures = functools.partial(StudyMeasures, path=Path({asked!r}))
    return Sweep(BASE, param("optim.lr", (3e-3, 2e-3)), measures=measures, keep_runs=False)
"""


@pytest.fixture(scope="module")
def row(asked_path, tmp_path_factory):
    """The row of a run of the engine, whose command was stopped before it and goes on after it."""
    folder = tmp_path_factory.mktemp("corpus")
    write_texts(folder)
    file, store = folder / "sweep.py", folder / "rows"
    file.write_text(SWEEP.format(path=str(folder), cache=str(folder), asked=str(asked_path)))
    words = ["sweep", "run", str(file), f"--store={store}", "--compiled=none"]
    assert based_jax([*words, "--seconds=0"]) == 0 and not Store(store).rows()
    assert based_jax([*words, "--workers=2"]) == 0
    first, second = Store(store).rows()
    assert {x["overrides"]["optim.lr"] for x in (first, second)} == {3e-3, 2e-3}
    assert based_jax(words) == 0 and not list((store / "runs").iterdir())
    return first


@pytest.mark.long
def test_a_row_holds_all_that_is_asked(row):
    assert row["status"] == "finished" and len(row["curve"]) == 2 and row["curve"][1] < row["curve"][0] < 7
    assert row["seconds"] >= row["training_seconds"] > 0 < row["seconds_to_prepare"] and row["measuring_seconds"] > 0
    assert row["command"].startswith("python -m based_jax") and row["sweep"] == "sweep"
    assert row["tokens"] == 40 * 2 * LENGTH and row["perplexity"] == row["slices"]["all"]["perplexity"]
    assert row["slices"]["all"]["tokens"] == row["slices"]["recalled"]["tokens"] + row["slices"]["others"]["tokens"] > 0
    assert row["slices"]["recalled"]["tokens"] == 2 * 3 and row["perplexity"] < 200  # of 257 bytes
    assert len(row["recall"]) == 8 and all(0 <= x["low"] <= x["value"] <= x["high"] <= 1 for x in row["recall"])
    assert row["trained_per_second"] > 0 < row["written_per_second"]
    assert row["elements_by_length"]["768"] == row["elements_by_length"]["6144"] > 0 < row["stored_bytes_1x"]
    json.dumps(row)


@pytest.mark.long
def test_tables_and_picture_are_of_rows(row, tmp_path, monkeypatch):
    store = Store(tmp_path / "rows")
    keys = {"elements_by_length": row["elements_by_length"] | {"1024": 8}}
    recall = [x | {"length": x["length"] * 1024 // LENGTH} for x in row["recall"]]
    runs = [("based", 1.0, 3.0), ("based", 2.0, 2.0), ("gla", 1.0, 4.0), ("early", 1.0, 5.0)]
    for number, (name, lr, loss) in enumerate([*runs, ("gla", 2.0, 7.0), ("mamba", 1.0, 2.5)]):
        config = row["config"] | {"optim": row["config"]["optim"] | {"lr": lr}}
        told = {"id": str(number), "model": name, "config": config, "loss": loss, "device": "cpu", "recall": recall}
        store.append(row | keys | told)
    monkeypatch.setattr(results.read, "__defaults__", (tuple(sweeps.MODELS), store.path))
    monkeypatch.setattr(results.device_minutes, "__defaults__", (store.path,))
    written = table.tables()
    lines = written["losses"].splitlines()[2:]  # the rate that Mamba has not had counts of nobody
    assert [line.split(" | ")[:3] for line in lines] == [[f"| {x}", "1 (1)", "1"] for x in ("Based", "GLA", "Mamba")]
    assert "NIAH-3, 2x" in written["needles"] and "| one cpu | 6 |" in written["device"]
    assert "interleaved (Based) | 1 (1)" in written["orders"] and "early | 1 (1)" in written["orders"]
    config = config | {"optim": config["optim"] | {"lr": 2.0}}
    store.append(row | keys | told | {"id": "6", "config": config})
    assert "| Based | 2 (2) | 1 |" in table.tables()["losses"] and "| GLA | 1 (2) | 1 |" in table.tables()["losses"]
    assert [path.suffix for path in plot.draw(results.read(), tmp_path / "picture")] == [".png", ".svg", ".pdf"]
    with pytest.raises(UserError, match="no finished run to draw"):
        plot.draw([], tmp_path / "picture")


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """A folder with a sweep over the texts of a bundle, and its questions."""
    folder = tmp_path_factory.mktemp("elsewhere")
    write_texts(folder / "texts")
    cache = str(folder / "cache")
    bundle, made = folder / "bundle.tar.xz", folder / "questions.jsonl.xz"
    for name, texts in (("here", folder / "texts"), ("there", folder / "runs" / "corpus")):
        (folder / f"{name}.py").write_text(SWEEP.format(path=str(texts), cache=cache, asked=str(made)))
    words = [f"--sweep={folder / 'here.py'}", f"--questions={made}", f"--bundle={bundle}"]
    assert main(["prepare", *words, "--documents=1", "--needles=1"]) == 0
    with tarfile.open(bundle) as packed:
        packed.extractall(folder / "runs", filter="data")
    shutil.rmtree(folder / "texts")
    return folder


def test_a_bundle_holds_corpus_and_questions(elsewhere):
    found = questions.read(elsewhere / "runs" / "lm_recall" / "questions.jsonl.xz")
    assert [x.part for x in found] == questions.parts_of(LENGTH)
    config = load_sweep(str(elsewhere / "there.py")).trials()[0][1]
    texts = [config.data.open(2).batch(step)["inputs"].tobytes() for step in range(2)]
    assert texts[0] != texts[1] and b"b\0\0\0o\0\0\0t\0\0\0t\0\0\0l\0\0\0e\0\0\0" in texts[0]
