"""Lanes train what each trial would train alone, leave when they are done, and a killed sweep goes on."""

import dataclasses
import functools
import json
import re
import signal
import subprocess
import sys
import time
from concurrent import futures
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from based_jax.errors import UserError
from based_jax.labels import NO_LABEL
from based_jax.nn.lm import LM
from based_jax.nn.loss import loss_sums
from based_jax.optim import optimizer
from based_jax.store import Store, StoreError
from based_jax.sweep import Sweep, lane_training, lanes, param, product
from based_jax.sweep.claims import Claims
from based_jax.sweep.lane_engine import LaneEngine, Sources
from based_jax.sweep.lane_training import Outcome, Resident, _LaneGroup
from based_jax.sweep.lanes import PlacedExamples, Rates
from based_jax.sweep.launch import run_sweep
from based_jax.sweep.rows import lane_line, lane_row
from based_jax.sweep.schedule import SweepOptions, Todo
from based_jax.sweep.trial import load_sweep, make_trial
from based_jax.train.step import initial_state, make_train_step

ROOT = Path(__file__).parents[2]
SEGMENT = {"num_examples": 100, "seq_len": 16, "num_kv_pairs": 2}
RECALL = {"model.layers": (("base_conv", {}), ("taylor", {"num_heads": 1, "feature_dim": 4}))}
BASE = {
    "model": {
        "layers": (("base_conv", {}),),
        "d_model": 16,
        "vocab_size": 40,
        "mlp": "identity",
        "init_std": 0.1,
        "dtype": "float32",
    },
    "data": {"kind": "mqar", "preset": "tiny", "vocab_size": 40, "train": (SEGMENT,), "test": (SEGMENT,)},
    "optim": {"lr": 3e-3, "schedule": "cosine_per_epoch", "clip_norm": None},
    "epochs": 2,
    "batch_size": 32,
}


def resident(trial):
    """Return a trial's data on the device."""
    return Resident(trial, Sources().of(trial))


def alone(trial, data):
    """Train a trial with the ordinary step, batch by batch; return its parameters."""
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: LM(trial.model, rngs=nnx.Rngs(0))))
    tx = optimizer(trial.optim, trial.steps)
    key = jax.random.key(trial.seed)
    state = initial_state(LM(trial.model, rngs=nnx.Rngs(key)), tx, key)
    step = jax.jit(make_train_step(graphdef, tx))
    for i in range(trial.steps):
        state, _ = step(state, jax.tree.map(jnp.asarray, data.source.batch(i)))
    return nnx.merge(graphdef, state.params)


def test_lanes_train_what_each_trial_trains_alone():
    points = product(param("seed", [0, 5]), param("optim.lr", [1e-3, 1e-2]))
    trials = [make_trial(BASE, point | RECALL) for point in points]
    data = resident(trials[0])
    found = dict(lane_training.train_lanes(trials, data))
    assert list(found) == trials
    batch = dict(zip(("inputs", "labels"), map(jnp.asarray, data.source.examples("test", 0)), strict=True))
    sums = jax.jit(loss_sums)(alone(trials[2], data), batch)
    np.testing.assert_allclose(found[trials[2]].curve[-1], sums["correct"] / sums["count"], atol=0.011)
    assert all(found[trial].status == "finished" and found[trial].steps == trial.steps == 8 for trial in trials)
    assert len({found[trial].losses[-1] for trial in trials}) == 4


