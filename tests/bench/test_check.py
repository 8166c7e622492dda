"""`bench check` on a CPU: its oracles, and that what is wrong does not pass; `bench sanitize` with a tool made here."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.cases import parametrize_some

from based_jax.__main__ import main
from based_jax.bench import cases, check, comparison, huge, sanitize, subprocesses
from based_jax.bench.cases import same_oracle, same_program
from based_jax.bench.catalogue import OPERATIONS
from based_jax.bench.catalogue.operation import Case

BOTH = {"state": True, "documents": True}
SMALL = [
    Case("taylor_attention", (2, 2, 65), (8, 12), **BOTH),
    Case("taylor_attention", (2, 1, 1), (16, 8), **BOTH),
    Case("taylor_attention", (2, 2, 33), (16, 8), through="vmap", documents=True),
    Case("taylor_attention", (2, 2, 33), (16, 8), through="shard_map", values="late"),
    Case("window_attention", (2, 2, 70), (8, 8), window=7, documents=True),
    Case("window_attention", (2, 2, 70), (8, 8), window=64, values="large"),
    Case("gated_short_conv", (2, 8, 20), (3,), **BOTH),
    Case("gated_short_conv", (2, 8, 20), (4,), documents=True, through="vmap"),
    Case("selective_scan", (2, 8, 20), (3,), **BOTH),
    Case("raw_selective_scan", (2, 8, 20), (3,), **BOTH),
    Case("short_conv", (2, 8, 20), (4,), **BOTH),
    Case("ssd", (2, 2, 20), (6, 5), **BOTH),
    Case("wkv4", (2, 8, 20), **BOTH),
    Case("gated_linear_attention", (2, 2, 20), (6, 5), **BOTH),
    Case("simple_gla", (2, 2, 20), (6, 5), **BOTH),
    Case("delta_rule", (2, 2, 20), (6, 5), **BOTH),
    Case("gated_delta_rule", (2, 2, 20), (6, 5), **BOTH),
    Case("dplr", (2, 2, 20), (6, 5), **BOTH),
    Case("linear_cross_entropy", (2, 8, 20), (30,), documents=True, through="vmap"),
    Case("taylor_attention_decode", (3, 2), (8, 6, 5, 2), dtype="float32"),
    Case("attention_step", (4, 6), (8, 6, 2, 30)),
    Case("attention_step_weights", (4, 6), (8, 6, 2, 30)),
    Case("attention_trial", (4, 6, 5), (8, 6, 2, 12)),
    Case("attention_prefill", (4, 6, 5), (8, 6, 2, 30)),
    Case("gated_linear_attention_step", (2, 3), (6, 5)),
    Case("simple_gla_step", (2, 3), (6, 5)),
    Case("delta_rule_step", (2, 3), (6, 5)),
    Case("gated_delta_rule_step", (2, 3), (6, 5)),
    Case("dplr_step", (2, 3), (6, 5)),
    Case("selective_scan_step", (2, 8), (3,)),
    Case("raw_selective_scan_step", (2, 8), (3,)),
    Case("short_conv_step", (2, 8), (4,)),
    Case("gated_short_conv_step", (2, 8), (3,)),
    Case("few_tokens_product", (3, 8), (6,)),
    Case("few_tokens_products", (3, 8), (6, 5)),
    Case("few_tokens_gated", (3, 8), (6,)),
    Case("few_tokens_residual_norm", (3, 8), (6,)),
    Case("ring_step", (5, 2), (6, 3)),
    Case("token_products", (1, 8), (6, 5)),
    Case("token_sums", (1, 8), (6,)),
    Case("gated_scan_step", (2, 8), (3,)),
]


LONG = [SMALL[1], SMALL[2], *(x for x in SMALL if x.operation in ("simple_gla", "gated_delta_rule"))]
"""Of an operation that has other cases, or whose oracle is another one's."""


