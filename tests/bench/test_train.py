"""`bench train` on eight devices of a CPU."""

import json
from pathlib import Path

import jax
import pytest

from based_jax import config as configs
from based_jax import parallel
from based_jax.__main__ import main
from based_jax.bench import train
from based_jax.train.compile import train_program
from based_jax.train.run import TrainConfig

CONFIG = str(Path(__file__).parents[2] / "configs" / "mqar_tiny.py")
SMALL = ["--config.batch_size=16", "--config.model.d_model=32"]


def test_a_row_says_how_fast_a_step_is_and_what_it_takes(tmp_path, capsys):
    out = tmp_path / "deep" / "train.jsonl"
    assert main(["bench", "train", f"--config={CONFIG}", "--steps=2", f"--out={out}", *SMALL]) == 0
    row = json.loads(out.read_text())
    assert (row["batch_size"], row["devices"], row["steps"], row["device"]) == (16, 8, 2, "cpu")
    assert row["tokens_per_second"] == pytest.approx(16 * row["seq_len"] / row["milliseconds"] * 1e3, rel=1e-3)
    assert row["compile_seconds"] > 0 and row["program_bytes"] > 0 and "mfu" not in row
    assert row["command"].startswith("python -m based_jax") and row["versions"]["jax"] == jax.__version__
    assert f"(16,{row['seq_len']}) on 8 x cpu" in capsys.readouterr().out


def test_a_row_is_printed_with_what_is_known():
    facts = dict.fromkeys(("batch_size", "seq_len", "devices", "steps"), 1)
    row = facts | {"device": "NVIDIA H100", "milliseconds": 2.0, "tokens_per_second": 5e5, "mfu": 0.4321}
    row |= {"program_bytes": 3 << 20, "peak_bytes": 5 << 20, "compile_seconds": 1.0}
    assert "2.00 ms a step, 500000 tokens/s, MFU 0.432; 3 MiB for a step, 5 MiB at most" in train.line(row)
    del row["mfu"]
    assert "tokens/s; 3 MiB for a step, - at most" in train.line(row | {"peak_bytes": None})


@pytest.mark.long
def test_a_donated_state_is_counted_once():
    config = configs.build(TrainConfig, configs.load(CONFIG, []))
    program = train_program(config, parallel.make_mesh(devices=jax.devices()[:1]))
    step = program.lower_step(config.data.open(config.batch_size).batch(0)).compile()
    state = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(program.abstract_state))
    memory = step.memory_analysis()
    assert memory.alias_size_in_bytes >= 0.9 * state
    assert train.program_bytes(step) < memory.argument_size_in_bytes + memory.temp_size_in_bytes + 0.1 * state


def test_no_steps_are_no_measurement(capsys):
    assert main(["bench", "train", f"--config={CONFIG}", "--steps=0"]) == 2
    assert "steps is 0" in capsys.readouterr().err
