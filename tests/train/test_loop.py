import contextlib
import dataclasses
import itertools
import json
import os
import shutil
import signal
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx

import based_jax
from based_jax import config as configs
from based_jax import optim
from based_jax.errors import UserError
from based_jax.evals.evaluate import evaluate
from based_jax.nn.lm import LM
from based_jax.train import files, loop, metrics
from based_jax.train.checkpoint import CheckpointConfig
from based_jax.train.compile import train_program
from based_jax.train.goodput import Timer
from based_jax.train.loop import train
from based_jax.train.run import load_run
from tests.helpers.tiny_runs import assert_same_run, contents, losses, make_config, parameters, rows, saved_steps


def test_each_row_says_what_was_learned_how_fast_and_on_what(whole):
    config = make_config()
    logged = [row for row in rows(whole) if "loss" in row]
    assert [row["step"] for row in logged] == list(range(1, 9))
    lr = optim.schedule(config.optim, config.steps)
    np.testing.assert_allclose([row["lr"] for row in logged], [lr(step) for step in range(8)], rtol=1e-6)
    state_bytes = 4 * LM(config.model, rngs=nnx.Rngs(0)).state_size(16)
    for row in logged:
        assert row["state_bytes"] == state_bytes
        assert row["device"] == jax.devices()[0].device_kind
        assert row["tokens_per_second"] > 0 and 0 <= row["accuracy"] <= 1 and row["grad_norm"] > 0
    last = rows(whole)[-1]
    assert last["step"] == 8 and 0 < last["goodput"] < 1
    assert [row["eval/accuracy"] for row in rows(whole) if "eval/accuracy" in row]


def test_a_finished_run_is_only_evaluated_again(whole, tmp_path):
    workdir = shutil.copytree(whole, tmp_path / "run")
    results = train(make_config(), workdir)
    evaluated = next(row for row in rows(whole) if "eval/loss" in row)
    assert results["loss"] == pytest.approx(evaluated["eval/loss"])
    assert_same_run(workdir, whole)


def test_a_run_has_its_turn_when_step_and_evaluation_are_compiled(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "train_program", train_program)  # one of its own, of which nothing is compiled
    compiled: dict[str, list[str]] = {"before": [], "in": [], "behind": []}
    where = ["before"]

    @contextlib.contextmanager
    def turn(program, state):
        assert state.step == 0 and program.config.steps == 8
        where[0] = "in"
        yield
        where[0] = "behind"

    def listen(event, seconds, fun_name="", **_):
        if event == "/jax/core/compile/jaxpr_to_mlir_module_duration":
            compiled[where[0]].append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    train(make_config(), tmp_path / "run", turn)
    assert where == ["behind"] and compiled["in"] == [] != compiled["before"]
    assert_same_run(tmp_path / "run", whole)


