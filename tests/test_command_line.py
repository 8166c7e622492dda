"""What the command line says: help, what ends a command, and where output goes."""

import argparse
import os
import shlex
import subprocess
import sys

import pytest

import based_jax
from based_jax import config as configs
from based_jax.__main__ import command_line, main
from based_jax.commands import describe
from based_jax.commands.serve import LIMITS
from based_jax.nn.lm import LMConfig
from based_jax.nn.mixers import MIXERS
from based_jax.optim import OptimConfig
from based_jax.serve.limits import Limits
from based_jax.train.checkpoint import CheckpointConfig
from based_jax.train.run import TrainConfig

PRINTS_MUCH = """
import sys
from based_jax.__main__ import main
from based_jax.commands import describe
from based_jax.commands.serve import LIMITS
describe.run = lambda args: print("much\\n" * 100_000)
sys.exit(main())
"""


def parsers(parser, words=()):
    """Yield the words and the parser of a command line's every command."""
    yield words, parser
    for action in parser._actions:
        for name, command in (action.choices or {}).items() if isinstance(action, argparse._SubParsersAction) else ():
            yield from parsers(command, (*words, name))


PARSERS = dict(parsers(command_line()))


@pytest.mark.parametrize("words", PARSERS, ids=" ".join)
def test_every_help_has_examples_that_parse(words, monkeypatch):
    monkeypatch.setattr(PARSERS[words], "details", None)
    _, _, examples = PARSERS[words].format_help().partition("examples:\n")
    lines = examples.splitlines()
    assert lines and all(line.startswith(f"  {' '.join(['python -m based_jax', *words])}") for line in lines)
    for line in lines:
        arguments = shlex.split(line)[3:]
        if "--help" not in arguments:
            _, others = command_line().parse_known_args(arguments)
            assert all(word.startswith("--config.") for word in others)


def test_help_of_serve_has_the_limits_by_default():
    details = PARSERS[("serve",)].details()
    assert all(f"--{name.replace('_', '-')}={getattr(Limits(), name)}" in details.split() for name in LIMITS)


def test_help_of_train_explains_overrides_and_lists_every_key_and_option(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["help", "train"])
    out = capsys.readouterr().out
    assert stop.value.code == 0 and "--config.KEY=VALUE" in out
    for key in configs.keys_of(TrainConfig):
        assert f"  {key.name}: " in out
    assert "  optim.lr: float = 0.0008\n      peak learning rate.\n" in out
    assert all(f"  ('{kind}', {{" in out for kind in MIXERS)


@pytest.mark.parametrize("cls", [LMConfig, OptimConfig, CheckpointConfig, TrainConfig])
def test_every_key_has_a_meaning(cls):
    assert not [key.name for key in configs.keys_of(cls) if not key.meaning]


def test_the_version_and_no_command(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"based_jax {based_jax.__version__}\n"
    assert main([]) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.startswith("usage: python -m based_jax") and "describe" in error


def test_the_script_speaks_of_itself(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/based_jax", "eval", "--help"])
    with pytest.raises(SystemExit):
        main()
    out = capsys.readouterr().out
    assert out.startswith("usage: based_jax eval") and "\n  based_jax eval --workdir" in out


def raising(error):
    def run(args):
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (KeyboardInterrupt(), 130, "Stopped by Ctrl-C.\n"),
        (MemoryError(), 1, "Error: There is not enough memory; lower 'batch_size'"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes."), 1, "Error: There is not enough memory"),
    ],
    ids=["interrupt", "memory", "memory of a device"],
)
def test_what_ends_a_command_is_one_sentence(error, code, sentence, capsys, monkeypatch):
    monkeypatch.setattr(describe, "run", raising(error))
    assert main(["describe"]) == code
    out, said = capsys.readouterr()
    assert out == "" and said.startswith(sentence) and said.count("\n") == 1


@pytest.mark.parametrize("error", [RuntimeError("a defect"), BrokenPipeError("of a socket")])
def test_a_defect_keeps_its_traceback(error, monkeypatch):
    monkeypatch.setattr(describe, "run", raising(error))
    with pytest.raises(type(error)):
        main(["describe"])


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_letters_that_the_output_lacks_are_spelled(encoding):
    program = PRINTS_MUCH.replace('"much\\n" * 100_000', '"cafe", "\\u6771"')
    done = subprocess.run(
        [sys.executable, "-c", program, "describe"],
        env={**os.environ, "PYTHONIOENCODING": encoding},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "cafe \\u6771\n", "")


def test_output_on_a_full_disk_is_one_sentence(tmp_path):
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))"
    with (tmp_path / "out").open("w") as out:
        done = subprocess.run(
            [sys.executable, "-c", limit + PRINTS_MUCH, "describe"], stdout=out, stderr=subprocess.PIPE, text=True
        )
    assert (done.returncode, done.stderr) == (2, "Error: What is printed cannot be written: File too large.\n")


def test_a_pipe_that_closes_is_no_error():
    command = (
        f"{shlex.quote(sys.executable)} -c {shlex.quote(PRINTS_MUCH)} describe | head -n 1; exit ${{PIPESTATUS[0]}}"
    )
    done = subprocess.run(["bash", "-c", command], env=os.environ, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (141, "much\n", "")
