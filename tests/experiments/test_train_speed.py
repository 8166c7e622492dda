"""The tables and the picture of whole training steps, from rows as `bench train` writes them."""

import pytest

from based_jax.bench.catalogue import timed_case, timed_operation
from experiments.train_speed import __main__ as train_speed
from experiments.train_speed import operations, plots

BREAKDOWN = {
    "milliseconds": 240.04,
    "idle": 1.26,
    "copies": 3.5,
    "layers": {"mlp": {"forward": 40.0, "backward": 80.0}, "norm": {"forward": 0.2}},
    "sorts": {"products": 180.0, "fusions": 58.78},
}


def rows():
    facts = {"device": "NVIDIA H200", "peak_bytes": 50 << 30, "compile_seconds": 31.4, "remat": "none"}
    for speed in (50_000.0, 60_000.0):
        config = {"config": "configs/based.py:1b", "rows": 8, "seq_len": 2048, "documents": 1}
        yield facts | config | {"tokens_per_second": speed, "mfu": 0.5, "hfu": 0.51, "mbu": 0.4, "breakdown": BREAKDOWN}
    yield facts | {
        "config": "configs/based.py:1b",
        "rows": 8,
        "seq_len": 2048,
        "documents": 4,
        "tokens_per_second": 1.0,
    }
    yield facts | {"config": "jla:kda-1p3b", "rows": 8, "seq_len": 2048, "tokens_per_second": 35_110.4}


def test_the_last_row_of_a_model_stands_beside_its_goal():
    lines = train_speed.models_table([*rows()]).splitlines()
    [found] = [line for line in lines if "`based_1b` | 8 x 2,048" in line]
    assert "| 60,000 | 68,000 | 88% | 50.0% | 51.0% | 40.0% | none | 50.0 | 31 | 1.3, 3.5 of 240 |" in found
    assert sum("not measured" in line for line in lines) == len(train_speed.POINTS) - 1


def test_where_the_time_goes_is_told_of_rows_that_know():
    line = train_speed.times_table([*rows()]).splitlines()[-1]
    assert line == "| `based_1b` | 8 x 2,048 | 240 | products 180.0, fusions 58.8 | mlp 120.0 |"
    assert train_speed.times_table([]) == "None has been measured."


def test_other_libraries_stand_below():
    assert "| `jla:kda-1p3b` | 8 x 2,048 | 35,110 | 50.0 | none |" in train_speed.peers_table([*rows()])
    assert train_speed.peers_table([]) == "None has been measured."


def test_the_picture(tmp_path):
    found = [*rows()]
    panels = plots.bars(train_speed.measured(found), train_speed.peers(found))
    assert [bar.name for bar in panels["1.3B"]] == ["based_1b, 8 x 2,048", "jla:kda-1p3b, 8 x 2,048"]
    drawn = plots.draw(panels, train_speed.devices(found), tmp_path / "speed")
    assert {path.suffix for path in drawn} == {".png", ".svg", ".pdf"} and all(path.stat().st_size for path in drawn)


@pytest.mark.parametrize("timed", operations.TIMED, ids=lambda timed: f"{timed.op} {timed.shape}")
def test_operations_are_those_of_the_catalogue(timed):
    table = timed_operation(timed.op).table
    cases = [timed_case(timed.op, timed.shape, impl) for impl in timed.impls]
    assert all(case.impl in table and case.dims == timed.shape[3:] for case in cases)


def test_an_operation_stands_beside_its_goal():
    call = {"op": "taylor_attention", "impl": "hopper_chunks", "batch": 8, "heads": 16, "seq_len": 2048}
    other = call | {"pass": "forward", "microseconds": 64.2, "floor_microseconds": 28.8}
    own = other | {"dims": [16, 112], "microseconds": 131.4, "floor_microseconds": 41.1}
    both = own | {"pass": "forward+backward", "microseconds": 402.0, "floor_microseconds": 110.0}
    lines = operations.table([other, own, both]).splitlines()
    [line] = [line for line in lines if "taylor_attention" in line]
    assert "| `hopper_chunks` | 131 / 402 | 100 / 330 | 41 / 110 |" in line
    assert sum("not measured" in line for line in lines) == len(lines) - 3
