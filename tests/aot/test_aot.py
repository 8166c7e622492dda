"""The command `aot`: on the eight devices of the tests in place of GPUs, and where libtpu is installed for a TPU."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from helpers.tpu_compiler import SLICES, needs_libtpu
from jax.sharding import NamedSharding

from based_jax import parallel
from based_jax.__main__ import main
from based_jax.aot import compiling, topology
from based_jax.commands.aot import parse_mesh
from based_jax.errors import UserError
from based_jax.revision import revision

TINY = """
def get_config():
    return {
        "model": {"layers": [["linear", {"num_heads": 2}]] * 3, "d_model": 64, "vocab_size": 384, "mlp_dim": 192,
                  "scan_layers": True},
        "data": {"kind": "text", "tokenizer": "bytes", "seq_len": 32},
        "optim": {"warmup_steps": 0},
        "batch_size": 16,
        "microbatches": 2,
    }
"""
TWO_LAYERS = """
def get_config():
    return {
        "model": {"layers": [["taylor", {"num_heads": 8}], ["window", {"num_heads": 4, "window": 64}]],
                  "d_model": 256, "vocab_size": 384, "mlp_dim": 512},
        "data": {"kind": "text", "tokenizer": "bytes", "seq_len": 256},
        "optim": {"warmup_steps": 0},
        "batch_size": 16,
    }
"""
KERNELS = "taylor_chunks", "taylor_query_gradients", "taylor_key_gradients", "window_forward", "window_gradients"
"""Of both layers, on a TPU."""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "tiny.py"
    path.write_text(TINY)
    return path


@pytest.fixture
def stand_ins(monkeypatch):
    """Let the devices of the tests stand for GPUs of one host."""
    found = topology.Topology("h100:1x8", 1, jax.devices(), "NVIDIA H100 80GB HBM3", (1, 8))
    monkeypatch.setattr(topology, "find", lambda name, slices: found)


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_step_is_compiled_and_told(config, stand_ins, tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    arguments = ["--topology=h100:1x8", "--mesh=data:2,fsdp:4", f"--config={config}", f"--out={out}"]
    assert main(["aot", *arguments]) == 0
    train, decode = rows_of(out)
    assert (train["program"], decode["program"]) == ("train", "decode")
    assert train["revision"] == decode["revision"] == revision()
    assert train["command"] == decode["command"] == " ".join(["python -m based_jax", *sys.argv[1:]])
    assert train["mesh"] == {"data": 2, "fsdp": 4} and train["tokens"] == 16 * 32 and decode["tokens"] == 16
    assert train["flops"] == pytest.approx(train["model_flops"], rel=0.1)
    assert decode["flops"] == pytest.approx(decode["model_flops"], rel=0.3)
    assert {"all-gather"} <= {x["kind"] for x in train["exchanged"]}
    assert train["exchanged_bytes"] == sum(x["bytes"] for x in train["exchanged"]) > train["fsdp_bytes"] > 0
    assert train["memory_bytes"] >= sum(train["traffic"].values()) > train["memory_bytes"] / 2
    assert train["estimate"]["sum_seconds"] == pytest.approx(sum(train["seconds"].values()))
    assert train["memory"]["peak"] > train["memory"]["arguments"] > 0 and train["largest_buffers"]
    told = capsys.readouterr().out
    assert told.count("estimate") == 2 and "all-gather" in told and "times the" in told


def test_rows_of_a_device_take_the_place_of_the_batch(config, stand_ins, tmp_path):
    out = tmp_path / "rows.jsonl"
    arguments = [f"--config={config}", "--topology=h100:1x8", "--mesh=fsdp:4,tensor:2", "--rows-per-device=3"]
    assert main(["aot", *arguments, f"--out={out}", "--program=decode"]) == 0
    [row] = rows_of(out)
    assert row["tokens"] == 3 * 4


def test_a_program_that_does_not_fit_is_refused_with_its_largest_buffers(config, stand_ins, monkeypatch, capsys):
    monkeypatch.setattr(compiling, "memory_of", lambda _: compiling.Memory(0, 0, 0, 0, 0, peak=81 * 10**9))
    assert main(["aot", f"--config={config}", "--topology=h100:1x8", "--program=decode"]) == 2
    told = capsys.readouterr()
    assert "77,248 MiB of 76,294 MiB" in told.out
    assert re.search(r"^Error: The program does not fit: it needs 77,248 MiB .* largest buffers are f32\[", told.err)


def moved(*after):
    """Return a program that moves rows over all devices to lie as the axes `after` say."""
    mesh = parallel.make_mesh({"data": 2, "fsdp": 4})
    x = jax.ShapeDtypeStruct((16, 8, 32), jnp.float32, sharding=NamedSharding(mesh, jax.P(("data", "fsdp"))))
    with jax.set_mesh(mesh):
        return jax.jit(lambda x: jax.lax.with_sharding_constraint(jnp.tanh(x), jax.P(*after)) * 2).lower(x)


def test_what_a_compiler_copies_to_all_devices_is_heard():
    [copied] = compiling.compiled(moved(None, None, "fsdp")).rematerialized
    assert "f32[2,8,32]" in copied
    assert compiling.compiled(moved("data", None, "fsdp")).rematerialized == []


def test_copies_to_all_devices_are_refused(config, stand_ins, monkeypatch, capsys):
    compiled = compiling.compiled
    monkeypatch.setattr(
        compiling, "compiled", lambda lowered: compiled(lowered)._replace(rematerialized=["%x = f32[8]"])
    )
    assert main(["aot", f"--config={config}", "--topology=h100:1x8", "--program=decode"]) == 2
    assert "(involuntary full rematerialization) at 1 operations: %x = f32[8]." in capsys.readouterr().err


def test_what_is_written_to_standard_error_is_collected_and_no_longer_shown(capfd):
    lines = []
    with compiling.captured_stderr(lines):
        os.write(2, b"from C++\n")
    os.write(2, b"after\n")
    assert lines == ["from C++"]
    assert capfd.readouterr().err == "after\n"


ABORTING = """
import os
from based_jax.aot import compiling

