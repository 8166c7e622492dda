import gc
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from based_jax import __main__ as program
from based_jax.commands import eval, interrupts
from based_jax.data import packing

TEXT_CONFIG = Path(__file__).parents[1] / "configs" / "text_tiny.py"

BUSY = """
import os, signal, time
from based_jax.commands import interrupts

signal.signal(signal.SIGINT, lambda *_: print("asked", flush=True))
with interrupts.second_one_leaves():
    print("busy", flush=True)
    while True:
        time.sleep(60)
"""


def test_ctrl_c_is_one_sentence_of_any_command(monkeypatch, capsys):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(eval, "run", interrupted)
    assert program.main(["eval", "--workdir=runs/none"]) == 130
    assert capsys.readouterr() == ("", "Stopped by Ctrl-C.\n")


@pytest.mark.parametrize("signum, told", interrupts.SENTENCES.items())
def test_a_signal_ends_any_command_with_its_sentence(monkeypatch, capsys, signum, told):
    before = signal.getsignal(signum), sys.unraisablehook
    monkeypatch.setattr(eval, "run", lambda args: signal.raise_signal(signum))
    assert program.main(["eval", "--workdir=runs/none"]) == 130
    assert capsys.readouterr() == ("", f"{told}\n")
    assert (signal.getsignal(signum), sys.unraisablehook) == before


@pytest.mark.parametrize("signum, told", interrupts.SENTENCES.items())
def test_a_signal_that_falls_into_the_garbage_collector_is_heard_again(signum, told):
    lost = []

    def callback(phase, info):
        if phase == "start" and len(lost) < 2:
            lost.append(signum)
            signal.raise_signal(signum)

    with pytest.raises(KeyboardInterrupt, match=told), interrupts.second_one_leaves(), interrupts.stopped_by_signals():
        gc.callbacks.append(callback)
        try:
            gc.collect()
            assert lost == [signum]
            time.sleep(10)
        finally:
            gc.callbacks.remove(callback)


def test_a_signal_that_is_ignored_stays_ignored(monkeypatch, capsys):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as of a command behind nohup
    try:
        monkeypatch.setattr(eval, "run", lambda args: signal.raise_signal(signal.SIGINT))
        assert program.main(["eval", "--workdir=runs/none"]) == 0
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_signal_while_text_is_packed_leaves_nothing_half_written(tmp_path, monkeypatch, capsys):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("The cat sat on the mat. " * 99)
    words = [
        f"--config.data.{name}={tmp_path / folder}" for name, folder in (("path", "texts"), ("cache_dir", "cache"))
    ]
    command = ["prepare", f"--config={TEXT_CONFIG}", *words, "--config.data.seq_len=16"]
    written = packing.TokenWriter.write

    def interrupted(self, ids):
        written(self, ids)
        signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(packing.TokenWriter, "write", interrupted)
        assert program.main(command) == 130
    assert capsys.readouterr().err.endswith("Stopped by a signal.\n")
    assert [path.suffix for path in (tmp_path / "cache" / "packed_text").iterdir()] == [".lock"]
    assert program.main(command) == 0 and "packed in" in capsys.readouterr().out


def test_a_second_ctrl_c_leaves_at_once():
    with subprocess.Popen(
        [sys.executable, "-c", BUSY], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        for said in ("busy\n", "asked\n"):
            assert process.stdout.readline() == said
            process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error == "Ended at once by the second signal; what had been saved by then is complete.\n"
