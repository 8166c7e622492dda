"""What is held out of training where a corpus has no validation files: by hash, and by size where that is no share."""

import numpy as np
import pytest

from based_jax.data import holdout
from based_jax.data.documents import Chunk, Reading
from based_jax.data.holdout import hold_out, measure, split_chunks
from tests.helpers import texts

SHARES = holdout.FITTING_SHARES


def write(folder, documents):
    for number, document in enumerate(documents):
        (folder / f"{number:03}.txt").write_text(document)


def share(splits):
    sizes = {split: sum(map(len, documents)) for split, documents in splits.items()}
    return sizes["validation"] / sum(sizes.values())


@pytest.mark.parametrize(
    "documents", [["word " * 42_000, "8 chars."], ["8 chars.", "word " * 42_000], ["ab " * 999] * 2]
)
def test_few_documents_are_split_by_size(tmp_path, documents):
    write(tmp_path, documents)
    splits = texts.documents(tmp_path)
    assert 0.04 < share(splits) < 0.06
    assert sorted("".join(splits["train"] + splits["validation"])) == sorted("".join(documents))


def test_one_document_is_cut_between_lines(tmp_path):
    write(tmp_path, ["".join(f"line {i}\n" for i in range(2000))])
    splits = texts.documents(tmp_path)
    assert splits["validation"][0].startswith("line 19") and 0.049 < share(splits) < 0.052


def test_a_document_without_a_place_to_cut_is_cut_at_a_twentieth(tmp_path):
    write(tmp_path, ["x" * 999])
    assert texts.documents(tmp_path) == {"train": ["x" * 949], "validation": ["x" * 50]}


def test_many_documents_are_split_by_their_hash(tmp_path):
    documents = [f"Document {i} " * 3 for i in range(400)]
    held = hold_out(*measure(Chunk(document, last=True) for document in documents))
    hashes, _ = measure(Chunk(document, last=True) for document in documents)
    assert held.cut is None and held.documents.sum() == 4
    np.testing.assert_array_equal(held.documents, (hashes % 100 == 0) | (hashes == hashes.min()))
    again = hold_out(*measure(Chunk(document, last=True) for document in reversed(documents)))
    np.testing.assert_array_equal(again.documents[::-1], held.documents)


def test_a_document_that_is_too_large_a_share_is_not_held_out_as_a_whole():
    sizes, hashes = np.array([10] * 300 + [5000]), np.arange(1, 302, dtype=np.uint64) * 100 + 1
    hashes[-1] = 100
    held = hold_out(hashes, sizes)
    assert not held.documents[-1] and held.cut is None
    assert 0.04 < sizes[held.documents].sum() / sizes.sum() <= 0.05


def test_any_sizes_leave_a_share_to_both(rounds=300):
    rng = np.random.default_rng(0)
    for _ in range(rounds):
        sizes = np.exp(rng.uniform(0, 12, size=rng.integers(1, 60))).astype(np.int64) + 1
        held = hold_out(rng.integers(2**63, size=len(sizes)).astype(np.uint64), sizes)
        validation = sizes[held.documents].sum() + (held.cut.held if held.cut else 0)
        assert held.cut is None or 0 <= held.cut.kept < sizes[held.cut.document] > 0
        assert held.cut is None or not held.documents[held.cut.document]
        assert sizes.sum() < 40 or SHARES[0] <= validation / sizes.sum() <= SHARES[1]


def test_a_document_in_many_chunks_is_held_out_as_in_one(tmp_path, monkeypatch):
    write(tmp_path, ["some words here\n" * 700, "more of them " * 900])
    whole = texts.documents(tmp_path)
    monkeypatch.setattr("based_jax.data.documents.CHUNK_CHARACTERS", 100)
    small = texts.documents(tmp_path)
    assert abs(share(small) - share(whole)) < 0.01
    assert sorted("".join(small["train"] + small["validation"])) == sorted(
        "".join(whole["train"] + whole["validation"])
    )


def test_blank_validation_files_are_none(tmp_path):
    write(tmp_path, ["Document"] * 3)
    (tmp_path / "val.txt").write_text(" ")
    assert texts.documents(tmp_path)["validation"]


def test_every_chunk_of_a_split_says_where_a_document_ends(tmp_path):
    write(tmp_path, ["One two three. " * 40])
    from based_jax.data.corpus import FolderCorpus

    ends = {split: chunk.last for split, chunk in split_chunks(FolderCorpus(tmp_path), Reading())}
    assert ends == {"train": True, "validation": True}
