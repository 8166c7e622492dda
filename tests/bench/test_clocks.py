"""The clock and the power of a GPU while it works: nvidia-smi's lines, and which GPU it is asked about."""

import time
import types

import pytest

from based_jax.bench import clocks


def test_medians_leave_out_what_is_not_told_and_lines_that_are_cut():
    text = "1980, 1980, 120.5, 700.00\n1600, 1980, 690.0, [N/A]\n1590, 1980, 698.0, 700.00\n15"
    assert clocks.medians_of(text) == {
        "sm_clock_mhz": 1600,
        "max_sm_clock_mhz": 1980,
        "watts": 690,
        "limit_watts": 700,
    }
    assert clocks.medians_of("") == {}


@pytest.mark.parametrize(("visible", "number", "name"), [("", 1, "1"), ("3, 1", 1, "1"), ("GPU-7f", 0, "GPU-7f")])
def test_a_process_asks_about_its_own_gpu(monkeypatch, visible, number, name):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert clocks.smi_id(number) == name


def test_the_program_is_asked_while_the_block_runs(monkeypatch, tmp_path):
    program = tmp_path / "nvidia-smi"
    program.write_text(
        '#!/bin/sh\ncase "$*" in *--id=5*) ;; *) exit 1 ;; esac\n'
        'while :; do echo "1500, 1980, 700, 700"; sleep 0.05; done\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    gpu = types.SimpleNamespace(platform="gpu", local_hardware_id=0)
    with clocks.recorded(gpu) as clock:
        time.sleep(0.5)
    assert clock["sm_clock_mhz"] == 1500
    with clocks.recorded(types.SimpleNamespace(platform="cpu")) as nothing:
        pass
    assert nothing == {}
