"""The pages of several GPUs, from rows as benchmarks write them, and what their runs are compared by."""

import argparse
import json

import jax
import numpy as np
import pytest

from based_jax.errors import UserError
from experiments.several_gpus import fed, layouts, points, processes, runs, serving, sweeping, table
from experiments.train_speed import links, mesh, mesh_plots

DEVICE = {"device": "NVIDIA H200"}
BASED = "configs/based.py:1b"


def step(rows, devices, speed, axes=None, **more):
    sizes = {"config": BASED, "rows": rows, "seq_len": 2048, "mesh": axes or {}, "devices": devices, "remat": "none"}
    moved = [{"kind": "all-gather", "axes": ["fsdp"], "count": 9, "bytes": 1.5e9}] if axes else []
    facts = {"exchanged": moved, "breakdown": None, "milliseconds": 16384e3 / speed}
    return sizes | {mesh.PER_DEVICE: speed} | DEVICE | facts | more


EXCHANGE = {"exchange": {"milliseconds": 12.34, "exposed": 0.56, "kinds": {}}}
ROWS = [
    step(8, 1, 60_000.0),
    step(16, 2, 57_600.0, {"fsdp": 2}, breakdown=EXCHANGE),
    step(16, 2, 30_000.0, {"fsdp": 2}, breakdown=None, xla_flags="--xla_gpu_autotune_level=0"),
    step(16, 2, 59_400.0, {"fsdp": 2}, mocked_topology="1x2x1"),
]
AHEAD = {
    "command": "python -m based_jax aot --program=train "
    + " ".join(mesh.aot_words(mesh.Point(mesh.SIZES[0], "fsdp", 2))),
    "seconds": {"compute": 0.135, "memory": 0.062, "links": 0.007},
    "estimate": {"schedule_seconds": 0.171, "exposed_seconds": 0.0004},
    "memory": {"peak": 48 << 30},
}


def test_a_gpu_among_several_stands_beside_one_alone():
    [found] = mesh.measured(ROWS, [AHEAD])
    assert (found.efficiency, found.bound, found.point.goal) == (0.96, 0.99, 0.95)
    told = mesh.table([found]).splitlines()[-1]
    assert (
        "`based_1b` | 8 x 2,048 | fsdp 2 | 57,600 | 60,000 | 96.0% | 95.0% | 99.0% | 12.3, 0.6 | all-gather 1.50"
        in told
    )
    assert told.endswith("| 135 + 62 + 7 | 171, 0.4 | 48.0 |")


def test_what_was_only_compiled_says_so_and_flags_stand_apart():
    [found] = mesh.measured(ROWS[:1], [AHEAD])
    assert "| fsdp 2 | not measured | 60,000 |  | 95.0% |" in mesh.table([found])
    assert "`--xla_gpu_autotune_level=0` | 546.1 | 284.4 |" in mesh.flags_table(ROWS)
    assert mesh.flags_table(ROWS[:2]) == "None has been tried." and mesh.table([]) == "None has been measured."


def test_points_are_those_of_the_goals():
    found = {point.name: point for point in mesh.points(2)}
    assert found["based_1b 8 x 2,048 fsdp"].words[1] == "--rows=16"
    assert found["attention_1b 1 x 131,072 sequence"].goal == 0.9
    assert found["based_360m 16 x 2,048 tensor"].goal is None
    assert {point.axis for point in mesh.points(1)} == {mesh.ONE}


def test_the_picture_of_several_gpus(tmp_path):
    bars = [mesh_plots.Bar("based_1b 8 x 2,048 fsdp", 2, 0.96, 0.95), mesh_plots.Bar("based_1b data", 2, 0.5, None)]
    drawn = mesh_plots.draw(bars, {"NVIDIA H200"}, tmp_path / "mesh")
    assert {path.suffix for path in drawn} == {".png", ".svg", ".pdf"} and all(path.stat().st_size for path in drawn)
    with pytest.raises(UserError, match="no rows of several GPUs"):
        mesh_plots.draw([], [], tmp_path / "mesh")


def test_links_are_told_by_kind_and_size():
    row = {
        "kind": "all-gather",
        "mib": 8,
        "devices": 2,
        "microseconds": 179.1,
        "sent_bytes_per_second": 46.8e9,
    } | DEVICE
    lines = links.table([row | {"microseconds": 1.0}, row]).splitlines()
    assert "2 x NVIDIA H200 | 1 MiB" in lines[0] and "| `all-gather` |  | 47 (179 us) |" in lines[-1]
    assert links.table([]) == "None has been measured."


