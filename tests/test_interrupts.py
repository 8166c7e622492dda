import signal
import subprocess
import sys

import pytest

from based_jax import __main__ as program
from based_jax.commands import eval, interrupts

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


def test_sigterm_cleans_up_as_ctrl_c_does():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt, match="Stopped by a signal"), interrupts.sigterm_is_ctrl_c():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_ctrl_c_leaves_at_once():
    with subprocess.Popen(
        [sys.executable, "-c", BUSY], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        for said in ("busy\n", "asked\n"):
            assert process.stdout.readline() == said
            process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error == "Left at the second signal; what was saved before it is whole.\n"