@parametrize_some("case", SMALL, [case for case in SMALL if case not in LONG], ids=str)
def test_the_oracles_are_the_operations(case):
    gradients, arrays, ids = cases.draw(case, case.rng(0))
    narrow = jax.tree.map(lambda x: x.astype(np.float32), (gradients, arrays))
    [impl] = OPERATIONS[case.operation].impls(["oracle"]) or OPERATIONS[case.operation].impls(["xla"])
    function = cases.function_of(case.by(impl))
    got = jax.jit(cases.passes_of(case, function))(*narrow, ids)
    wanted, _ = run_wide(check.compile_oracle(same_oracle(case)), cases.complete(case, gradients, arrays, ids))
    assert set(got) <= set(wanted)
    for name, x in got.items():
        assert comparison.error(x, comparison.cropped(wanted[name], x.shape)) < 2e-5, name


def run_wide(oracle, arguments):
    with jax.enable_x64(True):
        return jax.device_get(oracle(*arguments))


@pytest.mark.parametrize(
    "name, gradients",
    [
        ("residual_rms_norm", {"dr", "dy", "dscale"}),
        ("residual_layer_norm", {"dr", "dy", "dscale", "dbias"}),
        ("rms_norm", {"dr", "dscale"}),
        ("layer_norm", {"dr", "dscale", "dbias"}),
    ],
)
def test_the_norms_oracle_is_the_operation(name, gradients):
    [row] = check.rows_of([Case(name, (2, 128, 3), impl="xla")], seed=1)
    assert row["passed"] and set(row["errors"]) == {"r", "x"} | gradients


def test_rows_say_what_was_checked(tmp_path, monkeypatch, capsys):
    chosen = [dataclasses.replace(SMALL[0], quick=True, values=x) for x in ("plain", "late")]
    monkeypatch.setattr(cases, "all_cases", lambda: [*chosen, *SMALL])
    out = tmp_path / "deep" / "check.jsonl"
    assert main(["bench", "check", "--quick", "--impl=oracle", "--seed=3", f"--out={out}", "--processes=0"]) == 0
    rows = [json.loads(text) for text in out.read_text().splitlines()]
    assert [row["what"] for row in rows] == [str(case.by("oracle")) for case in chosen]
    assert set(rows[0]["errors"]) == {"o", "state", "dq", "dk", "dv", "dstate"}
    assert all(row["passed"] and row["seed"] == 3 and row["device"] == "cpu" for row in rows)
    assert "2 of 2 passed" in capsys.readouterr().out


def test_nothing_checked_and_a_refusal_fail(capsys, monkeypatch):
    assert main(["bench", "check", "--only", "no such case", "--quick"]) == 1
    monkeypatch.setattr(cases, "all_cases", lambda: [case.by("hopper_chunks") for case in SMALL[1:2]])
    assert main(["bench", "check", "--only", "state", "--processes", "0"]) == 1
    assert "it needs cuda" in capsys.readouterr().out


def test_a_refusal_among_others_is_no_failure_unless_it_was_asked_for(capsys, monkeypatch):
    monkeypatch.setattr(cases, "all_cases", lambda: [SMALL[1].by(impl) for impl in ("hopper_chunks", "oracle")])
    words = ["bench", "check", "--only", "taylor_attention (2,1,1)", "--processes", "0"]
    assert main(words) == 0
    assert "1 of 1 passed, 1 left by their implementations" in capsys.readouterr().out
    assert main([*words, "--impl=hopper"]) == 1
    assert "FAILED taylor_attention (2,1,1)" in capsys.readouterr().out


def test_an_implementation_that_nothing_has_is_named(capsys):
    assert main(["bench", "check", "--impl=hoper"]) == 2
    assert "Unknown implementation 'hoper': did you mean 'hopper" in capsys.readouterr().err


RIGHT = OPERATIONS["taylor_attention"].function


def wrong(kind):
    def of(case):
        right = RIGHT(case.by("oracle"))

        def run(arrays, ids):
            out = right(arrays, ids)
            o = out["o"].astype(jnp.float32)
            last = jnp.arange(o.shape[1])[None, :, None, None] == o.shape[1] - 1
            o = {"nan": jnp.where(last, jnp.nan, o), "row": jnp.where(last, 0, o), "scale": 1.01 * o}[kind]
            return out | {"o": o.astype(out["o"].dtype)}

        return run

    return of