@pytest.mark.parametrize("dropout", [pytest.param(0.0, marks=pytest.mark.long), 0.5])
def test_parameters_of_a_lane_are_those_of_the_ordinary_loop(dropout):
    same = RECALL | {"model.embed_dropout": dropout}
    trials = [make_trial(BASE, same | {"seed": s, "optim.lr": lr}) for s, lr in ((3, 1e-3), (4, 1e-2))]
    data = resident(trials[0])
    programs = lane_training.fitting_programs(trials[0], data, 2)
    states = programs.beginning(jnp.asarray([3, 4], jnp.uint32))
    rates = Rates(*(jnp.asarray([getattr(x.optim, n) for x in trials], jnp.float32) for n in Rates._fields))
    for epoch in range(2):
        states, _ = programs.epoch(states, rates, epoch)
    wanted = nnx.state(alone(trials[1], data), nnx.Param)
    for got, want in zip(jax.tree.leaves(states.params), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(got[1], want, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("everywhere", [False, True])
def test_answers_are_the_labels_and_their_loss_is_that_of_all_logits(rng, everywhere):
    inputs = rng.integers(0, 40, (6, 12)).astype(np.int32)
    labels = np.where(rng.random((6, 12)) < (1.1 if everywhere else 0.3), inputs, NO_LABEL)
    labels[0] = NO_LABEL if not everywhere else labels[0]
    examples = PlacedExamples.of(inputs, labels)
    assert examples.shape == (12, 12 if everywhere else max(1, (labels != NO_LABEL).sum(axis=1).max()))
    model = LM(make_trial(BASE, {}).model, rngs=nnx.Rngs(1))
    got = jax.jit(lanes.answer_sums)(model, examples)
    want = jax.jit(loss_sums)(model, {"inputs": inputs, "labels": labels})
    np.testing.assert_allclose(got["loss"], want["loss"], rtol=1e-5)
    assert got["count"] == want["count"] and got["examples"] == (labels != NO_LABEL).any(axis=1).sum()
    hits = (np.argmax(nnx.jit(model)(inputs), axis=-1) == labels) & (labels != NO_LABEL)
    counts = np.maximum((labels != NO_LABEL).sum(axis=1), 1)
    np.testing.assert_allclose(got["accuracies"], (hits.sum(axis=1) / counts).sum(), rtol=1e-5)


def test_rows_beyond_a_short_batch_have_no_answers():
    examples = PlacedExamples.of(np.arange(8).reshape(2, 4), np.arange(8).reshape(2, 4))
    taken = examples.rows(jnp.array([1, -1, 0]))
    assert (taken.answers[1] == NO_LABEL).all() and (taken.answers[2] == jnp.arange(4)).all()


@pytest.mark.parametrize("tests_too", [pytest.param(False, marks=pytest.mark.long), True])
def test_converged_and_diverged_lanes_leave_and_the_others_go_on(monkeypatch, tests_too):
    """Of the programs for fewer lanes those that test come later than those that train, if not never."""
    numbers = []
    monkeypatch.setattr(_LaneGroup, "_shrunk", _always(_LaneGroup._shrunk, tests_too, numbers))
    monkeypatch.setattr(lanes.Lanes, "_test", _sizes)
    points = product(param("optim.lr", [1e-3, 1e30, 3e-3]))
    trials = [make_trial(BASE, point | {"epochs": 3}) for point in points]
    data = resident(trials[0])
    found = {trial.optim.lr: outcome for trial, outcome in lane_training.train_lanes(trials, data)}
    assert [found[lr].status for lr in (1e-3, 1e30, 3e-3)] == ["finished", "diverged", "finished"]
    assert len(found[1e30].curve) < 3 and found[1e30].steps < found[1e-3].steps
    assert numbers[-1] == (2, 2 if tests_too else 3)
    unshared = {x.optim.lr: outcome for x, outcome in lane_training.train_lanes([trials[2]], data)}
    np.testing.assert_allclose(found[3e-3].losses, unshared[3e-3].losses, rtol=1e-4)
    np.testing.assert_allclose(found[3e-3].curve, unshared[3e-3].curve, rtol=1e-4)
    assert abs(found[1e-3].curve[-1] / found[3e-3].curve[-1] - 1) > 1e-3

    easy = [dataclasses.replace(trial, stop_accuracy=0.0) for trial in trials[:1]]
    [(_, outcome)] = lane_training.train_lanes(easy, data)
    assert outcome.status == "converged" and len(outcome.curve) == 1


@pytest.mark.long
def test_lanes_that_leave_one_after_another_leave_the_others_as_they_are(monkeypatch):
    numbers, ends = [], (3, 0, 2, 0, 3)
    monkeypatch.setattr(lanes.Lanes, "_test", _sizes)
    trials = [make_trial(BASE, {"seed": seed, "epochs": 4}) for seed in range(5)]
    data = resident(trials[0])
    alone = [outcome for trial in trials for _, outcome in lane_training.train_lanes([trial], data)]
    monkeypatch.setattr(_LaneGroup, "_shrunk", _always(_LaneGroup._shrunk, True, numbers))
    monkeypatch.setattr(_LaneGroup, "_status", lambda _, i, epoch: "converged" if epoch == ends[i] else "running")
    found = dict(lane_training.train_lanes(trials, data))
    assert numbers == [(3, 3), (3, 3), (2, 2)] and [trial.seed for trial in found] == [1, 3, 2, 0, 4]
    for trial, end, unshared in zip(trials, ends, alone, strict=True):
        np.testing.assert_allclose(found[trial].curve, unshared.curve[: end + 1], rtol=1e-4)


def _sizes(self, params, examples, rows):
    """Return instead of accuracies, which are 0 after so few steps, what tells lanes apart."""
    return sum(jnp.abs(x.reshape(self.number, -1)).sum(axis=1) for x in jax.tree.leaves(params))


def _always(shrunk, tests_too, numbers):
    def call(self, states, seconds_left):
        states = shrunk(self, states, 1e9)
        if self.smaller:
            self.smaller = self.smaller if tests_too else self.smaller._replace(test=futures.Future())
            futures.wait(self.smaller[1 : 2 + tests_too])
        states = shrunk(self, states, 0)
        numbers.append((self.programs.lanes.number, self.tests.lanes.number))
        return states

    return call


def test_fewer_lanes_where_memory_holds_fewer(monkeypatch):
    trials = [make_trial(BASE, {"seed": s, "epochs": 1}) for s in range(5)]
    data = resident(trials[0])
    monkeypatch.setattr(lane_training.Programs, "fits", lambda self: self.lanes.number <= 2)
    assert lane_training.fitting_programs(trials[0], data, 5).lanes.number == 2
    assert [trial.seed for trial, _ in lane_training.train_lanes(trials, data)] == [0, 1, 2, 3, 4]


def test_dispatches_are_the_epoch(monkeypatch):
    monkeypatch.setattr(lanes, "MAX_STEPS_PER_DISPATCH", 3)
    segments = [SEGMENT, SEGMENT | {"num_examples": 33}]
    for shuffle in (False, True):
        trial = make_trial(BASE, {"data.train": tuple(segments), "data.shuffle": shuffle, "batch_size": 16})
        data = resident(trial)
        got = [
            (next(i for i, x in enumerate(data.train) if x is examples), row[row >= 0].tolist())
            for examples, rows, count in data.dispatches(1)
            for row in rows[:count]
        ]
        assert got == [(segment, rows.tolist()) for segment, rows in data.source.order(1)]


def test_a_sweep_fills_the_store_once(tmp_path):
    sweep = Sweep(BASE, product(param("model.d_model", [8, 16]), param("optim.lr", [1e-3, 1e-2])))
    assert [len(group) for group in LaneEngine(sweep).groups()] == [2, 2]
    said = []
    assert run_sweep(sweep, Store(tmp_path), "test", SweepOptions(command="here"), said.append) == 4
    assert re.match(r"0 of 4 points have rows; 4 are left, in 2 groups, on \d+ x cpu, up to 1 at a time", said[0])
    assert re.match(r"\[1/4, \d+ s, about \d+ s left\] ", said[1]) and re.match(r"\[4/4, \d+ s\] ", said[4])
    assert said.pop() == "4 of 4 points have rows." and said.pop(0)
    rows = Store(tmp_path).rows()
    assert len(rows) == len(said) == 4 and {row["id"] for row in rows} == {trial.id for _, trial in sweep.trials()}
    row = rows[0]
    assert row["sweep"] == "test" and row["command"] == "here" and row["device"] and row["versions"]["jax"]
    assert row["config"]["model"]["layers"][0][1]["impl"] == "auto"  # the mixers' defaults are part of the config
    assert row["accuracy"] == row["curve"][-1] == row["segments"]["16x2"] and row["state_bytes"] > 0
    assert run_sweep(sweep, Store(tmp_path), "test", SweepOptions(), said.append) == 0
    assert said[4:] == ["4 of 4 points have rows."]
    more = Sweep(BASE, [*sweep.points, {"seed": 9}])
    assert run_sweep(more, Store(tmp_path), "test", SweepOptions(), said.append) == 1


def test_ids_tell_trials_apart_and_signatures_programs():
    changes = [{"optim.lr": 1e-2}, {"seed": 1}, {"optim.weight_decay": 0.0}, {"data.shuffle": True}, {"epochs": 3}]
    trials = [make_trial(BASE, point) for point in [{}, *changes]]
    assert len({trial.id for trial in trials}) == 6
    assert [trial.signature == trials[0].signature for trial in trials] == [True] * 4 + [False] * 2
    spelt = make_trial(BASE, {"model.layers": (("base_conv", {"kernel_size": 3}),)})
    assert spelt.id == trials[0].id  # a default is the same whether it is written or not


def test_a_group_is_taken_once(tmp_path):
    sweep, store = Sweep(BASE, product(param("model.d_model", [8, 12, 16]), param("seed", [0, 1]))), Store(tmp_path)
    [_, second, last] = LaneEngine(sweep).groups()
    for _, trial in [last[0], *second]:
        store.append({"id": trial.id})
    todo = Todo(LaneEngine(sweep).groups(), store)
    with futures.ThreadPoolExecutor(4) as pool, Claims(store) as claims:
        taken = list(pool.map(lambda _: todo.take(claims), range(8)))
    left = [group for group in taken if group]
    assert sorted(map(len, left)) == [1, 2] and {group[0][1].model.d_model for group in left} == {8, 16}
    assert {todo.count(), todo.count()} == {1, 2}


def test_parts_are_the_whole_whenever_they_start(tmp_path, monkeypatch):
    outcome = Outcome("finished", [0.5], [1.0], {}, 4)
    monkeypatch.setattr(lane_training, "train_lanes", lambda trials, *_, **__: [(x, outcome) for x in trials])
    sweep = Sweep(BASE, product(param("model.d_model", [8, 12, 16]), param("epochs", [1])))
    counts = [run_sweep(sweep, Store(tmp_path), "test", SweepOptions(part=(i, 2)), lambda _: None) for i in range(2)]
    assert sum(counts) == 3 and min(counts) == 1


def test_a_group_that_fails_leaves_the_others_alone(tmp_path, monkeypatch):
    sweep = Sweep(BASE, product(param("model.d_model", [8, 16]), param("epochs", [1])))
    train = lane_training.train_lanes

    def broken(trials, *arguments, **options):
        if trials[0].model.d_model == 16:
            raise MemoryError("no room")
        return train(trials, *arguments, **options)

    monkeypatch.setattr(lane_training, "train_lanes", broken)
    with pytest.raises(RuntimeError, match=r"1 of 2 groups failed: .*D 16, .*no room"):
        run_sweep(sweep, Store(tmp_path), "test", SweepOptions(), lambda _: None)
    assert len(Store(tmp_path).rows()) == 1


def test_rows_of_what_diverged_have_no_accuracy_and_are_json():
    trial = make_trial(BASE, {"optim.lr": 1e30})
    outcome = Outcome("diverged", [0.01, 0.0], [3.7, float("nan")], {"16x2": 0.0}, 8)
    row = json.loads(json.dumps(lane_row({"optim.lr": 1e30}, trial, outcome), allow_nan=False))
    assert row["status"] == "diverged" and row["accuracy"] is None and row["segments"] == {}
    assert row["losses"] == [3.7, None] and row["curve"] == [0.01, 0.0]
    assert lane_line({}, trial, outcome).endswith("taps 3: diverged after 2 epochs, 0.0 s")


def test_points_of_one_config_are_trained_once_and_told(tmp_path, monkeypatch):
    monkeypatch.setattr(LaneEngine, "train", lambda self, progress, name, options: None)
    said, sweep = [], Sweep(BASE, [{"seed": 1}, {"seed": np.int64(1)}, {"optim.lr": np.float64(3e-3)}])
    run_sweep(sweep, Store(tmp_path), "test", SweepOptions(), said.append)
    assert said[0] == "1 of 3 points come to the same config as another one, and are trained once."
    assert said[1].startswith("0 of 2 points have rows; 2 are left, in 1 groups, ")


def test_a_full_disk_stops_a_sweep_in_one_sentence(tmp_path, monkeypatch):
    sweep, store = Sweep(BASE, product(param("model.d_model", [8, 16]))), Store(tmp_path)
    outcome = Outcome("finished", [0.5], [1.0], {}, 4)
    monkeypatch.setattr(lane_training, "train_lanes", lambda trials, *_, **__: [(x, outcome) for x in trials])

    def append(row):
        raise StoreError("Store is full.")

    monkeypatch.setattr(store, "append", append)
    with pytest.raises(StoreError, match="Store is full"):
        run_sweep(sweep, store, "test", SweepOptions(), lambda text: None)
    assert not list(tmp_path.iterdir())


def test_a_warmup_that_nobody_gave_leaves_steps_after_it():
    small = {"optim.schedule": "warmup_cosine"}
    assert [make_trial(BASE, small | {"epochs": n}).optim.warmup_steps for n in (2, 50, 51)] == [0, 20, 200]
    assert make_trial(BASE, {}).optim.warmup_steps == 200  # which its schedule does not ask for
    assert make_trial(BASE, small | {"optim.warmup_steps": 200}).optim.warmup_steps == 200


def test_an_impossible_point_stops_a_sweep_before_it_starts(tmp_path):
    with pytest.raises(UserError, match=r"optim\.lrr"):
        run_sweep(Sweep(BASE, [{"optim.lrr": 1}]), Store(tmp_path), "test", SweepOptions())
    assert not list(tmp_path.iterdir())


SWEEP = """
from based_jax.sweep import Sweep, param, product
BASE = {base!r}
def get_sweep():
    return Sweep(BASE, product(param("model.d_model", range(8, 20, 4)), param("optim.lr", [1e-3, 1e-2])))
"""


@pytest.mark.parametrize("how", [pytest.param(signal.SIGKILL, marks=pytest.mark.long), signal.SIGINT])
def test_a_stopped_sweep_goes_on_without_redoing_or_losing_a_point(how, tmp_path):
    file, store = tmp_path / "sweep.py", tmp_path / "store"
    file.write_text(SWEEP.format(base=BASE))
    command = [sys.executable, "-m", "based_jax", "sweep", "run", str(file), f"--store={store}"]
    # A shell's background jobs ignore interrupts, and so would what they start.
    interruptible = functools.partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, preexec_fn=interruptible, **pipes)
    before = []
    while len(before) < 2:
        assert process.poll() is None
        before = Store(store).rows()
        time.sleep(0.05)
    process.send_signal(how)
    said = process.communicate(timeout=20)[1]
    assert process.returncode == {signal.SIGKILL: -9, signal.SIGINT: 130}[how]
    assert ("the same command goes on" in said) == (how == signal.SIGINT) and "Traceback" not in said
    before = Store(store).rows()
    sweep = load_sweep(str(file))
    assert 2 <= len(before) < 6
    left = run_sweep(sweep, Store(store), "sweep", SweepOptions(), lambda _: None)
    after = Store(store).rows()
    assert left == 6 - len(before) and len(after) == 6
    assert all(row in after for row in before)
    lines = [json.loads(line) for path in store.glob("*.jsonl") for line in path.read_text().splitlines()]
    assert len(lines) == 6  # nothing was trained twice
