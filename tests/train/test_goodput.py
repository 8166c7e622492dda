"""Where the wall time of a run went."""

import json
import os

import pytest

from based_jax.errors import UserError
from based_jax.train import goodput
from based_jax.train.goodput import PHASES, Timer, TimesFile


@pytest.fixture
def clock(monkeypatch):
    """Return a list whose last element is the time, of both clocks."""
    now = [0.0]
    monkeypatch.setattr(goodput.time, "monotonic", lambda: now[-1])
    monkeypatch.setattr(goodput.time, "time", lambda: now[-1])
    return now


def spent(timer, clock, **seconds):
    for phase, more in seconds.items():
        clock.append(clock[-1] + more)
        timer.done(phase)


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_time_is_split_by_phase(clock):
    timer = Timer()
    assert timer.split()["goodput"] == 0.0
    spent(timer, clock, init=1, data=2, step=5)
    spent(timer, clock, data=2)
    expected = dict.fromkeys(PHASES, 0.0) | {"init": 1.0, "data": 4.0, "step": 5.0}
    assert timer.split() == {f"time/{phase}": value for phase, value in expected.items()} | {
        "lost_steps": 0,
        "goodput": 0.5,
    }


def test_an_unknown_phase_is_an_error():
    with pytest.raises(KeyError):
        Timer().done("nap")


def test_a_killed_run_has_lost_what_its_last_checkpoint_lacks(clock, tmp_path):
    timer = Timer()
    with TimesFile(tmp_path, 0, timer) as times:
        spent(timer, clock, init=4, step=6)
        times.write(10)
        spent(timer, clock, step=3)
        times.write(15)  # its checkpoint, though, is never finished
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(f'{{"step": {step}}}\n' for step in range(1, 18)))
    os.utime(metrics, (14, 14))

    clock.append(100.0)  # nobody waits for it
    timer = Timer()
    with TimesFile(tmp_path, 10, timer) as times:
        spent(timer, clock, init=2, step=4)
        times.write(20)
    first, last = rows(tmp_path / "goodput.jsonl")
    assert (first["step"], first["lost_steps"], first["goodput"]) == (10, 0, 0.6)
    seconds = {phase: last[f"time/{phase}"] for phase in ("init", "step", "lost")}
    assert seconds == {"init": 6.0, "step": 10.0, "lost": 4.0}
    assert (last["step"], last["lost_steps"], last["goodput"]) == (20, 7, 0.5)


def test_steps_before_the_first_checkpoint_are_lost_too(clock, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 3}\n')
    timer = Timer()
    with TimesFile(tmp_path, 0, timer):
        assert timer.lost_steps == 3


def test_what_is_no_row_is_refused(tmp_path):
    (tmp_path / "goodput.jsonl").write_text("[]\n")
    with pytest.raises(UserError, match=r"goodput.jsonl' holds a line that is no row"):
        TimesFile(tmp_path, 0, Timer())


@pytest.mark.parametrize("row", ['{"step": 1}', '{"step": 1, "unix_time": NaN}', '{"step": 1, "unix_time": "noon"}'])
def test_a_row_without_its_times_is_named(tmp_path, row):
    path = tmp_path / "goodput.jsonl"
    path.write_text(f"{row}\n")
    with pytest.raises(UserError, match="holds a line that is no row of times"):
        TimesFile(tmp_path, 1, Timer())
    assert path.read_text() == f"{row}\n"
