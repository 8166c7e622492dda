"""`bench train` on eight devices of a CPU."""

import json
import math
import re
from pathlib import Path

import jax
import pytest

from based_jax import config as configs
from based_jax import flops, parallel
from based_jax.__main__ import main
from based_jax.bench import train
from based_jax.bench.memory import program_bytes
from based_jax.train.compile import train_program
from based_jax.train.run import TrainConfig

CONFIG = str(Path(__file__).parents[2] / "configs" / "mqar_tiny.py")
SMALL = ["--config.batch_size=16", "--config.model.d_model=32"]


def test_a_row_says_how_fast_a_step_is_and_what_it_takes(tmp_path, capsys):
    out = tmp_path / "deep" / "train.jsonl"
    assert main(["bench", "train", f"--config={CONFIG}", "--steps=2", "--documents=3", f"--out={out}", *SMALL]) == 0
    row = json.loads(out.read_text())
    assert (row["rows"], row["devices"], row["steps"], row["device"]) == (16, 8, 2, "cpu")
    assert (row["seq_len"], row["documents"], row["remat"], row["compiled_before"]) == (64, 3, "none", False)
    assert row["tokens_per_second"] == pytest.approx(16 * row["seq_len"] / row["milliseconds"] * 1e3, rel=1e-3)
    assert row["compile_seconds"] > row["trace_seconds"] > 0 and row["program_bytes"] > 0 and "mfu" not in row
    assert row["command"].startswith("python -m based_jax") and row["versions"]["jax"] == jax.__version__
    assert row["impls"]["linear_cross_entropy"] == ["xla_logits"] and row["breakdown"] is None
    assert f"(16,{row['seq_len']}) on 8 x cpu" in capsys.readouterr().out


def test_a_row_of_a_mesh_says_what_is_exchanged_and_that_no_query_key_or_value_is(tmp_path, capsys):
    """Over "tensor" and "sequence" an operation's inputs stay with the device that runs it for them."""
    out, width = tmp_path / "train.jsonl", 48
    layers = "[('taylor', {'num_heads': 2, 'feature_dim': 4}), ('window', {'num_heads': 2, 'window': 5})]"
    words = [f"--config.model.layers={layers}", f"--config.model.d_model={width}", "--config.batch_size=64"]
    words += ["--config.mesh.data=2", "--config.mesh.tensor=2", "--config.mesh.sequence=2"]
    assert main(["bench", "train", f"--config={CONFIG}", "--steps=1", f"--out={out}", *words]) == 0
    row = json.loads(out.read_text())
    assert row["mesh"] == {"data": 2, "tensor": 2, "sequence": 2} and row["processes"] == 1
    assert row["tokens_per_second_per_device"] == row["tokens_per_second"] / 8
    assert {x["kind"] for x in row["exchanged"]} >= {"all-reduce", "collective-permute"}
    tokens = row["rows"] // 2 * row["seq_len"] // 2  # of a device
    gathered = [x["array"] for x in row["exchanged_arrays"] if x["kind"] in ("all-gather", "all-to-all")]
    sizes = [math.prod(map(int, filter(None, re.split(r"\D", array.partition("[")[2])))) for array in gathered]
    assert max(sizes) < tokens * width // 2  # queries, keys or values of half the heads
    assert "on 8 x cpu, data 2, tensor 2, sequence 2" in capsys.readouterr().out


def test_a_row_is_printed_with_what_is_known():
    facts = dict.fromkeys(("rows", "seq_len", "devices", "steps"), 1)
    row = facts | {"device": "NVIDIA H100", "milliseconds": 2.0, "tokens_per_second": 5e5, "mfu": 0.4321, "hfu": 0.5}
    row |= {"program_bytes": 3 << 20, "peak_bytes": 5 << 20, "compile_seconds": 1.0, "compiled_before": True}
    row |= {"impls": {"attention": ["cudnn_flash"]}, "breakdown": None}
    first, impls = train.lines(row)
    assert "2.00 ms a step, 500000 tokens/s, MFU 0.432, HFU 0.500; 3 MiB for a step, 5 MiB at most" in first
    assert first.endswith("read from the disk in 1.0 s") and impls.strip() == "attention cudnn_flash"
    del row["mfu"], row["hfu"]
    assert "tokens/s; 3 MiB for a step, - at most" in train.lines(row | {"peak_bytes": None})[0]


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_the_products_that_remat_makes_again_are_counted(remat):
    """Of a layer that is products alone: all are made again but the last, whose result the backward pass needs not."""
    overrides = [("model.layers", "[('conv', {})]"), ("model.remat", remat), ("batch_size", "2")]
    config = configs.build(TrainConfig, configs.load(CONFIG, overrides))
    program = train_program(config, parallel.make_mesh(devices=jax.devices()[:1]))
    batch = train.random_batch(config, 0, 1)
    products = flops.matrix_products(program.trace_step(batch).jaxpr.jaxpr)
    model, tokens = config.model, batch["inputs"].size
    D, F, head = model.d_model, model.hidden_dim, model.padded_vocab_size
    forward = 2 * tokens * D * (6 * D + 3 * F + head)
    again = 2 * tokens * D * (6 * D + 2 * F) if remat == "full" else 0
    assert products == 3 * forward + again


@pytest.mark.long
def test_a_donated_state_is_counted_once():
    config = configs.build(TrainConfig, configs.load(CONFIG, []))
    program = train_program(config, parallel.make_mesh(devices=jax.devices()[:1]))
    step = program.lower_step(config.data.open(config.batch_size).batch(0)).compile()
    state = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(program.abstract_state))
    memory = step.memory_analysis()
    assert memory.alias_size_in_bytes >= 0.9 * state
    assert program_bytes(step) < memory.argument_size_in_bytes + memory.temp_size_in_bytes + 0.1 * state


def test_no_steps_are_no_measurement(capsys):
    assert main(["bench", "train", f"--config={CONFIG}", "--steps=0"]) == 2
    assert "steps is 0" in capsys.readouterr().err
