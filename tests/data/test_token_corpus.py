"""Corpora of tokens: files of every kind are one stream, of which documents are held out at the end."""

import numpy as np
import pytest

from based_jax.data import token_files
from based_jax.data.documents import Reading
from based_jax.data.packing import PackedText
from based_jax.data.text import TextSource, open_corpus
from based_jax.data.token_corpus import TokenCorpus
from based_jax.data.tokenizer import ByteTokenizer

END = ByteTokenizer.end_of_text


def drawn(rng, count, documents):
    """Return tokens of about so many documents."""
    tokens = rng.integers(256, size=count)
    tokens[rng.integers(count - 1, size=documents)] = END
    return tokens


def streams(folder):
    """Return the tokens of both splits, as they are packed."""
    packed = PackedText.open(TokenCorpus(folder), ByteTokenizer(), folder.parent / "cache")
    return {split: packed.stream(split).read(0, 10**9).tolist() for split in ("train", "validation")}, packed


def write(folder, **files):
    folder.mkdir(exist_ok=True)
    for name, tokens in files.items():
        np.asarray(tokens).tofile(folder / f"{name.replace('_', '.')}.bin")


def test_files_of_every_kind_are_one_stream(tmp_path, monkeypatch):
    monkeypatch.setattr(token_files, "TOKENS_AT_ONCE", 97)
    tokens = drawn(np.random.default_rng(), 1000, documents=30)
    folder = tmp_path / "tokens"
    write(folder, a=tokens[:301].astype("<u2"), b_uint32=tokens[301:400].astype("<u4"), e=tokens[:0].astype("<u2"))
    np.save(folder / "c.npy", tokens[400:700].astype(np.uint16))
    np.save(folder / "d.npy", tokens[700:].astype(np.uint32))
    write(folder, f_val_uint16=np.array([1, END, 2, END], "<u2"))
    found, packed = streams(folder)
    assert found == {"train": [*tokens.tolist(), END], "validation": [1, END, 2, END]}
    assert packed.count("train", "documents") == found["train"].count(END)
    assert packed.count("validation", "documents") == 2


@pytest.mark.parametrize(("count", "held"), [(1000, 10), (2500, 20)])
def test_documents_at_the_end_are_held_out(tmp_path, monkeypatch, count, held):
    monkeypatch.setattr(token_files, "TOKENS_AT_ONCE", 7)
    tokens = np.arange(count) % 256
    tokens[9::10] = END
    write(tmp_path / "tokens", a=tokens[:333].astype("<u2"), b=tokens[333:].astype("<u2"))
    found, _ = streams(tmp_path / "tokens")
    assert found == {"train": tokens[:-held].tolist(), "validation": tokens[-held:].tolist()}


@pytest.mark.parametrize(("count", "held"), [(2, 1), (500, 5)])
def test_one_document_is_cut(tmp_path, count, held):
    write(tmp_path / "tokens", all=np.full(count, 7, "<u2"))
    found, packed = streams(tmp_path / "tokens")
    assert found == {"train": [7] * (count - held) + [END], "validation": [7] * held + [END]}
    assert packed.count("train", "documents") == packed.count("validation", "documents") == 1


def test_progress_counts_bytes(tmp_path):
    write(tmp_path / "tokens", a=np.full(500, 7, "<u2"), val=np.full(50, 7, "<u2"))
    corpus, reading = TokenCorpus(tmp_path / "tokens"), Reading()
    assert sum(len(block) for _, block in corpus.blocks(ByteTokenizer(), reading)) == 552
    assert reading.position == corpus.extent == 1100


def test_tokens_are_trained_on_as_the_text_they_are_of(tmp_path):
    documents = [f"Document {number}. " * 9 for number in range(20)]
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "val.txt").write_text(documents[0])
    for number, document in enumerate(documents[1:]):
        (tmp_path / "text" / f"{number:02}.txt").write_text(document)
    ids = [[*document.encode(), END] for document in documents]
    write(tmp_path / "tokens", val=np.array(ids[0], "<u2"), train=np.concatenate(ids[1:]).astype("<u2"))
    text, tokens = (
        TextSource(tmp_path / name, "bytes", 16, 4, cache_dir=tmp_path / "cache") for name in ("text", "tokens")
    )
    assert text.record["fingerprint"] == tokens.record["fingerprint"]
    for name, rows in text.batch(3).items():
        np.testing.assert_array_equal(tokens.batch(3)[name], rows)


def test_a_folder_with_texts_is_one_of_texts(tmp_path):
    write(tmp_path, model=np.zeros(9, "<u2"))
    assert isinstance(open_corpus(tmp_path), TokenCorpus)
    (tmp_path / "a.txt").write_text("text")
    assert open_corpus(tmp_path).left_out == ("model.bin",)
