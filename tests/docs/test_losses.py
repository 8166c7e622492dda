"""Where we lose: found in rows that are made here, and nothing where there is nothing."""

import json

import pytest

from docs.hooks import losses
from experiments.kernels import results


def row(op, impl, microseconds, device="GPU", which="forward"):
    place = {"op": op, "impl": impl, "pass": which, "batch": 1, "heads": 2, "seq_len": 64}
    return place | {"microseconds": microseconds, "device": device, "versions": {}}


@pytest.fixture
def kernels_of(tmp_path, monkeypatch):
    """Return a function that writes rows, and returns the lines of the table of them."""
    monkeypatch.setattr(results, "FOLDER", tmp_path)

    def lines(*rows):
        (tmp_path / "bench.jsonl").write_text("".join(json.dumps(x) + "\n" for x in rows))
        return losses.kernels().splitlines()

    return lines


def test_the_best_of_ours_is_held_against_the_best_of_others_on_one_device(kernels_of):
    ours = row("delta_rule", "hopper_steps", 90.0), row("delta_rule", "triton_chunks", 30.0)
    theirs = row("delta_rule", "fla_chunk", 20.0), row("delta_rule", "torch_sdpa", 25.0)
    [_, _, line] = kernels_of(*ours, *theirs, row("norm", "hopper", 1.0), row("norm", "fla_norm", 2.0))
    assert line == (
        "| `delta_rule` | (1, 2, 64) | forward | `triton_chunks` | 30.0 | `fla_chunk` | 20.0 | 1.50 | GPU |"
    )


def test_what_is_faster_now_or_was_timed_elsewhere_is_no_loss(kernels_of):
    before, after = row("delta_rule", "triton_chunks", 30.0), row("delta_rule", "triton_chunks", 10.0)
    assert kernels_of(before, row("delta_rule", "fla_chunk", 20.0), after) == [losses.NOTHING]
    elsewhere = row("delta_rule", "fla_chunk", 20.0, device="another")
    assert kernels_of(before, elsewhere) == [losses.NOTHING]
    assert kernels_of(before) == [losses.NOTHING]
