import errno
import json
import os
import socket
import threading
import time

import filelock
import pytest

from based_jax.__main__ import main
from based_jax.errors import UserError
from based_jax.train import workdir as workdirs
from based_jax.train.run import load_run
from based_jax.train.workdir import checked_workdir, held, wait_for_trainings
from tests.helpers.tiny_runs import VALUES, contents


def test_a_second_training_is_refused_with_host_and_pid_and_reading_goes_on(whole, tmp_path, capsys):
    (tmp_path / "config.py").write_text(f"def get_config():\n    return {VALUES!r}\n")
    with held(whole):
        before = contents(whole)
        assert main(["train", f"--config={tmp_path / 'config.py'}", f"--workdir={whole}"]) == 2
        assert capsys.readouterr() == (
            "",
            f"Error: '{whole}' is trained in by process {os.getpid()} of host '{socket.gethostname()}';"
            " wait for it, or choose another workdir.\n",
        )
        assert contents(whole) == before
        assert load_run(whole)[1] == 8
        assert contents(whole) == before


def test_the_lock_of_a_dead_process_holds_nobody_up(tmp_path):
    (tmp_path / "train.lock").write_text('{"host": "elsewhere", "pid": 1}\n')
    with held(tmp_path):
        assert json.loads((tmp_path / "train.lock").read_text())["pid"] == os.getpid()
    with held(tmp_path):
        pass


def test_who_waits_for_a_training_lets_it_end_and_leaves_its_name(tmp_path):
    ended = []

    def train():
        with held(tmp_path):
            begun.set()
            time.sleep(0.2)
            ended.append(json.loads((tmp_path / "train.lock").read_text())["pid"])

    begun, thread = threading.Event(), threading.Thread(target=train)
    thread.start()
    assert begun.wait(5)
    wait_for_trainings(tmp_path)
    assert ended == [os.getpid()]
    thread.join()
    wait_for_trainings(tmp_path / "none")


def test_a_lock_that_says_nothing_is_one_sentence_too(tmp_path):
    with (
        filelock.FileLock(tmp_path / "train.lock"),
        pytest.raises(UserError, match="is trained in by another process; wait"),
        held(tmp_path),
    ):
        pass


@pytest.mark.parametrize("error", [OSError(errno.ENOLCK, "No locks available"), NotImplementedError("no flock")])
def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, caplog, error):
    def acquire(*args, **kwargs):
        raise error

    monkeypatch.setattr(filelock.FileLock, "acquire", acquire)
    with held(tmp_path / "new"):
        assert f"train.lock' cannot be locked ({error.args[-1]})" in caplog.text


def test_a_read_only_folder_is_named_before_anything_is_done(tmp_path, monkeypatch):
    monkeypatch.setattr(workdirs.os, "access", lambda path, mode: path != tmp_path)
    for path in (tmp_path, tmp_path / "new" / "run"):
        with pytest.raises(UserError, match=f"'{path}' cannot be written: Permission denied."):
            checked_workdir(path)
    assert not list(tmp_path.iterdir())
