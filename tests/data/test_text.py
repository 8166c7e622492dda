"""Text: reading a corpus, packing it, and batches that are a pure function of the step."""

import gzip
import json
import lzma

import numpy as np
import pytest

from based_jax.data import corpus, text
from based_jax.data.tokenizer import ByteTokenizer
from based_jax.errors import UserError
from based_jax.labels import NO_LABEL

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


def test_every_file_kind_is_read_and_split(folder):
    splits = corpus.FolderCorpus(folder).split_documents()
    assert splits == {"train": DOCUMENTS[:39], "validation": DOCUMENTS[39:]}


def test_held_out_documents_do_not_depend_on_the_order(folder):
    (folder / "val.txt").unlink()
    held = corpus.FolderCorpus(folder).split_documents()["validation"]
    (folder / "a.txt").rename(folder / "z.txt")
    assert held and corpus.FolderCorpus(folder).split_documents()["validation"] == held


def test_windows_hold_every_token_and_mark_documents():
    tokens, ids = text.pack(["ab", "cde", "f"], ByteTokenizer(), 4)
    stream = [*b"ab", 256, *b"cde", 256, *b"f", 256]
    np.testing.assert_array_equal(tokens, [stream[0:5], stream[4:9]])
    np.testing.assert_array_equal(ids, [[1, 1, 1, 2, 2], [1, 1, 1, 2, 2]])


def test_labels_are_the_next_token_of_the_same_document():
    tokens, ids = text.pack(["ab", "c"], ByteTokenizer(), 6)
    batch = text._batch([{"tokens": tokens[0], "segment_ids": ids[0]}])
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
    tokens, _ = text.pack(corpus.FolderCorpus(folder).split_documents()["train"], ByteTokenizer(), 16)
    assert rows == {row.tobytes() for row in tokens[:, :-1]}


def test_hosts_share_a_batch(folder, tmp_path):
    whole = source(folder, tmp_path).batch(5)
    parts = [source(folder, tmp_path, process_index=p, process_count=2).batch(5) for p in range(2)]
    for name, rows in whole.items():
        np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), rows)


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


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "empty.txt' is empty"),
        ("latin.txt", "caf\xe9".encode("latin-1"), "latin.txt' is not UTF-8"),
        ("bad.jsonl", b'{"text": "a"}\n{"no": 1}\n', "bad.jsonl', line 2"),
        ("cut.txt.xz", lzma.compress(b"abc" * 100)[:40], "cut.txt.xz' cannot be read"),
    ],
)
def test_a_bad_file_is_named_and_nothing_is_written(folder, tmp_path, name, content, message):
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        source(folder, tmp_path)
    assert not list((tmp_path / "cache").rglob("*.array_record*"))


def test_a_dataset_that_another_process_has_written_meanwhile_is_read(folder, tmp_path):
    first, second = (text.PackedText(corpus.FolderCorpus(folder), ByteTokenizer(), 16, tmp_path) for _ in range(2))
    first.build()
    second.build()
    assert second.info.splits["train"].num_examples == first.info.splits["train"].num_examples > 0


def test_a_sequence_longer_than_the_data(folder, tmp_path):
    with pytest.raises(UserError, match="seq_len 100000 is longer than the data"):
        source(folder, tmp_path, seq_len=100_000)


@pytest.mark.parametrize("path", ["missing", "."])
def test_no_corpus(tmp_path, path):
    with pytest.raises(UserError, match="Corpus"):
        source(tmp_path / path, tmp_path / "elsewhere")


def test_a_damaged_dataset_is_named(folder, tmp_path):
    source(folder, tmp_path)
    (record,) = (tmp_path / "cache").rglob("*train.array_record*")
    record.write_bytes(record.read_bytes()[:-200])
    with pytest.raises(UserError, match="is damaged"):
        source(folder, tmp_path).batch(0)


def test_the_shipped_prose():
    splits = corpus.FolderCorpus(corpus.default_corpus()).split_documents()
    assert len(splits["train"]) == 393 and len(splits["validation"]) == 11
    assert sum(file.stat().st_size for file in corpus.corpus_files(corpus.default_corpus())) < 2_000_000