def test_before_the_first_step_a_run_says_what_it_trains_on_what(whole, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(loop, "train_program", train_program)  # tracing says which implementations are taken
    config = make_config(steps=9, checkpoint={"every": None})
    based_jax.train(config, shutil.copytree(whole, tmp_path / "run"))  # as from a notebook
    said = capsys.readouterr().out.splitlines()
    params = LM(config.model, rngs=nnx.Rngs(0)).num_params()
    assert said[:8] == [
        f"devices: 8 x {jax.devices()[0].device_kind}",
        "mesh: data 8, fsdp 1, tensor 1, sequence 1",
        "batch: 8 rows, 1 a device",
        f"parameters: {params:,}",
        "train: 800 tokens, 50 examples of 16",
        "test: 128 tokens, 8 examples of 16",
        "residual_rms_norm: xla_rows",
        "gated_short_conv: xla_taps",
    ]
    begun = said.index("continuing from step 8")
    assert said[begun + 1] == "compiling; the first step follows"
    assert said[begun + 2].startswith("step 9/9 loss ")


def refuse_rows_from(monkeypatch, step):
    """Let the disk be full from the row of this step on."""
    append = files.RowFile.append

    def refuse(self, row):
        with files.writing(self.path):
            if row["step"] >= step:
                raise OSError(28, "No space left on device")
        append(self, row)

    monkeypatch.setattr(files.RowFile, "append", refuse)


def test_a_run_whose_rows_the_disk_refuses_saves_its_state(whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        refuse_rows_from(patch, step=5)
        with pytest.raises(UserError) as error:
            train(make_config(), tmp_path)
    path = tmp_path / "metrics.jsonl"
    assert str(error.value) == (
        f"'{path}' cannot be written: No space left on device; step 6 is saved, and the same command continues from it."
    )
    assert losses(tmp_path) == losses(whole)[:4]
    train(make_config(), tmp_path)
    assert losses(tmp_path) == losses(whole)[:4] + losses(whole)[6:]
    assert parameters(tmp_path) == parameters(whole)


def test_a_state_that_the_disk_refuses_too_is_the_same_sentence(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(28, "No space left on device")

    refuse_rows_from(monkeypatch, step=1)
    monkeypatch.setattr(loop.Checkpoints, "_start", refuse)
    with pytest.raises(UserError) as error:
        train(make_config(), tmp_path)
    assert str(error.value) == (
        f"'{tmp_path / 'metrics.jsonl'}' cannot be written: No space left on device, and the state is not saved: Cannot"
        f" save step 2 in '{tmp_path / 'checkpoints'}': No space left on device; there is no good checkpoint yet."
    )


def test_a_run_whose_output_nobody_reads_saves_its_state(whole, tmp_path, monkeypatch):
    def refuse(self, step, values):
        with files.writing("standard output"):
            raise BrokenPipeError(32, "Broken pipe")

    with monkeypatch.context() as patch, pytest.raises(UserError) as error:
        patch.setattr(metrics.Lines, "update", refuse)
        train(make_config(log_every=5), tmp_path)
    assert str(error.value) == (
        "'standard output' cannot be written: Broken pipe; step 6 is saved, and the same command continues from it."
    )
    train(make_config(), tmp_path)
    assert parameters(tmp_path) == parameters(whole)


def test_an_evaluation_that_is_interrupted_is_made_up_for(whole, tmp_path, monkeypatch):
    def interrupted(sums_of, batches):
        os.kill(os.getpid(), signal.SIGINT)
        return evaluate(sums_of, batches)

    for step in (4, 8):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match=f"step {step} is saved"):
            patch.setattr(loop, "evaluate", interrupted if step == 4 else Second(interrupted))
            train(make_config(eval_every=4), tmp_path)
        assert saved_steps(tmp_path)[-1] == step
        assert [row["step"] for row in rows(tmp_path) if "eval/loss" in row] == [4][: step // 8]
    results = train(make_config(eval_every=4), tmp_path)
    evaluations = [row for row in rows(tmp_path) if "eval/loss" in row]
    assert [row["step"] for row in evaluations] == [4, 8]
    assert evaluations[1] == next(row for row in rows(whole) if "eval/loss" in row)
    assert results["loss"] == evaluations[1]["eval/loss"]
    assert_same_run(tmp_path, whole)


class Second:
    """Calls `evaluate`, and from the second time on something else."""

    def __init__(self, call):
        self.calls = itertools.chain([evaluate], itertools.repeat(call))

    def __call__(self, *arguments):
        return next(self.calls)(*arguments)


def test_throughput_counts_only_the_steps_since_the_last_row_or_evaluation(tmp_path, monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: clock.now))
    with loop.Report(make_config(log_every=4), tmp_path, 0, checkpoints=None, timer=Timer()) as report:
        for step in range(1, 5):
            clock.now += 1.0
            report.step(step, {"loss": np.float32(1), "accuracy": np.float32(0)}, tokens=128)
            if step == 2:
                report.flush()
                clock.now += 100.0
                report.evaluation(step, {"loss": 1.0, "perplexity": 2.0, "accuracy": 0.0})
        report.flush()
    assert rows(tmp_path)[-1]["tokens_per_second"] == pytest.approx(128)


def test_evaluation_takes_no_part_in_throughput(tmp_path, monkeypatch):
    """A slow evaluation at a step that is logged comes after the row was written."""
    order = []
    monkeypatch.setattr(loop, "evaluate", lambda *args: order.append("evaluate") or {"loss": 1.0})
    monkeypatch.setattr(loop.Report, "evaluation", lambda *args: None)
    monkeypatch.setattr(loop.Report, "_write_step", lambda self, step, *args: order.append(step))
    train(make_config(steps=3, eval_every=2, checkpoint={"every": None}), tmp_path)
    assert order == [1, 2, "evaluate", 3, "evaluate"]


EXPLODING = {"optim": {"lr": 1e30, "warmup_steps": 6, "warmup_lr": 1e-3}, "checkpoint": {"every": 2}}


def test_a_loss_that_is_not_finite_stops_the_run_and_overwrites_nothing(tmp_path):
    config = make_config(**EXPLODING)
    before = None
    for _ in range(2):  # the second run continues from the last good checkpoint and meets the same step
        with pytest.raises(UserError, match=r"loss of step 3 is nan .* the last good checkpoint is step 2\."):
            train(config, tmp_path)
        assert saved_steps(tmp_path) == [2]
        before = before or contents(tmp_path / "checkpoints")
        assert contents(tmp_path / "checkpoints") == before
    assert rows(tmp_path)[-1]["loss"] is None


def test_a_loss_that_is_not_finite_before_any_checkpoint(tmp_path):
    with pytest.raises(UserError, match=r"loss of step 3 is nan .* there is no checkpoint yet\."):
        train(make_config(**EXPLODING | {"checkpoint": {"every": None}}), tmp_path)
    assert saved_steps(tmp_path) == []


def test_a_workdir_of_another_config_is_left_alone(whole, tmp_path):
    workdir = shutil.copytree(whole, tmp_path / "run")
    before = contents(workdir)
    with pytest.raises(UserError, match=r"belongs to another config: seed is 0 there and 1 here"):
        train(make_config(seed=1), workdir)
    assert contents(workdir) == before


def test_what_changes_no_number_may_differ_in_a_run_that_goes_on(whole, tmp_path):
    workdir = shutil.copytree(whole, tmp_path / "run")
    train(make_config(log_every=3, checkpoint={"every": None, "keep": 1}), workdir)
    assert json.loads((workdir / "config.json").read_text())["log_every"] == 3


def test_a_run_that_is_older_than_a_key_goes_on(whole, tmp_path):
    workdir = shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints" / "8")
    values = json.loads((workdir / "config.json").read_text())
    assert values["data"].pop("power_a", "absent") is None
    (workdir / "config.json").write_text(json.dumps(values))
    train(make_config(), workdir)
    assert "power_a" in json.loads((workdir / "config.json").read_text())["data"]
    assert_same_run(workdir, whole)


def test_a_checkpoint_for_other_shapes_is_named_and_kept(whole, tmp_path):
    config = make_config(model={"d_model": 32})
    shutil.copytree(whole / "checkpoints", tmp_path / "checkpoints")
    configs.save(config, tmp_path)
    before = contents(tmp_path / "checkpoints")
    with pytest.raises(UserError, match=r"checkpoints/8' is of another model: '.*' is .* there and .* here"):
        train(config, tmp_path)
    with pytest.raises(UserError, match="is of another model"):
        load_run(tmp_path)
    assert contents(tmp_path / "checkpoints") == before


def test_a_corrupt_last_checkpoint_is_named_and_the_one_before_taken(whole, tmp_path, caplog):
    workdir = shutil.copytree(whole, tmp_path / "run")
    files = [path for path in (workdir / "checkpoints" / "8").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    half = largest.stat().st_size // 2
    largest.write_bytes(largest.read_bytes()[:half] + bytes(half))
    assert load_run(workdir)[1] == 4
    assert "checkpoints/8' is corrupt" in caplog.text
    train(make_config(), workdir)
    assert saved_steps(workdir) == [4, 8]
    assert_same_run(workdir, whole)


@pytest.mark.long
def test_accumulated_steps_resume_too(tmp_path):
    config = make_config(batch_size=16, microbatches=2, steps=4, checkpoint={"every": 2})
    train(config, tmp_path / "whole")
    part = shutil.copytree(tmp_path / "whole", tmp_path / "part")
    shutil.rmtree(part / "checkpoints" / "4")
    other = shutil.copytree(part, tmp_path / "other")
    train(config, part)
    assert_same_run(part, tmp_path / "whole")
    train(dataclasses.replace(config, mesh={"tensor": 2}, microbatches=4), other)  # sums in another order
    assert losses(other) == [(step, pytest.approx(loss, rel=1e-4)) for step, loss in losses(part)]


def test_impossible_runs_are_refused_before_anything_is_written(tmp_path):
    workdir = tmp_path / "run"
    for changes, message in [
        ({"batch_size": 12}, "batch_size 12 cannot be divided over 8 devices"),
        ({"microbatches": 3}, "batch_size 8 cannot be divided into 3 microbatches"),
        (
            {"batch_size": 32, "microbatches": 8},
            "4 rows of a microbatch cannot be divided over 8 devices",
        ),
        ({"model": {"vocab_size": 32}}, "vocab_size is 32, but the data has ids up to 63"),
        ({"rows_per_device": 2, "microbatches": 4}, "4 rows of a microbatch cannot be divided over 8 devices"),
        ({"mesh": {"tensr": 2}}, "Mesh axis 'tensr' does not exist"),
        ({"model": {"layers": [["taylor", {"num_heads": 3}]]}}, "d_model 16 cannot be divided into 3 heads"),
        ({"optim": {"warmup_steps": 9}}, "warmup_steps is 9, but the run has 8 steps"),
        ({"steps": 0}, "steps is 0; it is at least 1"),
    ]:
        with pytest.raises(UserError, match=message):
            train(make_config(**changes), workdir)
        assert not workdir.exists(), message


def test_the_checkpoint_policy_is_the_configs(whole):
    assert make_config().checkpoint == CheckpointConfig(every=4, keep=2)
    assert saved_steps(whole) == [4, 8]
