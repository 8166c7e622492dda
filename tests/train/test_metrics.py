import io
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from based_jax.errors import UserError
from based_jax.train import metrics
from based_jax.train.metrics import MetricWriter, progress


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def write(workdir, steps, first_step=0):
    with MetricWriter(workdir, first_step) as writer:
        for step in steps:
            writer.write(step, {"loss": 1 / step})


def test_rows_are_scalars_of_any_kind(tmp_path):
    with MetricWriter(tmp_path / "new") as writer:
        writer.write(3, {"loss": jnp.float32(0.5), "accuracy": np.float64(0.25), "state_bytes": 7, "device": "cpu"})
        assert rows(tmp_path / "new") == [{"step": 3, "loss": 0.5, "accuracy": 0.25, "state_bytes": 7, "device": "cpu"}]


def test_what_is_not_finite_is_null_in_valid_json(tmp_path):
    with MetricWriter(tmp_path) as writer:
        writer.write(1, {"loss": jnp.float32(math.nan), "norm": math.inf, "lr": 0.1})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"step": 1, "loss": None, "norm": None, "lr": 0.1}


def test_arrays_are_refused(tmp_path):
    with MetricWriter(tmp_path) as writer, pytest.raises(ValueError):
        writer.write(1, {"loss": np.zeros(2)})
    assert rows(tmp_path) == []


def test_a_resumed_file_equals_an_unbroken_one(tmp_path):
    write(tmp_path / "unbroken", range(1, 9))
    write(tmp_path / "broken", range(1, 7))
    with (tmp_path / "broken" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')
    write(tmp_path / "broken", range(5, 9), first_step=5)
    written = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("unbroken", "broken")]
    assert written[0] == written[1]


def test_a_half_written_last_line_is_dropped(tmp_path):
    write(tmp_path, [1, 2])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3')
    write(tmp_path, [4], first_step=4)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 4]


def test_a_run_from_scratch_starts_an_empty_file(tmp_path):
    write(tmp_path, [1, 2])
    write(tmp_path, [1])
    assert [row["step"] for row in rows(tmp_path)] == [1]


def test_rows_that_no_checkpoint_holds_are_set_aside(tmp_path):
    write(tmp_path, range(1, 7))
    with MetricWriter(tmp_path, first_step=5) as writer:
        assert writer.set_aside == tmp_path / "metrics_set_aside_from_step_5.jsonl"
    write(tmp_path, [5], first_step=5)
    write(tmp_path, [], first_step=5)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4]
    lines = writer.set_aside.read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": step, "loss": 1 / step} for step in (5, 6, 5)]
    with MetricWriter(tmp_path, first_step=5) as writer:
        assert writer.set_aside is None


class FullDisk(io.FileIO):
    """A file on a disk that takes five bytes more."""

    def write(self, data):
        if len(data) <= 5:
            raise OSError(28, "No space left on device")
        return super().write(data[:5])


def test_what_a_full_disk_cuts_off_is_no_row(tmp_path):
    with MetricWriter(tmp_path) as writer:
        writer.write(1, {"loss": 0.5})
        writer._rows._file = FullDisk(tmp_path / "metrics.jsonl", "ab")
        with pytest.raises(UserError, match=r"metrics.jsonl' cannot be written: No space left on device\."):
            writer.write(2, {"loss": 0.25})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 0.5}\n'
    write(tmp_path, [2], first_step=2)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2]


@pytest.mark.parametrize("operation", ["write", "flush"])
def test_events_that_a_full_disk_refuses_are_one_sentence(tmp_path, monkeypatch, operation):
    def refuse(*args):
        raise OSError(28, "No space left on device")

    with (
        pytest.raises(UserError, match=r"events.out.tfevents' cannot be written: No space"),
        MetricWriter(tmp_path) as w,
    ):
        monkeypatch.setattr(w._events._file._py_recordio_writer, operation, refuse)
        w.write(1, {"loss": 0.5})
    assert [row["step"] for row in rows(tmp_path)] == [1]


def test_a_file_of_something_else_is_named_and_kept(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("loss,step\n")
    with pytest.raises(UserError, match=r"metrics.jsonl' holds a line that is no row"):
        MetricWriter(tmp_path, first_step=3)
    assert (tmp_path / "metrics.jsonl").read_text() == "loss,step\n"


def test_tensorboard_receives_the_numbers(tmp_path):
    with MetricWriter(tmp_path) as writer:
        writer.write(1, {"loss": 0.5, "device": "abacus"})
    events = b"".join(path.read_bytes() for path in tmp_path.glob("events.*"))
    assert b"loss" in events
    assert b"abacus" not in events


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_pipe_gets_plain_lines_with_eta(monkeypatch):
    clock = iter([100.0, 110.0])
    monkeypatch.setattr(metrics.time, "monotonic", lambda: next(clock))
    stream = io.StringIO()
    lines = progress(50, first_step=20, stream=stream)
    lines.update(30, {"loss": jnp.float32(2.34567), "tokens": 12, "device": "cpu"})
    lines.say("saved")
    assert stream.getvalue() == "step 30/50 eta 0:00:20 loss 2.346 tokens 12 device cpu\nsaved\n"


def test_output_that_is_refused_is_one_sentence(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(stream, "write", raising_full_disk, raising=False)
    with pytest.raises(UserError, match=r"^'standard output' cannot be written: No space left on device\.$"):
        progress(10, stream=stream).say("saved")


def raising_full_disk(*_):
    raise OSError(28, "No space left on device")


def test_the_eta_leaves_compilation_out(monkeypatch):
    clock = iter([0.0, 100.0, 104.0])
    monkeypatch.setattr(metrics.time, "monotonic", lambda: next(clock))
    stream = io.StringIO()
    lines = progress(10, stream=stream)
    lines.begin(1)
    lines.update(1, {})
    lines.update(3, {})
    assert stream.getvalue() == "step 1/10\nstep 3/10 eta 0:00:14\n"


def test_the_bar_leaves_compilation_out_too(monkeypatch):
    bar = progress(10, stream=Terminal())
    now = bar._bar.start_t + 100
    monkeypatch.setattr(bar._bar, "_time", lambda: now)
    bar.begin(1)
    assert (bar._bar.n, bar._bar.initial) == (1, 1)
    assert bar._bar.format_dict["elapsed"] == 0


def test_a_terminal_gets_a_bar():
    stream = Terminal()
    bar = progress(50, first_step=20, stream=stream)
    bar.update(30, {"loss": 2.0})
    bar.say("saved")
    bar.close()
    assert "30/50" in stream.getvalue()
    assert "loss 2" in stream.getvalue()
    assert "saved\n" in stream.getvalue()
