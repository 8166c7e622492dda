"""Text for language models: windows of packed documents, read at random, as batches of a pure function of the step.

Documents follow one another, each closed by the end-of-text token, and the stream is cut into windows of seq_len + 1
tokens; neighbours share one token, so every token is a target once:

    tokens       t h e   e n d <eot> a n d        inputs  = tokens[:-1]
    segment_ids  1 1 1 1 1 1 1   1   2 2 2        labels  = tokens[1:], NO_LABEL where the next document begins
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grain
import numpy as np

from based_jax.data.corpus import (
    TFDS_PREFIX,
    FolderCorpus,
    TextSplit,
    combined_hash,
    default_corpus,
    shortened,
)
from based_jax.data.hosts import Rows, own_rows
from based_jax.data.packing import SPLITS, AnyCorpus, PackedFolder, PackedText, default_cache_dir
from based_jax.data.segments import Batch
from based_jax.data.text_checks import Mixture, TextPart, absolute, check_text, is_tfds
from based_jax.data.token_corpus import TokenCorpus
from based_jax.data.tokenizer import TextTokenizer
from based_jax.data.tokenizer_file import named_tokenizer
from based_jax.data.tokens import Windows
from based_jax.errors import UserError
from based_jax.labels import NO_LABEL

COUNTED = {
    "blank": "Blank documents left out: {count:,}.",
    "mended": "Documents with a lone surrogate, which became U+FFFD: {count:,}.",
}


def open_corpus(path: str | os.PathLike | None, text_feature: str | None = None) -> AnyCorpus:
    """Return the corpus of 'tfds:NAME' or of a folder, of texts, tokens or what was packed before.

    Args:
      path: the shipped prose if it is None.
      text_feature: see `TfdsCorpus` and `FolderCorpus`.

    Raises:
      UserError: a feature of what has none, or the folder cannot be read.
    """
    name = str(path or default_corpus())
    if is_tfds(name):
        from based_jax.data.tfds_corpus import TfdsCorpus  # imports tensorflow-datasets, which folders do without

        return TfdsCorpus(name.removeprefix(TFDS_PREFIX), text_feature)
    folder = absolute(name, "path")
    texts, tokens, packed = FolderCorpus(folder, text_feature), TokenCorpus(folder), PackedFolder(folder)
    if not packed.exists and (tokens.is_empty or not texts.is_empty):
        return texts
    if text_feature is not None:
        raise UserError(f"text_feature is '{text_feature}', but corpus '{folder}' has tokens; it is None there.")
    return packed if packed.exists else tokens


class PackedCorpus:
    """One corpus, packed, and its windows.

    Raises:
      UserError: the corpus is bad or shorter than a window, or the packed windows cannot be read.
    """

    def __init__(self, part: TextPart, tokenizer: TextTokenizer, seq_len: int, cache_dir: Path, processes: int):
        self.weight, self._seq_len = part.weight, seq_len
        self.corpus = open_corpus(part.path, part.text_feature)
        self.packed = PackedText.open(self.corpus, tokenizer, cache_dir, processes)
        count = self.packed.count("train", "tokens")
        if count <= seq_len:
            raise UserError(
                f"data.seq_len {seq_len} is longer than the data: '{self.corpus}' has {count} tokens to train on."
            )
        self.train, self.validation = (
            Windows(self.packed.stream(split), tokenizer.end_of_text, seq_len, name=split) for split in SPLITS
        )

    @property
    def files(self) -> dict[str, str]:
        """The sha256 of each file of the corpus."""
        return self.packed.index["files"]

    @property
    def summary(self) -> Iterator[str]:
        """Both splits' sizes, and what was left out, a line each."""
        yield self._size("train", len(self.train))
        yield self._size("validation", len(self.validation))
        if self.corpus.left_out:
            yield f"Not read in '{self.corpus}': {shortened(self.corpus.left_out)}."
        for what, sentence in COUNTED.items():
            if count := self.packed.index[what]:
                yield sentence.format(count=count)

    def _size(self, split: TextSplit, windows: int) -> str:
        tokens, documents = (self.packed.count(split, what) for what in ("tokens", "documents"))
        return f"{split}: {tokens:,} tokens of {documents:,} documents, {windows:,} windows of {self._seq_len:,}"


