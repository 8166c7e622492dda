"""The README of experiments/kernels and its rows agree; tables and pictures on rows made here."""

import itertools
import json

import pytest

from based_jax.bench.catalogue.operation import PASSES
from experiments.kernels import __main__ as command
from experiments.kernels import results, tables

FACTS = {"device": "NVIDIA H100 80GB HBM3", "versions": {"jax": "0.11.2"}, "command": "none"}


def bench(op, impl, shape, times, floors=(10.0, 20.0)):
    rows = []
    for which, time, floor in zip(PASSES, times, floors, strict=True):
        place = dict(zip(results.ROW_KEY, (op, impl, which, *shape), strict=True))
        rows.append(place | {"microseconds": time, "floor_microseconds": floor, "ratio_to_floor": time / floor} | FACTS)
    return rows


@pytest.fixture
def folder(tmp_path):
    rows = []
    for shape in ((64, 16, 256), (16, 16, 1024), (8, 16, 2048), (1, 16, 65536), (2, 16, 2048)):
        rows += bench("taylor_attention", "hopper", shape, (20.0, 50.0))
        rows += bench("taylor_attention", "fla_parallel_based", shape, (200.0, 1500.0))
        rows += bench("attention", "cudnn", shape, (90.4, 300.0))
    rows += bench("taylor_attention", "xla_quadratic", (64, 16, 256), (15.0, 90.0))
    rows += bench("gated_short_conv", "hopper", (8, 16, 2048), (11.0, 22.0))
    rows += bench("gated_short_conv", "xla", (8, 16, 2048), (33.0, 44.0))
    rows += [{"op": "attention", "error": "no memory"}]
    write(tmp_path / "bench_all.jsonl", rows)
    checks = [
        {"what": "window_attention (1)", "passed": True, "errors": {"o": 1e-3, "dq": 2e-3}},
        {"what": "dplr (1) impl=triton_chunks", "passed": False, "failure": "no row came"},
        {"what": "delta_rule_by_chunks (1)", "passed": True, "errors": {"o": 3e-3}},
        {"what": "dplr (1) impl=hopper_steps", "passed": False, "refused": "it needs cuda"},
    ]
    write(tmp_path / "check.jsonl", [row | FACTS for row in checks])
    write(tmp_path / "training.jsonl", [{"impl": "xla", "step": i, "loss": 1 / (i + 1)} | FACTS for i in range(3)])
    return tmp_path


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_readme_has_the_rows_it_was_made_from():
    text = tables.README.read_text()
    assert tables.render(text, results.FOLDER) == text, "run: python -m experiments.kernels table"
    assert [block[2] for block in tables.README_TABLE.finditer(text)] and set(tables.TABLES) == {
        block[2] for block in tables.README_TABLE.finditer(text)
    }


def test_tables_hold_the_times(folder):
    text = tables.by_length(folder)
    assert "| (8, 16, 2048) | 10 / 20 | **20 / 50** | 200 / 1500 | - | 90 / 300 | - | 10.0 / 30 |" in text
    assert "(64, 16, 256)" not in text and "(2, 16, 2048)" not in text and "H100 80GB HBM3; jax 0.11.2." in text
    assert tables.by_batch(folder).index("(2, 16, 2048)") < tables.by_batch(folder).index("(8, 16, 2048)")
    assert "| (64, 16, 256) | 20 / 50 | 15 / 90 | - | 0.8 / 1.8 |" in tables.short(folder)
    assert "| (8, 16, 2048) | 45 / 260 | 20 / 50 | 0.4 / 0.2 |" in tables.goals(folder)
    assert "| 10 / 20 | 11 / 22 | - | 33 / 44 | 1.1 / 1.1 | 3.0 / 2.0 |" in tables.others(folder)
    assert "| `window_attention` | `hopper_tiles` | 1 of 1 | 2.0e-03 |" in tables.checks(folder)
    assert "| `dplr` | `triton_chunks` | 1 of 2 | 3.0e-03 |" in tables.checks(folder)
    assert "`dplr` | `hopper_steps`" not in tables.checks(folder)
    assert tables.calls(folder) == tables.launches(folder) == tables.NO_ROWS


def test_a_readme_is_rewritten_between_its_markers(folder, capsys):
    readme = folder / "README.md"
    readme.write_text("before\n<!-- table: goals -->\nold\n<!-- end -->\nafter\n")
    assert command.main(["table", f"--results={folder}", f"--readme={readme}"]) == 0
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text and "45 / 260" in text
    assert "45 / 260" in capsys.readouterr().out


@pytest.mark.long
def test_pictures_are_drawn(folder):
    assert command.main(["plot", f"--results={folder}"]) == 0
    drawn = {path.name for path in folder.glob("*.png")}
    assert drawn == {"length.png", "batch.png", "short.png", "others.png", "training.png"}


def test_tables_hold_launches_and_calls(folder):
    place = dict(zip(results.ROW_KEY, ("taylor_attention", "hopper", "forward", 8, 16, 2048), strict=True))
    launch = {"view": "launch", "kernel": "taylor_forward", "microseconds": 40.0, "tensor_percent": 41.0, "stalls": {}}
    parts = [{"kernel": "taylor_forward_mosaic_gpu_kernel", "launches": 1, "microseconds": 30.0}]
    call = {"view": "call", "microseconds": 31.5, "idle_microseconds": 1.5, "kernels": parts}
    write(folder / "profile.jsonl", [place | row | FACTS for row in (launch, call)])
    assert "| `taylor_forward` | (8, 16, 2048) | 40 | 41 % |" in tables.launches(folder)
    assert "| forward | 32 | 1.5 | taylor_forward 30 |" in tables.calls(folder)


def test_revisions_are_compared_by_the_better_of_their_repeats(tmp_path):
    times = {("a", 1): (100.0, 50.0), ("a", 2): (110.0, 40.0), ("b", 1): (103.0, 41.0), ("b", 2): (99.0, 60.0)}
    rows = [
        {"op": "window_attention", "pass": which, "shape": [size], "revision": revision, "repeat": repeat} | FACTS
        for (revision, repeat), size, which in itertools.product(times, (0, 1), PASSES)
    ]
    rows = [row | {"microseconds": times[row["revision"], row["repeat"]][row["shape"][0]]} for row in rows]
    write(tmp_path / "revisions.jsonl", rows)
    assert "| `window_attention` | 2 | -1.0% to +2.5% | -1.0% to +2.5% |" in tables.revisions(tmp_path)
