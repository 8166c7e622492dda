"""Corpora as lists of their documents."""

from based_jax.data.corpus import Corpus, FolderCorpus
from based_jax.data.documents import Reading
from based_jax.data.holdout import split_chunks


def documents(corpus: Corpus | str, reading: Reading | None = None) -> dict[str, list[str]]:
    """Return the documents of both splits of a corpus, or of a folder."""
    corpus = corpus if hasattr(corpus, "chunks") else FolderCorpus(corpus)
    found = {"train": [], "validation": []}
    parts = {"train": "", "validation": ""}
    for split, (text, last) in split_chunks(corpus, reading or Reading()):
        parts[split] += text
        if last:
            found[split].append(parts[split])
            parts[split] = ""
    assert not any(parts.values())
    return found
