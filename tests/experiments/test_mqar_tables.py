"""The tables of the frontier's README."""

import json
from pathlib import Path

import pytest
from helpers import synthetic_rows as synthetic

from based_jax.errors import UserError
from based_jax.pictures.configurations import configurations
from experiments.mqar_pareto import __main__ as command
from experiments.mqar_pareto import rows as recall_rows
from experiments.mqar_pareto import tables

FOLDER = Path(command.__file__).parent


def rows(**milliseconds):
    """Return rows of a model "m": for each way, or lanes2, the milliseconds of its steps on two segments."""
    for way, times in milliseconds.items():
        lanes = 2 if way == "lanes" else 1
        for segment, steps, time in zip("ab", (3000, 1000), times, strict=True):
            row = {"model": "m", "segment": segment, "steps_per_epoch": steps, "way": way, "lanes": lanes}
            yield row | {"milliseconds": time}


def point(layers, d_model, *accuracies):
    """Return a configuration with one seed for each accuracy."""
    data = {"test": [{"seq_len": 1024, "num_examples": 1}]}
    model = {"layers": layers, "d_model": d_model}
    return [
        {"id": "x", "accuracy": x, "segments": {}}
        | {"config": {"model": model, "data": data, "optim": {"lr": 1e-3}, "seed": seed}}
        for seed, x in enumerate(accuracies)
    ]


def window(size, *accuracies):
    return point([["base_conv", {"kernel_size": 3}], ["window", {"num_heads": 1, "window": size}]], 128, *accuracies)


def test_a_budget_buys_the_best_that_is_not_larger():
    found = configurations([*window(16, 0.2), *window(32, 0.5, 0.3), *window(64, 0.3)])
    head, _, line = tables.budgets(found).splitlines()
    assert head.startswith("| mixer | 8 KiB | 16 KiB | 32 KiB | 64 KiB |")
    assert line.startswith("| Sliding window | - | 0.200 | 0.400 | 0.400 | 0.400 |")


def test_an_accuracy_outside_of_what_is_asked_is_bold(monkeypatch):
    monkeypatch.setattr(tables, "ASKED_ACCURACIES", {("Sliding window", "D 128, w 64"): (0.45, 0.58)})
    line = tables.agreement(configurations(window(64, 0.5, 0.6))).splitlines()[-1]
    assert line == "| Sliding window, D 128, w 64 | 63 | 0.500, **0.600** | 0.45 to 0.58 |"
    with pytest.raises(UserError, match="There are no rows of Sliding window with D 128, w 64; run the sweep first"):
        tables.agreement(configurations(window(32, 0.5)))


def test_what_was_tried_stands_beside_the_grid():
    def run(seed, lr, value, shuffle=False, size=64):
        [row] = window(size, value)
        row["config"]["model"]["layers"][-1][1]["impl"] = "auto"
        return row | {"config": row["config"] | {"seed": seed, "optim": {"lr": lr}, "data": {"shuffle": shuffle}}}

    grid = [run(1, 1e-3, 0.9), run(2, 1e-3, 0.8), run(1, 1e-3, 0.1, size=32)]
    assert tables.tried(grid, [run(1, 1e-4, 0.7), run(2, 1e-3, 0.6, shuffle=True)]).splitlines()[2:] == [
        "| Sliding window, D 128, w 64 | in another order | auto | 0.001 | - | 0.600 |",
        "| Sliding window, D 128, w 64 | in the reference's | auto | 0.0001 | 0.700 | - |",
        "| Sliding window, D 128, w 64 | in the reference's | auto | 0.001 | 0.900 | 0.800 |",
    ]