class TextSource:
    """Batches of packed text: {"inputs", "labels", "segment_ids"} of shape (rows, seq_len).

    Batch t is a pure function of (corpora, weights, tokenizer, seq_len, seed, batch_size, t): a corpus' windows are
    shuffled anew in every epoch of it, those of several follow one another by their weights in a fixed order, and a
    batch is the next `batch_size` of them, of which a host gets its rows.

    Args:
      path, text_feature: the corpus, see `open_corpus`.
      tokenizer: a name of `data/tokenizer.py`, or the path of a tokenizer.json.
      seq_len: tokens per row.
      mixture: corpora by their names, in place of the one.
      seed: of the shuffle.
      rows: places in every batch that this host feeds, all if None.
      cache_dir: where the packed windows are kept; `default_cache_dir` if None.
      processes: that pack text which is not packed yet, by files where there are as many, else by batches; 1 for this
        one, with the threads of its tokenizer.

    Raises:
      UserError: a corpus is bad or shorter than a window, or the packed windows cannot be read.
    """

    def __init__(
        self,
        path: str | os.PathLike | None,
        tokenizer: str,
        seq_len: int,
        batch_size: int,
        *,
        text_feature: str | None = None,
        mixture: Mixture | None = None,
        seed: int = 0,
        cache_dir: str | os.PathLike | None = None,
        processes: int = 1,
        rows: Rows | None = None,
    ):
        check_text(path, text_feature, mixture, seq_len, seed, cache_dir, processes)
        self._batch_size, self._is_mixed = batch_size, mixture is not None
        self._own = own_rows(batch_size, rows)
        ids, cache = named_tokenizer(tokenizer), absolute(cache_dir or default_cache_dir(), "cache_dir")
        parts = mixture or {"validation": TextPart(str(path or default_corpus()), text_feature=text_feature)}
        self._parts = {
            name: PackedCorpus(parts[name], ids, seq_len, cache, processes) for name in sorted(parts)
        }  # by name: a config's keys have no order
        self.windows = sum(len(part.train) for part in self._parts.values())
        self._train = grain.MapDataset.mix(
            [grain.MapDataset.source(part.train).seed(seed).shuffle().repeat() for part in self._parts.values()],
            [part.weight for part in self._parts.values()],
        )

    def batch(self, step: int) -> Batch:
        """Return this host's rows of training batch `step`, counted from 0 through all epochs."""
        return _batch([self._train[int(row)] for row in step * self._batch_size + self._own])

    @property
    def eval_names(self) -> tuple[str, ...]:
        """The names of the mixture's parts; of one corpus, "validation"."""
        return tuple(self._parts)

    def eval_batches(self, name: str) -> Iterator[Batch]:
        """Yield this host's rows of the validation windows, once, the last batch filled up with unlabelled rows."""
        windows = self._parts[name].validation
        empty = {name: np.zeros_like(window) for name, window in windows[0].items()}
        for start in range(0, len(windows), self._batch_size):
            places = (int(place) for place in start + self._own)
            yield _batch([windows[i] if i < len(windows) else empty for i in places])

    @property
    def record(self) -> dict[str, Any]:
        """What the batches depend on beside the config, and where it was found."""
        parts = self._parts.items()
        prints = {name: part.packed.fingerprint for name, part in parts}
        return {
            "fingerprint": combined_hash(prints) if self._is_mixed else prints["validation"],
            "path": ", ".join(part.corpus.location for _, part in parts),
            "files": {self._under(name, file): digest for name, part in parts for file, digest in part.files.items()},
        }

    @property
    def folders(self) -> tuple[Path, ...]:
        """Where the packed text of each corpus is."""
        return tuple(part.packed.folder for part in self._parts.values())

    @property
    def summary(self) -> tuple[str, ...]:
        """Both splits' sizes, and what was left out, a line each."""
        lines = [self._under(name, line) for name, part in self._parts.items() for line in part.summary]
        return (*self._shares, *lines)

    @property
    def _shares(self) -> tuple[str, ...]:
        if not self._is_mixed:
            return ()
        total = sum(part.weight for part in self._parts.values())
        shares = ", ".join(f"{name} {part.weight / total:.1%}" for name, part in self._parts.items())
        return (f"rows of a batch: {shares}",)

    def _under(self, name: str, what: str) -> str:
        return f"{name}/{what}" if self._is_mixed else what


def _batch(windows: list[dict[str, np.ndarray]]) -> Batch:
    tokens, ids = (np.stack([window[name] for window in windows]) for name in ("tokens", "segment_ids"))
    labelled = (ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] != 0)
    return {
        "inputs": tokens[:, :-1],
        "labels": np.where(labelled, tokens[:, 1:], NO_LABEL).astype(np.int32),
        "segment_ids": ids[:, :-1],
    }
