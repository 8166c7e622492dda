"""A mixer from outside the package gets its point among the committed ones."""

import json

import numpy as np
import pytest
from helpers.own_mixers import Sum

from based_jax import config as configs
from based_jax.__main__ import main
from based_jax.newcomer import frontier, small_sweep
from based_jax.newcomer.skeleton import write_file
from based_jax.pictures.configurations import configurations
from based_jax.store import Store
from based_jax.sweep.schedule import SweepFailedError

SEGMENT = {"seq_len": 64, "num_kv_pairs": 8, "num_examples": 64}
SMALL = {"data.train": (SEGMENT,), "data.test": (SEGMENT,), "optim.warmup_steps": 0}


def test_the_committed_rows_are_those_of_the_committed_sweep():
    rows, trials = small_sweep.committed_rows(), [trial for _, trial in small_sweep.committed_sweep().trials()]
    assert sorted(row["id"] for row in rows) == sorted(trial.id for trial in trials)
    assert {row["status"] for row in rows} == {"finished"}
    assert all(row["device"] and row["versions"] and row["revision"] and row["command"] for row in rows)
    best = {point.family: point.median for point in configurations(rows)}
    assert best["Attention"] > 0.9 and best["Gated convolution"] < 0.1


def test_the_sweep_is_the_task_of_the_demo(request):
    demo = configs.load(str(request.config.rootpath / "configs" / "mqar_tiny.py") + ":taylor_8").to_dict()
    base = small_sweep.BASE
    assert base["model"] == demo["model"] | {"layers": ()} and base["optim"] == demo["optim"]
    assert (
        json.dumps(base["data"], sort_keys=True) == json.dumps(demo["data"], sort_keys=True)
        and base["batch_size"] == demo["batch_size"]
    )
    assert demo["steps"] * demo["batch_size"] == demo["data"]["train"][0]["num_examples"]
    assert demo["model"]["layers"][0] == small_sweep.CONV


def test_a_class_is_trained_and_drawn_among_the_others(tmp_path):
    lines = []
    several = [{"decay": 0.5}, {"decay": 0.9}]
    found = frontier.place(Sum, several[:1], out=tmp_path, overrides=SMALL, report=lines.append)
    [point] = found.points
    assert (point.family, point.state_bytes(convolution=False)) == ("Sum", 4 * 64)
    assert point.state_bytes(convolution=True) == 4 * (64 + 3 * 64)
    assert {path.name for path in found.pictures} == {"frontier.png", "frontier.svg", "frontier.pdf", "frontier.html"}
    page = (tmp_path / "frontier.html").read_text()
    assert '"family":"Sum"' in page and '"family":"Based"' in page and "Sum among others" in page
    assert ">Sum</text>" in (tmp_path / "frontier.svg").read_text()
    assert any("conv + Sum, D 64, optim.lr=0.004" in line for line in lines)
    rows = Store(tmp_path / "rows").rows()
    assert {json.dumps(row["counted_elements"]) for row in rows} == {
        json.dumps({"main_mixers": 64, "with_convolutions": 256})
    }
    again = frontier.place(Sum, several[:1], out=tmp_path, overrides=SMALL, report=lambda line: None)
    assert [row["id"] for row in Store(tmp_path / "rows").rows()] == [row["id"] for row in rows]
    np.testing.assert_equal(again.points[0].median, point.median)


def test_training_that_fails_is_told_in_a_sentence(tmp_path, monkeypatch, capsys):
    def place(*_, **__):
        raise SweepFailedError("1 of 1 groups failed: conv + Based: ValueError: no")

    monkeypatch.setattr(frontier, "check_contracts", lambda *_: None)
    monkeypatch.setattr(frontier, "place", place)
    assert main(["frontier", "taylor", f"--out={tmp_path}"]) == 1
    assert capsys.readouterr().err.endswith("Error: 1 of 1 groups failed: conv + Based: ValueError: no\n")


@pytest.mark.long
def test_the_command_does_all_three(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_file("my_mixer", "my_mixer.py")
    short = {"data": small_sweep.BASE["data"] | {"train": (SEGMENT,)}, "optim": {"lr": 4e-3}}
    monkeypatch.setattr(small_sweep, "BASE", small_sweep.BASE | short)
    assert main(["frontier", "my_mixer.py:MyMixer", "--options", "{'key_dim': 4}", "--out=out"]) == 0
    out = capsys.readouterr().out
    assert out.count("kept  ") == 20 and "MyMixer, D 64, 2 heads: accuracy " in out and "1,024 bytes of state" in out
    assert "out/frontier.html." in out
