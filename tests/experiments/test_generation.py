"""The tables and the picture of generation, from rows as `bench generate` writes them."""

import types

import pytest

from based_jax.errors import UserError
from experiments.generation import __main__ as generation
from experiments.generation import plots, tables
from experiments.generation.results import MODELS, PEERS, Found, goals

BREAKDOWN = {
    "milliseconds": 2.34,
    "idle": 0.05,
    "launches": 451.6,
    "layers": {"mlp": {"forward": 1.0}, "norm": {"forward": 0.001}},
    "sorts": {"products": 1.3, "kernels": 1.0},
}


def row(config, batch, context, speed, **more):
    facts = {"device": "NVIDIA H200", "state_bytes": 3 << 20, "roofline_tokens_per_second": 100_000.0}
    size = {"config": config, "batch": batch, "context": context, "tokens_per_second": speed, "breakdown": BREAKDOWN}
    size["milliseconds"] = 1e3 * batch / speed
    return facts | size | more


@pytest.fixture
def found():
    based, attention = MODELS["based_1b"].config, MODELS["attention_1b"].config
    prompts = {"prefill_rows": 16, "prefill_tokens_per_second": 280_000.0, "prefill_chunk_tokens": 512}
    prompts |= {"prefill_breakdown": BREAKDOWN}
    rows = [
        row(based, 128, 2048, 90_000.0, options=["taylor.flush=16"]),
        row(based, 128, 2048, 1.0),
        row(based, 128, 2048, 60_000.0),
        row(based, 128, 16384, 50_000.0, **prompts),
        row(based, 128, 4096, 66_000.0, **prompts),
        row(based, 128, 2048, 9.0, overrides={"model.d_model": "64"}),
        row(based, 128, 2048, 40_000.0, options=["taylor.flush=16"], drafts=3, verified_tokens_per_second=160_000.0)
        | {"milliseconds": 3.2},
        row(attention, 128, 2048, 10_000.0),
        row(attention, 16, 16384, 2_000.0),
        row(PEERS["hf:llama_1b"].config, 128, 2048, 9_000.0, breakdown=None),
        {"config": attention, "batch": 128, "context": 16384, "device": "NVIDIA H200", "error": "too large"},
    ]
    return Found.of(rows)


def test_goals_stand_beside_what_the_last_rows_say(found):
    said = {goal.what: goal.found for goal in goals(found)}
    assert said["Based, batch 128, 2K of context"] == 90_000 and said["Based, batch 128, 64K of context"] is None
    assert said["attention, batch 128, 2K of context"] == pytest.approx(0.1)
    assert said["Based over attention, batch 128, 2K of context"] == 9
    assert said["Based over attention at what fits, 16K of context"] == 25
    assert said["Based, its state written every 16 tokens, over each, batch 128"] == 1.5
    assert said["Based verifies 4 tokens, over one by one, batch 128"] == pytest.approx(16 / 9)
    assert said["Based reads prompts of 4K"] == 280_000 and said["Based, batch 1"] is None
    text = tables.tables(found)["goals"]
    assert "| Based reads prompts of 4K | 350,000 tokens/s | 280,000 tokens/s | 80% |" in text
    assert "| Based, batch 1 | 800 tokens/s | not measured |  |" in text
    assert text.count("not measured") == len(said) - 7


def test_models_stand_by_batch_and_by_context_with_the_share_of_their_rooflines(found):
    told = tables.tables(found)
    assert "| `based_1b` | 3.0 |  |  |  | 60,000 (60%) |  |" in told["batches"]
    assert "| `hf:llama_1b` | 3.0 |  |  |  | 9,000 (9%) |  |" in told["batches"]
    assert "| `attention_1b` |  | 10,000 (10%) |  | 2,000 (2%), batch 16 |  |" in told["contexts"]
    assert "| `based_1b` |  |  | 280,000 | 280,000 |  |" in told["prompts"]
    assert "| `based_1b` | 2.34 | 0.05 | 452 | products 1.30, kernels 1.00 | mlp 1.00 |" in told["times"]
    assert "| 16 x 512 of 4,096 | `based_1b` | 2.34 | 0.05 | 452 | products 1.30, " in told["prompt_times"]
    assert "| `based_1b_flush` | 128 | 4 | 3.20 | 1.42 | 1.78 |" in told["drafts"]
    assert {*tables.tables(Found.of([])).values()} > {tables.NOTHING}


def test_the_readme_has_the_tables_of_its_rows():
    rows = generation.read(generation.ROWS)
    page = generation.README.read_text()
    assert generation.filled(page, tables.tables(Found.of(rows))) == page, "run: python -m experiments.generation table"


def test_the_picture(found, tmp_path):
    [by_context] = plots.panels(found)  # at one batch: no curve
    assert list(by_context.rows) == ["based_1b", "based_1b_flush", "attention_1b", "hf:llama_1b"]
    assert list(by_context.rows["attention_1b"]) == [2048, 16384] and by_context.sizes == [2048, 4096, 16384]
    drawn = plots.draw(found, tmp_path / "speed")
    assert {path.suffix for path in drawn} == {".png", ".svg", ".pdf"} and all(path.stat().st_size for path in drawn)
    with pytest.raises(UserError, match="no rows"):
        plots.draw(Found.of([]), tmp_path / "none")


@pytest.mark.parametrize("roofline", [100_000.0, None])
def test_few_rows_are_marks_beside_the_rooflines_that_are_known(roofline, tmp_path):
    one = row(MODELS["based_1b"].config, 128, 2048, 60_000.0, roofline_tokens_per_second=roofline)
    [panel] = plots.panels(Found.of([one]))
    assert panel.label.startswith("sequences") and panel.sizes == [128]
    [_, svg, _] = plots.draw(Found.of([one]), tmp_path / "speed")
    assert (plots.ROOFLINE_NAME in svg.read_text()) == (roofline is not None)


def test_curves_stand_against_batch_and_against_context():
    config = MODELS["based_1b"].config
    sizes = (1, 2048), (128, 2048), (128, 65536)
    panels = plots.panels(Found.of([row(config, *size, 60_000.0) for size in sizes]))
    assert [panel.sizes for panel in panels] == [[1, 128], [2048, 65536]]


def test_each_model_is_timed_at_all_batches_and_at_all_contexts(monkeypatch):
    calls, compiled = [], []

    def called(command, env=None):
        (compiled if "--compile-only" in command else calls).append(command[6:])
        return types.SimpleNamespace(returncode=0)

    monkeypatch.setattr(generation.subprocess, "run", called)
    assert generation.run("attention_1b", with_peers=False) == 0
    assert sorted(words[:-1] for words in compiled) == sorted(calls)
    batches = ["1x2048", "8x2048", "32x2048", "128x2048", "512x2048"]
    contexts = ["128x512", "64x4096", "16x16384", "4x65536"]
    assert calls[0] == ["--config=configs/attention.py:1b", "--sizes", *batches, *contexts]
    policy = ["--option=attention.cache_policy=window", "--option=attention.cache_budget=512"]
    assert (
        calls[1][1:6] == [*policy, "--no-prefill", "--sizes", "1x2048"]
        and calls[1][-1] == "128x65536"
        and len(calls) == 5
    )
    assert generation.run("llama_1b", with_peers=True) == 0 and calls[5][0] == "--peer=hf:llama_1b"
