"""A run that is killed ends like an unbroken one: SIGKILL, SIGTERM and Ctrl-C, wherever they strike."""

import random
import signal
import time

import pytest

from tests.helpers.command_processes import CommandProcess
from tests.helpers.tiny_runs import VALUES, assert_same_run, losses, saved_steps

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


class Killed:
    """A run that is begun again and again, beside an unbroken one of the same config."""

    def __init__(self, folder, **changes):
        self.folder, self.workdir = folder, folder / "killed"
        (folder / "config.py").write_text(f"def get_config():\n    return {VALUES | changes!r}\n")

    def begin(self, workdir):
        words = ("train", f"--config={self.folder / 'config.py'}", f"--workdir={workdir}")
        return CommandProcess(words, self.folder)

    def kill_after(self, step, signum, seconds=0.0):
        """Send a signal once a step has been logged, and return what `end` does."""
        process = self.begin(self.workdir)
        while process.is_alive() and max((s for s, _ in losses(self.workdir)), default=0) < step:
            time.sleep(0.005)
        time.sleep(seconds)
        process.send(signum)
        return process.end()

    def assert_ends_like_an_unbroken_one(self):
        for workdir in (self.workdir, self.folder / "unbroken"):
            code, _, error = self.begin(workdir).end()
            assert (code, error) == (0, "")
        assert_same_run(self.workdir, self.folder / "unbroken")


def test_a_run_that_was_killed_terminated_and_interrupted_ends_like_an_unbroken_one(tmp_path):
    run = Killed(tmp_path, steps=90, checkpoint={"every": 10})

    # the save after step 20 waits until that after step 10 is complete
    assert run.kill_after(25, signal.SIGKILL)[0] == -signal.SIGKILL
    killed = losses(run.workdir)[-1][0]
    assert 0 < max(saved_steps(run.workdir)) <= killed < 90

    code, out, error = run.kill_after(killed + 5, signal.SIGTERM)
    stopped = losses(run.workdir)[-1][0]
    assert (code, error) == (0, "")
    assert f"Stopped by a signal; step {stopped} is saved" in out
    assert saved_steps(run.workdir)[-1] == stopped < 90

    code, out, error = run.kill_after(stopped + 5, signal.SIGINT)
    stopped = losses(run.workdir)[-1][0]
    assert code == 130
    assert error == f"Stopped by Ctrl-C; step {stopped} is saved, and the same command continues from it.\n"
    assert saved_steps(run.workdir)[-1] == stopped < 90

    run.assert_ends_like_an_unbroken_one()
    assert [step for step, _ in losses(run.workdir)] == list(range(1, 91))
    aside = list(run.workdir.glob("metrics_set_aside_from_step_*.jsonl"))
    assert len(aside) <= 1, "only SIGKILL leaves rows that no checkpoint holds"


@pytest.mark.long
def test_24_random_kills(tmp_path):
    draw = random.Random(22)
    run = Killed(tmp_path, steps=600, checkpoint={"every": 7})
    for kill in range(24):
        signum = SIGNALS[kill % 3]
        done = max((step for step, _ in losses(run.workdir)), default=0)
        steps = draw.choice([0, 1, draw.randrange(2, 40)])  # 0: while it starts or compiles
        code, _, error = run.kill_after(
            done + steps, signum, draw.uniform(0.05, 3) if steps == 0 else draw.random() / 20
        )
        assert (
            code
            in {
                signal.SIGKILL: (-signal.SIGKILL,),
                signal.SIGTERM: (0, 130),  # the latter before its loop
                signal.SIGINT: (130,),
            }[signum]
        )
        assert "Traceback" not in error
    assert 0 < losses(run.workdir)[-1][0] < 600
    run.assert_ends_like_an_unbroken_one()