def test_losses_are_compared_step_by_step():
    found = layouts._compared({1: 3.0, 2: 2.5, 9: 1.0}, {1: 3.25, 2: 2.5})
    assert (found["largest_difference"], found["last_difference"], found["steps"]) == (0.25, 0.0, [1, 2, 9])
    row = {"what": "restored", "saved": "one", "restored": "fsdp 2"} | found | DEVICE
    [told] = layouts.table([row])
    assert (told["run"], told["largest difference"], told["at the end"]) == (
        "saved on one, restored on fsdp 2",
        "2.5e-01",
        "0",
    )


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("digest, alike", [("c", True), ("d", False)])
def test_batches_that_are_fed_again_are_compared_with_those_of_an_unbroken_run(tmp_path, digest, alike):
    for run, digests in (("whole_first", {0: "a", 1: "b", 2: "c"}), ("broken_again", {1: "b", 2: digest})):
        write(tmp_path / f"{run}_0.jsonl", [{"step": step, "sha256": x} for step, x in digests.items()])
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
        write(
            tmp_path / name / "metrics.jsonl", [{"step": 1, "loss": 3.0, "device": "cpu"}, {"step": 1, "accuracy": 0}]
        )
    (tmp_path / "broken_first_0.log").write_text("one\nError: Process 1 of 2 is gone.\n")
    args = argparse.Namespace(devices=1, axis="fsdp", kill_after=2, config="c", rows=8)
    row = processes._row(args, tmp_path, {"whole": [0]})
    assert (row["batches"], row["batches_alike"], row["went_on_after"]) == (2, alike, 1)
    assert (row["said"], row["largest_difference"], row["device"]) == ("Error: Process 1 of 2 is gone.", 0.0, "cpu")
    assert processes.table([row])[0]["batches fed again, bitwise alike"] == ("2, all" if alike else "2, NOT all")


def test_a_digest_is_of_names_places_and_numbers(tmp_path):
    one = {"inputs": jax.numpy.arange(4)}
    others = {"inputs": jax.numpy.arange(4) + 1}, {"labels": jax.numpy.arange(4)}
    assert fed.digest(one) == fed.digest({"inputs": jax.device_put(np.arange(4, dtype=np.int32))})
    assert fed.digest(one) not in map(fed.digest, others)
    read = fed.recording(str(tmp_path / "fed.jsonl"), lambda read, steps: map(read, steps))(lambda step: one, [3, 4])
    assert list(read) == [one, one]
    rows = [json.loads(line) for line in (tmp_path / "fed.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [3, 4] and {row["sha256"] for row in rows} == {fed.digest(one)}


def test_points_an_hour_and_tokens_stand_beside_those_of_one_gpu():
    rows = [
        {"launcher": "local", "sweep": "s", "devices": n, "processes": 4 * n, "points": 48, "points_per_hour": speed}
        | DEVICE
        for n, speed in ((1, 1000.0), (2, 1900.0))
    ]
    assert [x["of one GPU's times their number"] for x in sweeping.table(rows)] == ["100.0%", "95.0%"]
    served = {"devices": 2, "clients": 64, "tokens_per_second": 1234.5} | DEVICE
    assert [x["how"] for x in serving.table([{"how": how} | served for how in ("replicas", "tensor")])] == [
        "a replica a GPU",
        "`--mesh=tensor`",
    ]


@pytest.mark.parametrize("variant, count, groups", [("whole", 24, 12), ("tiny", 4, 2)])
def test_the_sweep_has_as_many_groups_as_it_says(variant, count, groups):
    found = points.get_sweep(variant).trials()
    assert len(found) == count and len({(x.model.d_model, x.model.layers) for _, x in found}) == groups


def test_devices_are_those_that_are_there(monkeypatch, tmp_path):
    monkeypatch.setattr(runs, "visible_gpus", lambda: ["3", "5"])
    assert runs.environment([1], 2) == {"CUDA_VISIBLE_DEVICES": "5"}
    with pytest.raises(UserError, match=r"^--devices is 4; 2 GPUs are there\.$"):
        runs.environment([0], 4)
    monkeypatch.setattr(runs, "visible_gpus", list)
    assert runs.environment([0, 1], 2) == {"JAX_NUM_CPU_DEVICES": "2", "JAX_PLATFORMS": "cpu"}
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(UserError, match="is not empty"):
        runs.new_folder(tmp_path / "full")


def test_the_page_has_a_place_for_each_table():
    page = table.README.read_text()
    assert [f"<!-- {name} -->" in page for name in table.TABLES] == [True] * len(table.TABLES)
