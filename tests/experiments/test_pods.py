import pytest

from experiments.pods import __main__ as pods

ROW = {
    "point": "based_1b 2048 2 x v5p:8x8x8",
    "mesh": {"data": 16, "fsdp": 64},
    "tokens": 1024 * 4 * 2048,
    "memory": {"peak": 3 << 30, "temporaries": 2 << 30},
    "seconds": {"compute": 0.1, "memory": 0.02, "links": 0.003, "network": 0.004},
    "exchanged_bytes": 6e9,
    "fsdp_bytes": 4e9,
    "exchanged": [{"kind": "all-gather", "axes": ["fsdp"], "bytes": 5e9}],
    "bound": "compute",
    "versions": {"libtpu": "0.0.52"},
    "estimate": {"sum_mfu": 0.51, "bound_mfu": 0.72},
}


def test_a_row_is_told():
    assert pods.told(ROW) == {
        "model": "`based_1b`",
        "tokens": "2,048",
        "pod": "2 x v5p:8x8x8",
        "libtpu": "0.0.52",
        "mesh": "data 16, fsdp 64",
        "rows of a chip": "4",
        "GiB (temporaries)": "3.0 (2.0)",
        "ms: compute + HBM + exchange": "100 + 20 + 7",
        "GB sent (times FSDP's)": "6.0 (1.50)",
        "most of it": "all-gather over fsdp 5.0",
        "MFU by the sum": "51.0%",
        "by the bound": "72.0%, compute",
    }


def test_a_point_that_was_not_compiled_says_why():
    told = pods.told({"point": "attn_1b 32768 1 x v5e:16x16", "error": "The step does not fit."})
    assert told == {
        "model": "`attn_1b`",
        "tokens": "32,768",
        "pod": "v5e:16x16",
        "MFU by the sum": "The step does not fit.",
    }


def test_the_grid_has_every_model_on_every_pod_at_both_lengths():
    names = [name for name, _ in pods.points()]
    assert len(names) == len(set(names)) == len(pods.MODELS) * len(pods.PODS) * 2
    assert names[0] == "based_1b 2048 1 x v5e:16x16"


def test_the_delta_rule_has_two_rows_a_device_where_time_is_cut():
    rows = {name: next(x for x in arguments if x.startswith("--rows")) for name, arguments in pods.points()}
    two = {name for name, argument in rows.items() if argument == "--rows-per-device=2"}
    assert two == {f"gated_deltanet_360m 32768 1 x {pod}:16x16" for pod in ("v5e", "v6e")}


def test_a_point_with_kernels_is_told_beside_the_one_without():
    kernels = {"window_forward": {"runs": 14, "copies": 0, "copied_bytes": 0.0}}
    with_them = ROW | {"seconds": ROW["seconds"] | {"memory": 0.01}, "estimate": {"sum_mfu": 0.6, "bound_mfu": 0.72}}
    assert pods.beside(with_them | {"kernels": kernels}, ROW) == {
        "model": "`based_1b`",
        "tokens": "2,048",
        "pod": "2 x v5p:8x8x8",
        "kernels": "`window_forward` 14",
        "copies for them": "0",
        "ms of compute": "100 -> 100",
        "of HBM": "20 -> 10",
        "GiB": "3.0 -> 3.0",
        "MFU by the sum": "51.0% -> 60.0%",
        "by the bound": "72.0% -> 72.0%",
    }


def test_a_point_says_what_its_compiler_said_or_how_it_ended():
    said = "F1 fusion_util.cc:5409] Check failed: a == b no.\n*** SIGABRT r8:F1 Check failed: a == b no.\n"
    assert pods.why_not(-6, f"W1 words\n{said}*** stack\n") == "the compiler aborts: Check failed: a == b no."
    assert pods.why_not(-9, "W1 words\n") == "compiling ended with code -9."
    assert pods.why_not(2, "INFO: words\nError: It does not fit.\n") == "It does not fit."
    assert pods.why_not(1, "") == "compiling ended with code 1." and pods.why_not(0, "INFO: words\n") == ""


def test_a_name_that_no_point_has_is_refused(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["pods", "run", "--only=v9"])
    with pytest.raises(SystemExit):
        pods.main()
    assert "no point has 'v9' in its name; they are based_1b 2048 1 x v5e:16x16," in capsys.readouterr().err
