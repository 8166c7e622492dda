"""Points that are whole runs: one process and one workdir each, in the same store, by the same commands."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from flax import nnx
from helpers.measures import Norms, norm

from based_jax import config as configs
from based_jax.__main__ import main
from based_jax.errors import UserError
from based_jax.nn.lm import LM
from based_jax.store import Store
from based_jax.sweep import Sweep, Trial, param, runs
from based_jax.sweep.launch import run_sweep
from based_jax.sweep.measures import Deadline, NoTimeLeft, trained_per_second
from based_jax.sweep.schedule import SweepOptions
from based_jax.sweep.trial import load_sweep
from based_jax.train.run import TrainConfig, load_run

ROOT = Path(__file__).parents[2]
SMALL = {"model.d_model": 16, "data.seq_len": 32, "batch_size": 4, "steps": 6, "optim.warmup_steps": 2, "log_every": 1}
SWEEP = """
from based_jax import config as configs
from based_jax.sweep import Sweep, param
def get_sweep():
    base = configs.overridden(configs.load({config!r}), {overrides!r})
    return Sweep(base, param("optim.lr", {rates!r}))
"""
RECALL = {
    "model": {"layers": (("base_conv", {}),), "d_model": 8, "vocab_size": 40, "dtype": "float32"},
    "data": {"kind": "mqar", "preset": "tiny", "vocab_size": 40},
    "optim": {"warmup_steps": 1},
    "steps": 2,
    "batch_size": 8,
}


@pytest.fixture
def sweep_file(tmp_path):
    """Return a function that writes a sweep over learning rates of text_tiny, shrunk to seconds."""
    (tmp_path / "texts").mkdir()
    for name in ("README.md", "CONTRIBUTING.md"):
        (tmp_path / "texts" / f"{name}.txt").write_text((ROOT / name).read_text())
    paths = {"data.path": str(tmp_path / "texts"), "data.cache_dir": str(tmp_path / "cache")}

    def write(rates, **overrides):
        values = SMALL | paths | overrides
        text = SWEEP.format(config=str(ROOT / "configs/text_tiny.py"), overrides=values, rates=rates)
        (tmp_path / "sweep.py").write_text(text)
        return str(tmp_path / "sweep.py")

    return write


@pytest.mark.long
def test_a_sweep_of_text_models_runs_lists_and_draws(sweep_file, tmp_path, capsys):
    file, store = sweep_file([1e-3, 1e-2]), tmp_path / "store"
    assert main(["sweep", "run", file, f"--store={store}", "--workers=2"]) == 0
    said = capsys.readouterr().out
    assert "[2/2, " in said and "conv + taylor + window, D 16" in said
    assert "optim.lr=0.01: loss " in said and "finished after 6 steps" in said
    rows = {row["id"]: row for row in Store(store).rows()}
    sweep = load_sweep(file)
    assert sweep.config_class is TrainConfig and rows.keys() == {config.id for _, config in sweep.trials()}
    for point, config in sweep.trials():
        row = rows[config.id]
        trained, step, model = load_run(store / "runs" / config.id)
        assert trained == config and step == row["steps"] == 6 and row["overrides"] == point
        assert row["state_elements"] == model.state_size(32) and row["params"] == model.num_params()
        assert row["status"] == "finished" and 0 < row["loss"] < 6 and 0 <= row["accuracy"] < 1
        assert row["sweep"] == "sweep" and row["device"] == "cpu" and row["versions"]["jax"]
        assert row["command"].startswith("python -m based_jax")
        assert row["config"]["model"]["layers"][0][1]["impl"] == "auto"  # mixers' defaults are part of it
        last = (store / "runs" / config.id / "metrics.jsonl").read_text().splitlines()
        assert row["loss"] in [json.loads(line).get("eval/loss") for line in last]
    assert main(["sweep", "list", file, f"--store={store}"]) == 0
    assert "0 of 2 points have no row" in capsys.readouterr().out
    assert main(["sweep", "run", file, f"--store={store}"]) == 0
    assert capsys.readouterr().out == "2 of 2 points have rows.\n"
    assert main(["sweep", "plot", f"--store={store}", f"--out={tmp_path / 'pictures'}"]) == 0
    assert "of 32 tokens" in (tmp_path / "pictures" / "frontier.svg").read_text()


@pytest.mark.long
def test_a_stopped_run_goes_on_from_where_it_was(sweep_file, tmp_path):
    file, store = sweep_file([1e-3], steps=300), tmp_path / "store"
    command = [sys.executable, "-m", "based_jax", "sweep", "run", file, f"--store={store}"]
    [(_, config)] = load_sweep(file).trials()
    workdir = store / "runs" / config.id
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
    while not ((workdir / "metrics.jsonl").exists() and (workdir / "metrics.jsonl").read_text()):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)  # of which nothing is told to the run, which has yet to save
    process.wait()
    assert run_sweep(load_sweep(file), Store(store), "test", SweepOptions()) == 1
    steps = [
        row["step"] for row in map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines()) if "loss" in row
    ]
    assert steps == list(range(1, 301))
    assert "Stopped by a signal; step" in (workdir / "log.txt").read_text()
    unbroken = Store(tmp_path / "unbroken")
    run_sweep(load_sweep(file), unbroken, "test", SweepOptions())
    [row], [other] = Store(store).rows(), unbroken.rows()
    assert row["loss"] == other["loss"] and row["accuracy"] == other["accuracy"]


@pytest.mark.long
def test_a_run_that_fails_leaves_the_others_alone_and_one_that_diverges_has_a_row(tmp_path):
    sweep = Sweep(RECALL, [{"seed": 1}, {"optim.lr": 1e30, "steps": 4}, {}])
    said, store = [], Store(tmp_path)
    other = configs.build(TrainConfig, configs.overridden(RECALL, {"batch_size": 16}))
    configs.save(other, store.path / "runs" / sweep.trials()[0][1].id)  # another run has the workdir of the first one
    with pytest.raises(RuntimeError, match="1 of 3 groups failed: base_conv, D 8, taps 3: RuntimeError: UserError"):
        run_sweep(sweep, store, "test", SweepOptions(), said.append)
    assert {row["status"] for row in store.rows()} == {"diverged", "finished"} and len(store.rows()) == 2
    [diverged] = [row for row in store.rows() if row["status"] == "diverged"]
    assert diverged["accuracy"] is diverged["loss"] is None
    assert sum(text.startswith("FAILED") for text in said) == 1 and any("diverged after" in text for text in said)


def test_a_pipe_as_log_keeps_nobody_waiting(tmp_path):
    os.mkfifo(tmp_path / "log.txt")
    with pytest.raises(OSError, match="It is a pipe or a device"):
        runs._print_into(tmp_path / "log.txt")


def test_a_run_whose_process_dies_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_of_no_such_flag=1")  # which ends a process on the spot
    with pytest.raises(RuntimeError, match=r"1 of 1 groups failed: .*the process ended with exit code [-1]"):
        run_sweep(Sweep(RECALL, [{}]), Store(tmp_path), "test", SweepOptions(), lambda _: None)


@pytest.mark.long
def test_two_processes_share_the_runs(sweep_file, tmp_path):
    file, store = sweep_file([1e-3, 1e-2], steps=3), tmp_path / "store"
    words = ["sweep", "run", file, f"--store={store}", "--processes=2"]
    said = subprocess.run([sys.executable, "-m", "based_jax", *words], capture_output=True, text=True, timeout=200)
    assert said.returncode == 0, said.stderr
    assert Store(store).ids() == {config.id for _, config in load_sweep(file).trials()}


@pytest.mark.parametrize(
    ("base", "kind"),
    [
        (RECALL, TrainConfig),
        ({"model": {}, "data": {"kind": "text"}}, TrainConfig),
        ({"model": {}, "data": {"kind": "mqar"}, "epochs": 2}, Trial),
        (configs.load(str(ROOT / "configs/text_tiny.py")), TrainConfig),
    ],
)
def test_a_base_tells_what_its_points_are(base, kind):
    assert Sweep(base, []).config_class is kind


def test_a_value_of_the_other_kind_is_refused(tmp_path):
    with pytest.raises(UserError, match="'epochs'"):
        run_sweep(Sweep(RECALL, param("epochs", [1])), Store(tmp_path), "test", SweepOptions())
    assert not list(tmp_path.iterdir())


def test_references_of_a_base_follow_its_points():
    base = configs.load(str(ROOT / "configs/based.py"))
    [(_, config)] = Sweep(base, [{"steps": 1000}]).trials()
    assert config.optim.warmup_steps == 10


@pytest.mark.long
def test_runs_are_measured_when_they_are_trained(tmp_path):
    points = [{}, {"seed": 1}, {"optim.lr": 1e30, "steps": 4}]
    sweep, store = Sweep(RECALL | {"log_every": 1}, points, measures=Norms, keep_runs=False), Store(tmp_path)
    assert run_sweep(sweep, store, "test", SweepOptions(workers=2), lambda _: None) == 3
    rows = {row["id"]: row for row in store.rows()}
    for _, config in sweep.trials():
        row = rows[config.id]
        assert row["told"] == config.seed and row["seconds"] >= row["training_seconds"] > 0
        if config.steps == 4:
            assert row["status"] == "diverged" and row["loss"] is None and "norm" not in row
            continue
        before = norm(LM(config.model, rngs=nnx.Rngs(config.seed)))
        assert row["warmed"] == pytest.approx(before, rel=1e-6) and abs(row["norm"] / before - 1) > 1e-5
        assert row["status"] == "finished" and row["told_steps"] == [1, 2] and row["loss"] == -1.0
        assert 0 <= row["accuracy"] < 1 and row["measuring_seconds"] >= 0 < row["seconds_to_prepare"]
    assert not list((tmp_path / "runs").iterdir())


def test_a_deadline_leaves_out_a_run_that_would_not_end_before_it(tmp_path):
    Deadline(time.time() + 1, tmp_path, "test").check()
    Store(tmp_path).append({"id": "a", "sweep": "test", "seconds": 90.0, "training_seconds": 30.0})
    Store(tmp_path).append({"id": "b", "sweep": "other", "seconds": 90.0})
    for name, left in (("test", 60), ("none", 9), ("other", 100), ("test", math.inf)):
        Deadline(time.time() + left, tmp_path, name).check()
    for name, left, seconds in (("test", 9, 30), ("other", 80, 90), ("none", -1, 0)):
        with pytest.raises(NoTimeLeft, match=rf"\d s are left, and a run takes {seconds} s"):
            Deadline(time.time() + left, tmp_path, name).check()


@pytest.mark.long
def test_a_run_that_would_not_end_in_time_is_left(tmp_path):
    store, options = Store(tmp_path), SweepOptions(until=time.time() + 3600)
    store.append({"id": "other", "sweep": "test", "seconds": 50.0, "training_seconds": 7200.0})
    said = []
    assert run_sweep(Sweep(RECALL, [{}], measures=Norms), store, "test", options, said.append) == 0
    assert len(store.rows()) == 1 and said[-1] == "0 of 1 points have rows." and "FAILED" not in "".join(said)
    assert f"{runs.LEFT}: " in next((tmp_path / "runs").glob("*/log.txt")).read_text()
    with pytest.raises(UserError, match="Seed 13 is not measured"):
        run_sweep(Sweep(RECALL, [{"seed": 13}], measures=Norms), store, "test", SweepOptions(), said.append)
    early = SweepOptions(until=time.time() + 1)  # before a process has begun
    assert run_sweep(Sweep(RECALL, [{"seed": 2}], measures=Norms), store, "new", early, said.append) == 0
    late = SweepOptions(until=time.time() - 1)
    assert run_sweep(Sweep(RECALL, [{}]), store, "test", late, lambda _: None) == 0


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(UserError, match="a function or class of a module that can be imported, not of the sweep file"):
        Sweep(RECALL, [{}], measures=lambda config: None)
    with pytest.raises(UserError, match="of whole runs; these are trials"):
        Sweep({"model": {}, "data": {"kind": "mqar"}, "epochs": 2}, [{}], measures=Norms)


def test_the_speed_of_a_run_is_the_median_of_its_rows_but_for_the_first():
    speeds = [3.0, 100.0, 90.0, 5.0]
    rows = [{"step": n, "tokens_per_second": speed} for n, speed in enumerate(speeds)]
    assert trained_per_second([*rows, {"step": 4, "eval/loss": 1.0}]) == 90.0
    assert trained_per_second(rows[:1]) == 3.0
