"""`bench train` of several configs and of other libraries' models, each in a process of its own."""

import importlib.util
import subprocess
import types

import pytest

from based_jax.__main__ import main
from based_jax.bench import train_peers
from based_jax.bench.train_size import Size


@pytest.fixture
def commands(monkeypatch):
    """Let processes end at once, the second of them with a failure; return what they were called with."""
    found = []

    def run(command):
        found.append(command[2:])
        return types.SimpleNamespace(returncode=-9 if len(found) == 2 else 0)

    monkeypatch.setattr(subprocess, "run", run)
    return found


def test_several_configs_run_one_after_the_other_and_a_failure_is_told(commands, tmp_path):
    words = ["--config", "a.py:1b", "b.py", "--config=c.py", "--rows=8", "--seq-len=4096", "--no-profile"]
    assert main(["bench", "train", *words, f"--out={tmp_path / 'rows'}", "--config.model.remat=none"]) == 1
    assert [command[3] for command in commands] == ["--config=a.py:1b", "--config=b.py", "--config=c.py"]
    rest = ["--steps=20", "--documents=1", "--rows=8", "--seq-len=4096", "--config.model.remat=none"]
    assert commands[0][:3] == ["based_jax", "bench", "train"]
    assert commands[0][4:] == [*rest, f"--out={tmp_path / 'rows'}", "--no-profile"]


def test_peers_run_beside_a_config_where_they_are_installed(commands, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "jla" else name)
    main(["bench", "train", "--config=a.py", "--peers"])
    started = [command[3] for command in commands]
    assert started == ["--config=a.py", *(f"--peer={name}" for name in train_peers.PEERS if name.startswith("fla:"))]
    assert "jla:kda-1p3b: jla not installed." in capsys.readouterr().out


def test_a_peer_s_row_has_the_fields_of_ours(monkeypatch):
    def measure(name, size):
        return {"milliseconds": 100.0, "remat": "full", "peak_bytes": 3 << 20, "seen": name}

    monkeypatch.setitem(train_peers.PEERS, "jla:mine", train_peers.Peer((), (), "mine", measure))
    row = train_peers.measure("jla:mine", Size(2, 50, 3))
    assert (row["rows"], row["seq_len"], row["steps"], row["tokens_per_second"]) == (2, 50, 3, 1000.0)
    assert row["seen"] == "mine" and row["device"] == "cpu" and "jax" in row["versions"]
    assert train_peers.line(row) == "(2,50) on cpu: 100.00 ms a step, 1000 tokens/s; 3 MiB at most"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "There is nothing to time"),
        (["--peer=jla:nothing"], "'jla:nothing'"),
        (["--documents=0"], "documents is 0"),
    ],
)
def test_what_cannot_be_timed_is_one_sentence(words, message, capsys, tmp_path):
    config = ["--config=configs/mqar_tiny.py", "--config.batch_size=8"] if words and "documents" in words[0] else []
    assert main(["bench", "train", *config, *words]) == 2
    assert message in capsys.readouterr().err