with compiling.captured_stderr([]):
    os.write(2, b"fine\\n")
with compiling.captured_stderr([]):
    os.write(2, b"Check failed: a == b\\n")
    os.abort()
"""


def test_what_is_collected_is_shown_where_the_process_dies_of_it(tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", ABORTING], stderr=subprocess.PIPE, env=os.environ | {"TMPDIR": str(tmp_path)}, timeout=60
    )
    assert run.returncode == -signal.SIGABRT
    assert run.stderr == b"Check failed: a == b\n" and not list(tmp_path.iterdir())


REPORT = """Used 81.00G of 15.75G hbm. Memory usage report:
Memory Space: default (color=0)
  cumulative_size;       size;       offset; used_by_n_values; shapes_list
   40.00GiB( 98%);   40.00GiB;            0;                1; f32[40,1,16384,16384]
   41.00GiB(100%);    1.00GiB;            0;               40; 40×f32[1,16384]
   40.00GiB(100%);   40.00GiB;            0;               40; 40×f32[40,1,16384,16384]
Memory Space: vmem (color=1)
    1.00MiB(100%);    1.00MiB;            0;                1; f32[512,512]"""


def test_a_compiler_that_runs_out_of_memory_is_told_in_one_sentence():
    error = "RESOURCE_EXHAUSTED: HLO temporaries (81.00G) exceeds available HBM (15.75G). HLO module: a."
    fits_not = "The program does not fit: it takes 81.00G of the 15.75G that a device has"
    assert compiling.too_much([error]) == f"{fits_not}."
    buffers = "its largest buffers are f32[40,1,16384,16384] (40.00GiB), f32[1,16384] (1.00GiB)"
    assert compiling.too_much([error, *REPORT.splitlines()]) == f"{fits_not}; {buffers}."


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            "--mesh=data:2,fsdp:4",
            "Mesh {'data': 2, 'fsdp': 4, 'tensor': 1, 'sequence': 1} needs 8 devices; there are 512",
        ),
        ("--mesh=data:8,fsdp:32", "needs 256 devices; there are 512"),
        ("--mesh=fsd:4", "Mesh axis 'fsd' does not exist; the axes are data, fsdp, tensor, sequence."),
        ("--mesh=fsdp:0", "Mesh axis 'fsdp' has 0 devices; it is at least 1."),
        ("--mesh=data:1,fsdp:512", "Mesh axis 'data' has 1 devices; it is a multiple of the 2 slices"),
        (
            "--mesh=tensor:4 --rows-per-device=1",
            "of model.layers[0], 'linear', is 2, which cannot be divided over 4",
        ),
        ("--mesh=sequence:64 --rows-per-device=1", "Sequences of 32 tokens cannot be divided over 64 devices"),
        ("--mesh=fsdp:256", "batch_size 16 cannot be divided over 512 devices of the mesh axes data and fsdp"),
        ("--rows-per-device=0", "rows_per_device is 0; it is at least 1, or None."),
        ("--rows-per-device=1 --config.optim.warmup_steps=1000", "warmup_steps"),
        ("--rows-per-device=1 --text={config}", "cannot be a folder: a file is in the way."),
    ],
)
def test_what_needs_no_compiler_is_checked_before_one_is_loaded(config, monkeypatch, capsys, arguments, told):
    monkeypatch.setattr(topology, "_check_compiler", lambda platform: pytest.fail("the compiler is loaded"))
    words = arguments.format(config=config).split()
    assert main(["aot", f"--config={config}", "--topology=v5e:16x16", "--slices=2", *words]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "slices", "devices"),
    [("v5e:16x16", 2, 512), ("v7x:2x2x1", 2, 16), ("v5p:8x8x8", 1, 512), ("h100:4x8", 1, 32)],
)
def test_a_name_tells_how_many_devices_there_are(name, slices, devices):
    assert topology.device_count(name, slices) == devices


@pytest.mark.parametrize(
    ("name", "slices", "message"),
    [
        ("v9:2x2", 1, r"^Unknown chip of a topology 'v9': .*Allowed: h100, h200, v4, v5e, v5p, v6e, v7x\.$"),
        ("v5e:2x2x2", 1, r"^Topology 'v5e:2x2x2' is none of v5e: it is like 'v5e:16x16'\.$"),
        ("v5p:0x1x1", 1, r"^Topology 'v5p:0x1x1' is none of v5p"),
        ("v5e", 1, r"^Topology 'v5e' is none of v5e"),
        ("h100:2x8", 2, r"^slices is 2; it is at least 1, and of GPUs 1"),
        ("v5e:2x2", 0, r"^slices is 0; it is at least 1"),
    ],
)
def test_a_topology_that_there_is_not_is_refused(name, slices, message):
    with pytest.raises(UserError, match=message):
        topology.find(name, slices)


def test_a_compiler_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name, extra in (("v5e:2x2", "tpu"), ("h100:1x8", "gpu")):
        with pytest.raises(UserError, match=rf"is not installed; pip install -e '\.\[{extra}\]' in the checkout"):
            topology.find(name)


@pytest.mark.parametrize("text", ["data", "data:", "data:2:3", "data:2,data:4", "data:-1", "data:two"])
def test_a_mesh_that_is_none_is_refused(text):
    with pytest.raises(UserError, match=rf"^Mesh '{text}' is none"):
        parse_mesh(text)


def test_a_mesh_gives_each_axis_its_devices():
    assert parse_mesh("data:8,fsdp:64") == {"data": 8, "fsdp": 64}
    assert parse_mesh("") == {}


@needs_libtpu
@pytest.mark.long
@pytest.mark.parametrize("name", SLICES)
def test_a_step_of_two_of_based_s_layers_is_compiled_for_each_generation(name, tmp_path):
    path, out = tmp_path / "two.py", tmp_path / "rows.jsonl"
    path.write_text(TWO_LAYERS)
    words = [f"--config={path}", f"--topology={name}", f"--mesh=fsdp:{topology.device_count(name)}", f"--out={out}"]
    assert main(["aot", "--program=train", *words]) == 0
    [train] = rows_of(out)
    assert train["device"] == topology.find(name).device_kind and not train["unknown_loops"]
    assert train["exchanged_bytes"] > 0 and train["flops"] >= 0.9 * train["model_flops"]
    runs = {kernel: told["runs"] for kernel, told in train["kernels"].items()}
    assert runs.items() >= dict.fromkeys(KERNELS, 1).items(), runs


@needs_libtpu
@pytest.mark.long
def test_a_tpu_slice_is_compiled_for(config, tmp_path):
    out = tmp_path / "rows.jsonl"
    assert main(["aot", f"--config={config}", "--topology=v5e:2x2", "--mesh=fsdp:4", f"--out={out}"]) == 0
    train, _ = rows_of(out)
    for name in ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "v7x:2x2x1"):
        assert topology.device_count(name, slices=2) == len(topology.find(name, slices=2).devices)
    assert train["device"] == "TPU v5 lite" and train["exchanged_bytes"] > 0 and not train["unknown_loops"]
    assert train["flops"] == pytest.approx(train["model_flops"], rel=0.1)
