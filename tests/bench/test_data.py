"""`bench data` on small corpora of every kind."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from based_jax.__main__ import main
from based_jax.bench import data
from based_jax.commands.bench.data import KINDS
from based_jax.data.corpus import FolderCorpus
from tests.helpers import texts

TOKENS = 30_000


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Read little, and in no process of its own."""
    monkeypatch.setattr(data, "BATCHES_READ", 2)
    monkeypatch.setattr(data, "LETTERS_DRAWN", 2**18)
    monkeypatch.setattr(data, "ProcessPoolExecutor", lambda count, context: ThreadPoolExecutor(count))


def test_a_row_a_kind_says_how_fast_it_is_and_what_it_takes(tmp_path, capsys):
    out, place = tmp_path / "rows.jsonl", tmp_path / "place"
    assert main(["bench", "data", f"--tokens={TOKENS}", f"--folder={place}", f"--out={out}"]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["kind"] for row in rows] == list(KINDS) == list(data.WRITERS)
    for row in rows:
        assert TOKENS <= row["tokens"] < TOKENS + 20_000 and row["pack_peak_bytes"] > 2**20
        assert row["pack_tokens_per_second"] == pytest.approx(row["tokens"] / row["pack_seconds"], rel=0.1)
        assert row["read_tokens_per_second"] > 0 and "cores" in row["device"] and "pyarrow" in row["versions"]
        assert row["command"].startswith("python -m based_jax")
    assert capsys.readouterr().out.count(" MiB at most); opened in ") == len(KINDS)
    assert not list(place.iterdir())


def test_all_kinds_hold_the_same_documents(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "TOKENS_A_FILE", TOKENS // 3)
    found = {}
    for kind in ("jsonl", "jsonl.zst", "parquet"):
        (tmp_path / kind).mkdir()
        data.write(data.Corpus(kind, TOKENS, processes=1), tmp_path / kind)
        found[kind] = texts.documents(tmp_path / kind)
        assert len(FolderCorpus(tmp_path / kind).files) in (3, 4)
    assert found["jsonl"] == found["jsonl.zst"] == found["parquet"]


@pytest.mark.parametrize(("words", "sentence"), [("--kinds=csv", "Unknown kind 'csv'"), ("--tokens=0", "tokens is 0")])
def test_what_cannot_be_measured(words, sentence, capsys):
    assert main(["bench", "data", words]) == 2
    assert sentence in capsys.readouterr().err