def test_seconds_are_the_grid_s_without_second_seeds(tmp_path):
    def row(name, seed, spent):
        return json.dumps({"id": name, "config": {"seed": seed}, "device": "a GPU", "seconds": spent})

    (tmp_path / "1.jsonl").write_text("\n".join([row("a", 123, 1000), row("b", 123, 500), row("c", 124, 9000)]) + "\n")
    other = {"seed": 123, "model": {"init_recipe": "zoology"}}
    zoology = json.dumps({"id": "e", "config": other, "device": "a GPU", "seconds": 5})
    (tmp_path / "2.jsonl").write_text(row("d", 123, 7.4) + "\n" + zoology + "\n")
    assert tables.seconds(tmp_path, "zoology").splitlines()[-1] == "| all of them |  | 1 | 5 |  |"
    assert tables.seconds(tmp_path, "reference").splitlines()[2:] == [
        "| 1.jsonl | a GPU | 2 | 1,500 | 1000 |",
        "| 2.jsonl | a GPU | 1 | 7 | 7 |",
        "| all of them |  | 3 | 1,507 |  |",
    ]


def test_epochs_are_weighed_by_their_steps_and_lanes_share_them():
    first, second = tables.gains(rows(loop=(4, 8), resident=(1, 4), lanes=(1, 6)))
    assert "| m | 20.00 | 7.00 | 4.50 | 4.4 |" in first and "| all of them | 20.00 | 7.00 | 4.50 | 4.4 |" in first
    assert "| m | 100% | 33% |" in second


def test_a_segment_that_is_missing_is_told():
    found = list(rows(loop=(4, 8), resident=(1, 4), lanes=(1, 6)))
    with pytest.raises(UserError, match=r"m has not been measured on every segment: .'lanes', 2. lacks b"):
        tables.gains([row for row in found if (row["way"], row["segment"]) != ("lanes", "b")])


def test_the_same_run_of_several_stores_is_a_line_by_learning_rate():
    mixer = [synthetic.CONV, ("window", {"num_heads": 1, "window": 64})]
    stores = {
        name: {
            f"{lr:g}": synthetic.row(mixer, 128, lr=lr, accuracy=value) for lr, value in ((1e-2, high), (1e-3, 0.25))
        }
        for name, high in (("a", 0.5), ("b", 0.75))
    }
    assert tables.again(stores, {"0.01", "0.001"}).splitlines() == [
        "| model | learning rate | a | b |",
        "|---|---|---|---|",
        "| Sliding window, D 128, w 64 | 0.001 | 0.250 | 0.250 |",
        "| Sliding window, D 128, w 64 | 0.01 | 0.500 | 0.750 |",
    ]


def test_kernels_of_a_step_are_those_of_the_last_rows():
    def row(model, time, top):
        return {"model": model, "kernel_milliseconds": time, "top": top}

    found = [{"model": "gla_128", "top": []}, row("gla_64", 9, []), row("gla_128", 8, []), row("window_128", 1, [])]
    found += [row("gla_128", 2, [("recurrence_again", 0.5, 1.0), ("gemm", 1, 1.0), ("recurrence", 0.25, 1.0)])]
    table = tables.kernels([*found, row("gla_256", 4, [("gemm", 1, 1.0)])])
    assert table.splitlines()[0] == "| model | D=128 | its operation | D=256 | its operation |"
    assert table.splitlines()[2:] == ["| gla | 2.00 | 0.75 | 4.00 | - |"]


def test_the_readme_has_the_tables_of_the_rows(capsys):
    assert command.main(["tables"]) == 0
    readme = (FOLDER / "README.md").read_text()
    assert all(table in readme for table in capsys.readouterr().out.strip().split("\n\n"))
    devices = {json.loads(text)["device"] for text in (FOLDER / "results/throughput.jsonl").read_text().splitlines()}
    assert len(devices) == 1


def test_the_readme_counts_the_runs_of_the_store():
    text = " ".join((FOLDER.parents[1] / "README.md").read_text("utf-8").split())
    said = {
        "reference": "{} runs on an H100 80GB and on H200s",
        "zoology": "{} of the 236 runs of Figure 2 are in the store",
    }
    for recipe, words in said.items():
        assert words.format(len(recall_rows.of_recipe(FOLDER / "results" / "figure2", recipe))) in text
