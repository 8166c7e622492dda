"""Text as batches: windows that hold every token once, and batches that are a pure function of the step."""

import gzip
import json
import lzma
import os

import numpy as np
import pytest

from based_jax.data import corpus, text, tokens
from based_jax.errors import UserError
from based_jax.labels import NO_LABEL
from tests.helpers.texts import documents

DOCUMENTS = [f"Document {i}: " + "abc " * (i % 7 + 1) for i in range(40)]


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "corpus"
    path.mkdir()
    (path / "a.txt").write_text(DOCUMENTS[0])
    with lzma.open(path / "b.jsonl.xz", "wt") as file:
        file.writelines(json.dumps({"text": document}) + "\n" for document in DOCUMENTS[1:20])
    with gzip.open(path / "c.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"text": document}) + "\n" for document in DOCUMENTS[20:39])
    (path / "val.txt").write_text(DOCUMENTS[39])
    return path


def source(folder, tmp_path, seq_len=16, batch_size=8, **kwargs):
    return text.TextSource(folder, "bytes", seq_len, batch_size, cache_dir=tmp_path / "cache", **kwargs)


def windows(stream, seq_len):
    """Return (tokens, segment_ids) of a stream of bytes and end-of-text ids."""
    cut = [
        tokens.window(np.array(stream[at : at + seq_len + 1]), 256, seq_len)
        for at in range(0, len(stream) - 1, seq_len)
    ]
    return tuple(np.stack([window[name] for window in cut]) for name in ("tokens", "segment_ids"))


def test_windows_hold_every_token_and_mark_documents():
    stream = [*b"ab", 256, *b"cde", 256, *b"f", 256]
    found, ids = windows(stream, 4)
    np.testing.assert_array_equal(found, [stream[0:5], stream[4:9]])
    np.testing.assert_array_equal(ids, [[1, 1, 1, 2, 2], [1, 1, 1, 2, 2]])


def test_labels_are_the_next_token_of_the_same_document():
    found, ids = windows([*b"ab", 256, *b"c", 256], 6)
    batch = text._batch([{"tokens": found[0], "segment_ids": ids[0]}])
    np.testing.assert_array_equal(batch["inputs"], [[97, 98, 256, 99, 256, 0]])
    np.testing.assert_array_equal(batch["labels"], [[98, 256, NO_LABEL, 256, NO_LABEL, NO_LABEL]])
    np.testing.assert_array_equal(batch["segment_ids"], [[1, 1, 1, 2, 2, 0]])


def test_a_batch_is_a_function_of_the_step(folder, tmp_path):
    first, again = source(folder, tmp_path), source(folder, tmp_path)
    for step in (7, 0, 3):
        for name, rows in first.batch(step).items():
            np.testing.assert_array_equal(rows, again.batch(step)[name])
    other = source(folder, tmp_path, seed=1).batch(0)["inputs"]
    assert not np.array_equal(first.batch(0)["inputs"], other)


def test_an_epoch_reads_every_window_once(folder, tmp_path):
    whole = source(folder, tmp_path, batch_size=1)
    rows = {whole.batch(step)["inputs"].tobytes() for step in range(whole.windows)}
    stream = [id for document in documents(folder)["train"] for id in [*document.encode(), 256]]
    assert rows == {row.tobytes() for row in windows(stream, 16)[0][:, :-1]}


def test_hosts_feed_their_rows_of_a_batch(folder, tmp_path):
    rows = [0, 3]
    whole, own = source(folder, tmp_path), source(folder, tmp_path, rows=rows)

    def batches(of):
        return [of.batch(5), *of.eval_batches("validation")]

    for ours, all_of_it in zip(batches(own), batches(whole), strict=True):
        for name, array in all_of_it.items():
            np.testing.assert_array_equal(ours[name], array[rows])


def test_validation_is_read_once_and_filled_up(folder, tmp_path):
    batches = list(source(folder, tmp_path, batch_size=4).eval_batches("validation"))
    assert all(batch["inputs"].shape == (4, 16) for batch in batches)
    labelled = sum(int((batch["labels"] != NO_LABEL).sum()) for batch in batches)
    assert labelled == len(DOCUMENTS[39].encode())  # every byte but the first, and the end of text


def test_a_changed_file_is_another_dataset(folder, tmp_path):
    before = source(folder, tmp_path).batch(0)["inputs"]
    (folder / "a.txt").write_text("something else " * 30)
    assert source(folder, tmp_path).windows > 0
    assert not np.array_equal(source(folder, tmp_path).batch(0)["inputs"], before)


def test_a_sequence_longer_than_the_data(folder, tmp_path):
    with pytest.raises(UserError, match="seq_len 100000 is longer than the data"):
        source(folder, tmp_path, seq_len=100_000)


def test_the_order_is_that_of_tensorflow_datasets():
    from tensorflow_datasets.core import hashing

    hasher = hashing.Hasher("train")
    assert tokens.hashed_order(300, "train").tolist() == sorted(range(300), key=hasher.hash_key)


def read_all(whole):
    for step in range(whole.windows // 8 + 1):
        whole.batch(step)


@pytest.mark.parametrize(
    "damage, told",
    [
        (lambda raw: raw[:-200], "train.tokens has another length than it was written with"),
        (lambda raw: raw[:9] + b"?" + raw[10:], "block 0 of 2 of train.tokens does not have its checksum"),
        (lambda raw: raw[:-1] + b"?", "block 1 of 2 of train.tokens does not have its checksum"),
    ],
    ids=["cut", "first", "last"],
)
def test_a_damaged_dataset_is_named_with_file_and_block(folder, tmp_path, monkeypatch, damage, told):
    monkeypatch.setattr(tokens, "TOKENS_PER_CHECKSUM", 1024)
    before = source(folder, tmp_path)
    (record,) = (tmp_path / "cache").rglob("train.tokens")
    record.write_bytes(damage(record.read_bytes()))
    for opened in (lambda: source(folder, tmp_path), lambda: before):  # damaged before, and while a run reads it
        with pytest.raises(UserError, match=rf"^Packed text '{record.parent}' is damaged \({told}\)"):
            read_all(opened())


def test_a_pipe_in_place_of_tokens_is_named(folder, tmp_path):
    source(folder, tmp_path)
    (record,) = (tmp_path / "cache").rglob("train.tokens")
    record.unlink()
    os.mkfifo(record)
    with pytest.raises(UserError, match=r"is damaged \(train.tokens: It is a pipe or a device, not a file\)"):
        source(folder, tmp_path)


def test_a_disk_that_fails_is_named(folder, tmp_path, monkeypatch):
    whole = source(folder, tmp_path)

    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(tokens.os, "pread", fail)
    with pytest.raises(UserError, match=r"is damaged \(train.tokens: Input/output error\)"):
        whole.batch(0)


def test_sizes_are_said(folder, tmp_path):
    (folder / "notes.pdf").write_bytes(b"?")
    (folder / "d.jsonl").write_text('{"text": null}\n{"text": "\\ud800 half"}\n')
    found = source(folder, tmp_path)
    size = sum(len(document.encode()) + 1 for document in DOCUMENTS[:39]) + len("\ufffd half".encode()) + 1
    assert found.summary == (
        f"train: {size:,} tokens of 40 documents, {found.windows:,} windows of 16",
        f"validation: {len(DOCUMENTS[39]) + 1} tokens of 1 documents, {-(-len(DOCUMENTS[39]) // 16)} windows of 16",
        f"Not read in '{folder}': notes.pdf.",
        "Blank documents left out: 1.",
        "Documents with a lone surrogate, which became U+FFFD: 1.",
    )


def test_the_shipped_prose():
    splits = documents(corpus.default_corpus())
    assert len(splits["train"]) == 393 and len(splits["validation"]) == 11
    assert corpus.FolderCorpus(corpus.default_corpus()).extent < 2_000_000