@pytest.mark.parametrize("kind", ["nan", "row", "scale"])
def test_what_is_wrong_does_not_pass(kind, monkeypatch):
    broken = dataclasses.replace(OPERATIONS["taylor_attention"], function=wrong(kind))
    monkeypatch.setitem(OPERATIONS, "taylor_attention", broken)
    [row] = check.rows_of([Case("taylor_attention", (1, 1, 40), (8, 8), "xla")], seed=2)
    assert not row["passed"] and "BAD" in check.line(row)
    assert row["finite"] == (kind != "nan")


def test_a_step_that_leaves_one_row_s_state_does_not_pass(monkeypatch):
    step = OPERATIONS["simple_gla_step"]

    def of(case):
        def run(arrays, ids):
            out = step.function(case)(arrays, ids)
            return out | {"after": out["after"].at[3].set(arrays["before"][3])}

        return run

    monkeypatch.setitem(OPERATIONS, "simple_gla_step", dataclasses.replace(step, function=of))
    [row] = check.rows_of([Case("simple_gla_step", (5, 2), (8, 8), "xla")], seed=2)
    assert not row["passed"] and row["rows"]["after"] > 0.25 > row["rows"]["o"]
    assert set(row["errors"]) == {"o", "after"}


def test_a_weights_gradient_is_told_beside_what_its_rows_come_to():
    def function(arrays, ids):
        return {"y": arrays["w"][None] * arrays["x"]}

    x = np.array([[3.0], [-3.0], [0.5]])
    arrays = {"x": x, "w": np.array([1.0])}
    results, sizes = comparison.by_rows(comparison.both_passes(function), {"w"})(
        {"y": np.ones((3, 1))}, arrays, np.ones((3, 1))
    )
    assert float(results["dw"][0]) == 0.5 and results["y"].shape == results["dx"].shape == (3, 1)
    np.testing.assert_allclose(sizes["dw"], np.sqrt(9 + 9 + 0.25))


def test_one_token_gone_wrong_among_many_shows_in_its_row(rng):
    wanted = rng.normal(size=(1, 40000, 1, 8))
    got = wanted.copy()
    got[0, 31234] = -got[0, 31234]
    assert comparison.error(got, wanted) < 0.02 and comparison.error_of_rows(got, wanted) > 1
    assert comparison.error(0 * wanted, 0 * wanted) == comparison.error_of_rows(0 * wanted, 0 * wanted) == 0
    assert comparison.error(wanted, 0 * wanted) == comparison.error_of_rows(wanted, 0 * wanted) == np.inf


def test_a_number_that_cancels_in_a_sequence_of_one_token_is_measured_beside_the_others(rng):
    wanted = rng.normal(size=(64, 1, 2, 1))
    wanted[3] = 1e-4
    got = wanted + 3e-3 * rng.normal(size=wanted.shape)
    assert comparison.error_of_rows(got, wanted) < 0.02
    got[5] = -got[5] - 1
    assert comparison.error_of_rows(got, wanted) > 0.5


def test_bits_and_numbers():
    x = np.array([0.0, 1.0], jnp.bfloat16)
    assert comparison.same_bits(x, x.copy()) and not comparison.same_bits(x, -x)
    assert comparison.finite(x) and not comparison.finite(np.array([0.0, np.nan], jnp.bfloat16))


def test_documents_are_whole(rng):
    ids = cases.packed_ids(rng, 6, 300)
    assert ids.shape == (6, 300) and ids[0, 0] > 0 and (ids == 0).any()
    for row in ids:
        begins = row[1:][np.diff(row) != 0]
        present = begins[begins != 0]
        assert len(present) == len(set(present))


@pytest.mark.long
def test_samples_of_huge_calls():
    many = huge.many_blocks(3, "oracle", batch=9, heads=2, time=20)
    far = huge.far_offsets(3, "oracle", heads=2, time=300, tail=65)
    assert many["passed"] and far["passed"]
    assert {"state", "o", "dq0", "dk0", "dv3"} <= set(far["errors"])


def test_every_case_has_a_name_of_its_own():
    names = [*map(str, cases.all_cases()), *(name for name, *_ in check.CaseSelection().huge_cases())]
    assert len(names) == len(set(names))
    quick = [case for case in cases.all_cases() if case.quick]
    assert {(x.operation, x.impl) for x in quick} == {(x.operation, x.impl) for x in cases.small_cases()}


