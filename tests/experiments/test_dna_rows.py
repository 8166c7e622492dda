"""experiments/dna: points of equal parameters, baselines that count, and tables and pictures of rows."""

import json

import numpy as np
import pytest

from based_jax import config as configs
from based_jax.sweep.checks import abstract_model
from based_jax.sweep.rows import run_row
from based_jax.sweep.trial import load_sweep
from experiments.dna import __main__ as command
from experiments.dna import markov
from experiments.dna.sweep import CONFIG, VARIANTS


def test_the_sweep_has_every_variant_and_all_have_equal_parameters():
    trials = load_sweep("experiments/dna/sweep.py").trials()
    assert len(trials) == len(VARIANTS) == 8
    for (_, config), variant in zip(trials, VARIANTS, strict=True):
        assert config == configs.build(type(config), configs.load(f"{CONFIG}:{variant}"))
    sizes = [abstract_model(config.model).num_params() for _, config in trials]
    assert max(sizes) < 1.002 * min(sizes)
    assert {config.batch_size * config.data.seq_len for _, config in trials} == {131072}


def test_counting_counts():
    ids = np.asarray([0, 1, 0, 1, 4, 0, 2], np.uint8)
    assert markov.counted([ids], 0).tolist() == [[3, 2, 1, 0]]
    assert markov.counted([ids], 1)[0].tolist() == [0, 2, 1, 0]  # behind an A
    assert markov.counted([ids], 2)[1].tolist() == [1, 0, 0, 0]  # behind AC
    contexts, _, known = markov.cut(ids, 2)
    assert known.tolist() == [False, False, True, True, False, False, False]
    assert contexts[known].tolist() == [4 * 0 + 1, 4 * 1 + 0]


def test_a_row_of_a_run_has_the_loss_of_each_segment():
    point, config = load_sweep("experiments/dna/sweep.py").trials()[0]
    results = {"loss": 1.3, "accuracy": 0.4, "perplexity": 3.7, "a@8/loss": 1.2, "a@8/accuracy": 0.5}
    row = run_row(point, config, results, 1.0)
    assert row["segment_losses"] == {"a@8": 1.2} and row["segments"] == {"a@8": 0.5}
    assert run_row(point, config, None, 1.0)["segment_losses"] == {}


@pytest.fixture
def rows(tmp_path, monkeypatch):
    """Write two runs and a baseline of each file, of which one order is best."""
    monkeypatch.setattr(command, "RUNS", tmp_path)
    monkeypatch.setattr(command, "MARKOV", tmp_path / "markov" / "markov.jsonl")
    segments = [f"{file}@{length}" for file in command.TITLES for length in (512, 8192)]
    for i, kind in enumerate(("taylor", "hyena")):
        config = {"model": {"layers": [["conv", {}], [kind, {}]]}, "data": {"seq_len": 8192}}
        losses = {name: np.log(2) * (1.9 + i / 100) for name in segments[: 4 - i]}
        row = {"id": kind, "status": "finished", "config": config, "segment_losses": losses}
        row |= {"params": 1, "seconds": 2.0, "device": "GPU"}
        (tmp_path / f"{i}.jsonl").write_text(json.dumps(row) + "\n")
    counted = [
        {"model": model, "order": order, "file": file, "bits": bits}
        for file in command.TITLES
        for model, order, bits in (("order", 3, 1.95), ("order", 4, 1.94), ("mixture", 5, 1.93))
    ]
    command.MARKOV.parent.mkdir()
    command.MARKOV.write_text("".join(json.dumps(row) + "\n" for row in counted))


def test_tables_and_picture_have_the_rows(rows, tmp_path):
    table = command.bits_table("human_chr22_20M_21M")
    assert table.splitlines() == [
        "| model | bases a row in training | 512 | 8,192 |",
        "|---|---|---|---|",
        "| Based | 8,192 | 1.900 | 1.900 |",
        "| Hyena | 8,192 | 1.910 | - |",
        "| counting, orders 0 to 5 mixed | - | 1.930 | 1.930 |",
        "| counting, order 4 | - | 1.940 | 1.940 |",
    ]
    files = command.plot(tmp_path / "pictures" / "bits")
    assert [file.suffix for file in files] == [".png", ".svg", ".pdf"]
    assert "trained on 8,192" in files[1].read_text()


def test_the_readme_has_the_rows_it_was_made_from():
    text = command.README.read_text()
    assert command.filled(text, command.tables()) == text, "run: python -m experiments.dna table"
