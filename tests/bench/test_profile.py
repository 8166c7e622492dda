"""`bench profile` without a GPU: which kernels are looked for, and what Nsight Compute's words become."""

import pytest

from based_jax.__main__ import main
from based_jax.bench import kernels, profile
from based_jax.bench.catalogue import TIMED

RAW = """==PROF== Connected
"ID","Kernel Name","gpu__time_duration.sum","sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",\
"launch__occupancy_limit_registers","launch__occupancy_limit_warps","launch__registers_per_thread",\
"smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio",\
"smsp__average_warps_issue_stalled_wait_per_issue_active.ratio",\
"smsp__average_warps_issue_stalled_wait_not_issued_per_issue_active.ratio"
"","","ns","%","block","block","register/thread","inst","inst","inst"
"0","taylor_sums","12,345","20.5","2","8","168","0.5","1.25","1"
"1","taylor_forward(void *)","40000","41","1","8","168","2.5","0.25","1"
"""


def test_launches_are_those_of_their_calls(capsys):
    call = kernels.place("taylor_attention", "hopper_chunks", (8, 16, 2048), "forward+backward")
    rows = profile.launches(RAW, [call | {"launches": 2}])
    assert [row["kernel"] for row in rows] == ["taylor_sums", "taylor_forward"]
    first = rows[0]
    assert first["microseconds"] == 12.35 and first["tensor_percent"] == 20.5 and first["blocks_at_once"] == 2
    assert list(first["stalls"].items()) == [("wait", 1.25), ("barrier", 0.5)] and first["seq_len"] == 2048
    assert "taylor_sums: microseconds=12.35 tensor=20.5" in profile.line(first)
    assert "batch" not in profile.launches(RAW, [])[0] and "0 expected" in capsys.readouterr().out


def test_a_call_is_printed_with_its_kernels():
    parts = [{"kernel": "taylor_forward", "launches": 1, "microseconds": 30.0}]
    call = kernels.place("taylor_attention", "hopper_chunks", (8, 16, 2048), "forward")
    row = {"view": "call", **call, "microseconds": 31.5, "idle_microseconds": 1.5, "kernels": parts}
    assert profile.line(row) == "taylor_attention (8,16,2048) forward: 31.5 us, idle 1.5: taylor_forward=30.0"


def test_every_kernel_of_a_call_is_looked_for():
    assert profile.TimedSelection(["taylor_attention"], [(1, 2, 3)]).kernels() == "taylor_"
    wanted = profile.TimedSelection(list(TIMED), [(1, 2, 3)])
    assert {"short_conv", "recurrence", "selective_scan", "one_decay_", "channel_decays_"} <= {
        *wanted.kernels().split("|")
    }
    assert wanted.words()[-2:] == ["--shapes", "1x2x3"]


def test_the_implementations_are_those_that_run_our_kernels_or_those_named():
    wanted = profile.TimedSelection(["simple_gla", "attention"], [(1, 2, 3)])
    forms = {
        "simple_gla": ("triton_chunks", "hopper_steps"),
        "attention": ("hopper_tiles", "hopper_turns", "triton_tiles"),
    }
    ours = [(operation, impl) for operation, impls in forms.items() for impl in impls]
    assert [*wanted.calls()] == [(operation, (1, 2, 3), impl) for operation, impl in ours]
    named = profile.TimedSelection(["simple_gla", "attention"], [(1, 2, 3)], ["cudnn"])
    assert [*named.calls()] == [("attention", (1, 2, 3), "cudnn_flash")]


@pytest.mark.parametrize(
    "words, message",
    [
        (["--ops", "nothing"], "Unknown operation 'nothing'"),
        (["--shapes", "8x16"], "'8x16' is no shape"),
        ([], "needs ncu on the PATH"),
    ],
)
def test_bad_input_is_one_sentence(words, message, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    assert main(["bench", "profile", *words]) == 2
    assert message in capsys.readouterr().err
