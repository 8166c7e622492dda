import json

import pytest

from based_jax.__main__ import main
from based_jax.bench import kernels, timing, torch_peers
from based_jax.commands.bench import line, parse_shape


def test_span_is_the_median_from_first_start_to_last_end():
    calls = [[(0, 10), (12, 30)], [(100, 120), (110, 115)], [(200, 202), (250, 260)]]
    events = [event for call in reversed(calls) for event in call]
    assert timing.span(events, 3) == pytest.approx(30 / 1e3)
    with pytest.raises(RuntimeError, match="6 kernels in 4"):
        timing.span(events, 4)
    with pytest.raises(RuntimeError, match="0 kernels"):
        timing.span([], 4)


def test_floors_are_those_of_the_notes():
    size, flops = kernels.OPERATIONS["taylor_attention"].cost("forward")
    tokens = 8 * 16 * 2048
    assert size == 2 * (16 + 16 + 64 + 64) + 4
    assert kernels.floor_microseconds(size * tokens, flops * tokens, "NVIDIA H100 80GB HBM3") == pytest.approx(
        28.8, abs=0.1
    )
    both, _ = kernels.OPERATIONS["taylor_attention"].cost("forward+backward")
    assert both - size == 644
    assert kernels.floor_microseconds(1.0, 1.0, "cpu") is None


def test_the_larger_of_memory_and_products_is_the_floor():
    assert kernels.floor_microseconds(2.95e6, 0.0, "NVIDIA H100 80GB HBM3") == pytest.approx(1.0)
    assert kernels.floor_microseconds(2.95e6, 989e6 * 3, "NVIDIA H100 80GB HBM3") == pytest.approx(3.0)


def test_sets_have_the_same_tokens_until_one_row_is_left():
    assert [b * t for b, _, t in kernels.LENGTHS] == [1 << 14] * 5 + [1 << 15, 1 << 16]


def test_every_peer_has_an_operation():
    assert set(torch_peers.PEERS) <= set(kernels.OPERATIONS)


def test_a_failure_is_a_row():
    def fails():
        raise RuntimeError("no memory\nat all")

    row = kernels._row("attention", "cudnn", (1, 2, 3), "forward", kernels.OPERATIONS["attention"], fails, "cpu")
    assert row["error"] == "RuntimeError: no memory"
    assert "no memory" in line(row) and "(1,2,3)" in line(row)


def test_a_row_prints_its_numbers():
    measured = kernels._row(
        "taylor_attention",
        "hopper",
        (8, 16, 2048),
        "forward",
        kernels.OPERATIONS["taylor_attention"],
        lambda: 40.0,
        "NVIDIA H100 80GB HBM3",
    )
    assert json.loads(json.dumps(measured))["ratio_to_floor"] == pytest.approx(40 / 28.79, abs=0.01)
    assert line(measured).split()[-4:] == ["28.79", "1.39", "2.12", "291"]


@pytest.mark.parametrize("text", ["8x16", "8x16x0", "axbxc", "8x16x2048x2", "tables"])
def test_a_wrong_shape_is_named(text, capsys):
    assert main(["bench", "kernels", "--shapes", text]) == 2
    assert f"'{text}' is no shape" in capsys.readouterr().err


def test_bad_input_is_one_sentence(capsys):
    assert parse_shape("8x16x2048") == (8, 16, 2048)
    for words, message in (
        (["--ops", "nothing"], "Unknown operation 'nothing'"),
        (["--repeats", "0"], "repeats is 0"),
        ([], "measures GPU kernels, and the device here is cpu"),
    ):
        assert main(["bench", "kernels", *words]) == 2
        assert message in capsys.readouterr().err