@pytest.mark.parametrize("name", ["gated_linear_attention", "simple_gla", "dplr"])
@pytest.mark.parametrize("impl, rows, widths", [("hopper_steps", (2, 2), 5), ("triton_chunks", (64, 16), 6)])
def test_kernels_token_by_token_are_checked_on_few_rows(name, impl, rows, widths):
    found = [case for case in cases.all_cases() if (case.operation, case.impl) == (name, impl)]
    short = [case.shape[0] for case in found if case.shape[2] in (1, 15, 65)]
    wide = [case.shape[0] for case in found if case.shape[2] == 130 and case.through == "call"]
    assert (short, wide) == ([rows[0]] * 6, [rows[1]] * widths)


TOOL = """#!/bin/sh
echo "========= COMPUTE-SANITIZER"
echo "noise"
echo "ran taylor_attention (1,2,130)"
echo "========= ERROR SUMMARY: {count} errors"
exit {code}
"""


@pytest.mark.parametrize("count, code", [(0, 0), (2, 9)])
def test_the_sanitizer_s_words_are_kept(tmp_path, monkeypatch, count, code):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(TOOL.format(count=count, code=code))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    out = tmp_path / "sanitizer.txt"
    assert main(["bench", "sanitize", "--tools", "memcheck", "racecheck", f"--out={out}"]) == code
    text = out.read_text()
    assert text.count(f"ERROR SUMMARY: {count} errors") == 2 and "noise" not in text and "ran taylor" in text
    assert str(tmp_path) not in text


def test_the_small_calls_are_run_without_documents_where_these_are_refused(monkeypatch, capsys):
    def supports(call):
        return None if call.segment_ids is None else "it takes no documents"

    table = OPERATIONS["short_conv"].table
    monkeypatch.setitem(table, "xla_steps", dataclasses.replace(table["xla_steps"], supports=supports))
    packed = Case("short_conv", (1, 8, 20), (3,), documents=True)
    monkeypatch.setattr(cases, "small_cases", lambda: [packed.by(x) for x in ("xla_steps", "oracle", "hopper_taps")])
    assert main(["bench", "sanitize", "--inner"]) == 0
    out = capsys.readouterr().out
    assert "left short_conv (1,8,20) 3 documents impl=xla_steps" in out and "ran short_conv (1,8,20) 3 impl=x" in out
    assert "ran short_conv (1,8,20) 3 documents impl=oracle" in out and "ran short_conv (1,8,20) 3 impl=h" not in out
    monkeypatch.setattr(cases, "small_cases", lambda: [packed.by("hopper_taps")])
    assert main(["bench", "sanitize", "--inner"]) == 1


def test_the_sanitizer_is_asked_for_by_name(monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    assert main(["bench", "sanitize"]) == 2
    assert "needs compute-sanitizer" in capsys.readouterr().err
    lines = [f"{sanitize.TOOL_LINE_MARK}{i}" for i in range(sanitize.MOST_SUMMARY_LINES + 1)]
    assert "..." in sanitize.summary("\n".join(lines))


def test_processes_share_the_cases(tmp_path, capsys):
    chosen = cases.all_cases()
    shared = subprocesses.parts(chosen, 8)
    assert sorted(str(case) for part in shared for case in part) == sorted(map(str, chosen))
    homes = {same_program(case): i for i, part in enumerate(shared) for case in part}
    assert all(homes[same_program(case)] == i for i, part in enumerate(shared) for case in part)
    loads = [sum(map(subprocesses._seconds, {same_program(case) for case in part})) for part in shared]
    assert max(loads) < 1.5 * min(loads)
    out = tmp_path / "check.jsonl"
    words = ["bench", "check", "--impl=oracle", "--only=gated_short_conv (2,384,15)", "--processes=2", f"--out={out}"]
    assert main(words) == 0
    assert "2 of 2 passed" in capsys.readouterr().out and out.read_text().count('"device": "cpu"') == 2


def test_a_process_s_end_is_no_success(monkeypatch):
    monkeypatch.setattr(subprocesses.sys, "executable", "/bin/false")
    rows = list(subprocesses.rows_of(SMALL[:2], 2, [], limit=20))
    assert [row["passed"] for row in rows] == [False, False] and "exit codes [1, 1]" in rows[0]["failure"]
