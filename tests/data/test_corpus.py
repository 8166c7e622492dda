"""Corpora of folders: which files are text, of which split, and what is left out of them."""

import gzip
import json
import lzma
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from based_jax.data import corpus, documents
from based_jax.data.corpus import FolderCorpus
from based_jax.data.documents import Reading
from tests.helpers import texts

DOCUMENTS = [f"Document {i}: " + "äbc " * (i % 7 + 1) for i in range(40)]


def zstd(content):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def lines(documents):
    return "".join(json.dumps({"text": document}) + "\n" for document in documents).encode()


def test_every_file_kind_is_read_and_split(tmp_path):
    (tmp_path / "a.txt").write_text(DOCUMENTS[0])
    (tmp_path / "b.jsonl.xz").write_bytes(lzma.compress(lines(DOCUMENTS[1:10])))
    (tmp_path / "c.JSONL.gz").write_bytes(gzip.compress(lines(DOCUMENTS[10:20])))
    (tmp_path / "d.jsonl.zst").write_bytes(zstd(lines(DOCUMENTS[20:25])) + zstd(lines(DOCUMENTS[25:28])))
    (tmp_path / "e").mkdir()
    column = pa.array([*DOCUMENTS[28:31], None, ""]).dictionary_encode()
    pq.write_table(pa.table({"id": range(5), "text": column}), tmp_path / "e" / "f.parquet")
    (tmp_path / "e" / "g.txt.zst").write_bytes(zstd(DOCUMENTS[31].encode()))
    (tmp_path / "h.TXT").write_text(DOCUMENTS[32])
    pq.write_table(pa.table({"text": DOCUMENTS[33:39]}), tmp_path / "i.parquet", row_group_size=4)
    (tmp_path / "val.txt").write_text(DOCUMENTS[39])
    reading = Reading()
    assert texts.documents(tmp_path, reading) == {"train": DOCUMENTS[:39], "validation": DOCUMENTS[39:]}
    assert (reading.blank, reading.position) == (2, FolderCorpus(tmp_path).extent)


def test_documents_stand_under_a_key_of_any_name(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "no", "body": "one"}\n')
    pq.write_table(pa.table({"text": ["no"], "body": ["two"]}), tmp_path / "b.parquet")
    (tmp_path / "c.txt").write_text("three")
    (tmp_path / "val.txt").write_text("four")
    found = FolderCorpus(tmp_path, "body")
    assert texts.documents(found)["train"] == ["one", "two", "three"]
    assert found.file_hashes() == FolderCorpus(tmp_path).file_hashes() | {"text_feature": "body"}


def test_what_is_not_read_is_named(tmp_path):
    for name in (
        "a.txt",
        "notes.pdf",
        "b.json",
        ".a.txt",
        "README",
        "in/c.txt",
        "in/c.csv",
        ".git/x.txt",
        "d.jsonl.bz2",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")
    (tmp_path / "d.txt").mkdir()
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "in" / "up").symlink_to(tmp_path)
    (tmp_path / os.fsdecode(b"\xff.md")).write_text("")
    found = FolderCorpus(tmp_path)
    assert list(found.file_hashes()) == ["a.txt", "in/c.txt"]
    assert found.left_out == tuple(
        sorted(
            [
                ".a.txt",
                ".git",
                "README",
                "b.json",
                "d.jsonl.bz2",
                "in/c.csv",
                "in/up",
                "notes.pdf",
                "pipe.txt",
                "\\udcff.md",
            ]
        )
    )
    assert corpus.shortened(found.left_out, most=2) == ".a.txt, .git and 8 more"


def test_a_linked_folder_is_read_once(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.txt").write_text("text")
    (tmp_path / "corpus").mkdir()
    for name in ("x", "y"):
        (tmp_path / "corpus" / name).symlink_to(tmp_path / "elsewhere")
    found = FolderCorpus(tmp_path / "corpus")
    assert (list(found.file_hashes()), found.left_out) == (["x/a.txt"], ("y",))


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("valley.txt", "train"),
        ("testament.txt", "train"),
        ("contest.jsonl", "train"),
        ("devotion.txt", "train"),
        ("train-test-split.jsonl", "train"),
        ("test/train.txt", "train"),
        ("evaluate/a.txt", "train"),
        ("val.txt", "validation"),
        ("VAL_00.jsonl.gz", "validation"),
        ("val2.txt", "validation"),
        ("wiki.valid.txt.xz", "validation"),
        ("my-dev.parquet", "validation"),
        ("validation-00000-of-00001.parquet", "validation"),
        ("test/a.txt", "validation"),
        ("en/Validation/b/a.txt", "validation"),
    ],
)
def test_whole_words_of_a_name_are_the_split(tmp_path, name, split):
    assert FolderCorpus(tmp_path).split_of(tmp_path / name) == split


def test_a_mark_at_the_beginning_is_no_text_and_blank_documents_are_counted(tmp_path):
    (tmp_path / "a.txt").write_text("\ufeffOne")
    (tmp_path / "b.jsonl").write_text(
        '\ufeff{"text": "two"}\n\n{"text": ""}\n{"text": null}\n{"text": " \\n"}\n{"text": "three"}\n'
    )
    (tmp_path / "c.txt").write_text("")
    (tmp_path / "d.txt").write_text("  \n")
    (tmp_path / "e.jsonl").write_text("")
    (tmp_path / "test.txt").write_text("four")
    reading = Reading()
    assert texts.documents(tmp_path, reading) == {"train": ["One", "two", "three"], "validation": ["four"]}
    assert reading.blank == 5


def test_lone_surrogates_become_a_replacement(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud800b"}\n{"text": "\\ud83d\\ude00"}\n')
    (tmp_path / "val.txt").write_text("c")
    reading = Reading()
    assert texts.documents(tmp_path, reading)["train"] == ["a\ufffdb", "\U0001f600"]
    assert reading.mended == 1


def test_the_place_of_a_bad_byte_is_that_in_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "CHUNK_CHARACTERS", 64)
    text = "ä line of it\n" * 3000
    raw = text.encode() + b"caf\xe9 au lait\n" + text.encode()
    place = f"at byte {len(text.encode()) + 3}, line 3001."
    for name, content in {
        "a.txt": raw,
        "b.jsonl": lines(["x"]) * 3000 + b"\xff",
        "c.txt.gz": gzip.compress(raw),
    }.items():
        (tmp_path / name).write_bytes(content)
        where = f"at byte {len(content) - 1}, line 3001." if name == "b.jsonl" else place
        with pytest.raises(corpus.UserError, match=where):
            list(documents.read_documents(tmp_path / name, Reading()))


def test_a_hash_changes_with_any_name_or_content(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    first = corpus.combined_hash(FolderCorpus(tmp_path).file_hashes())
    (tmp_path / "a.txt").rename(tmp_path / "b.txt")
    second = corpus.combined_hash(FolderCorpus(tmp_path).file_hashes())
    (tmp_path / "b.txt").write_text("Text")
    assert len({first, second, corpus.combined_hash(FolderCorpus(tmp_path).file_hashes())}) == 3
