"""Text for language models: windows of packed documents, read at random, as batches of a pure function of the step.

Documents follow one another, each closed by the end-of-text token, and the stream is cut into windows of seq_len + 1
tokens; neighbours share one token, so every token is a target once:

    tokens       t h e   e n d <eot> a n d        inputs  = tokens[:-1]
    segment_ids  1 1 1 1 1 1 1   1   2 2 2        labels  = tokens[1:], NO_LABEL where the next document begins
"""

import os
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np

from based_jax.data.corpus import TFDS_PREFIX, Corpus, FolderCorpus, TextSplit, default_corpus, shortened
from based_jax.data.hosts import Rows, own_rows
from based_jax.data.packing import SPLITS, PackedText, default_cache_dir
from based_jax.data.segments import Batch
from based_jax.data.text_checks import absolute, check_text, is_tfds
from based_jax.data.tokenizer import get_tokenizer
from based_jax.data.tokens import Windows
from based_jax.errors import UserError
from based_jax.labels import NO_LABEL

COUNTED = {
    "blank": "Blank documents left out: {count:,}.",
    "mended": "Documents with a lone surrogate, which became U+FFFD: {count:,}.",
}


def open_corpus(path: str | os.PathLike | None, text_feature: str | None = None) -> Corpus:
    """Return the corpus of 'tfds:NAME' or of a folder; the shipped prose if the path is None."""
    name = str(path or default_corpus())
    if not is_tfds(name):
        return FolderCorpus(absolute(name, "path"))
    from based_jax.data.tfds_corpus import TfdsCorpus  # imports tensorflow-datasets, which folders do without

    return TfdsCorpus(name.removeprefix(TFDS_PREFIX), text_feature)


class TextSource:
    """Batches of packed text: {"inputs", "labels", "segment_ids"} of shape (rows, seq_len).

    Batch t is a pure function of (corpus, tokenizer, seq_len, seed, batch_size, t): windows are shuffled anew in every
    epoch, and a batch is the next `batch_size` of them, of which a host gets its rows.

    Args:
      path, text_feature: the corpus, see `open_corpus`.
      tokenizer: a name of `data/tokenizer.py`.
      seq_len: tokens per row.
      seed: of the shuffle.
      rows: places in every batch that this host feeds, all if None.
      cache_dir: where the packed windows are kept; `default_cache_dir` if None.
      processes: that encode text which is not packed yet; 1 for this one, with the threads of its tokenizer.

    Raises:
      UserError: the corpus is bad or shorter than a window, or the packed windows cannot be read.
    """

    eval_names = ("validation",)

    def __init__(
        self,
        path: str | os.PathLike | None,
        tokenizer: str,
        seq_len: int,
        batch_size: int,
        *,
        text_feature: str | None = None,
        seed: int = 0,
        cache_dir: str | os.PathLike | None = None,
        processes: int = 1,
        rows: Rows | None = None,
    ):
        check_text(path, text_feature, seq_len, seed, cache_dir, processes)
        self._batch_size, self._seq_len = batch_size, seq_len
        self._own = own_rows(batch_size, rows)
        self._corpus, ids = open_corpus(path, text_feature), get_tokenizer(tokenizer)
        cache = absolute(cache_dir or default_cache_dir(), "cache_dir")
        self._packed = PackedText.open(self._corpus, ids, cache, processes)
        count = self._packed.count("train", "tokens")
        if count <= seq_len:
            raise UserError(
                f"data.seq_len {seq_len} is longer than the data: '{self._corpus}' has {count} tokens to train on."
            )
        train, self._validation = (
            Windows(self._packed.stream(split), ids.end_of_text, seq_len, name=split) for split in SPLITS
        )
        self.windows = len(train)
        self._train = grain.MapDataset.source(train).seed(seed).shuffle().repeat()

    def batch(self, step: int) -> Batch:
        """Return this host's rows of training batch `step`, counted from 0 through all epochs."""
        return _batch([self._train[int(row)] for row in step * self._batch_size + self._own])

    def eval_batches(self, name: str) -> Iterator[Batch]:
        """Yield this host's rows of the validation windows, once, the last batch filled up with unlabelled rows."""
        empty = {name: np.zeros_like(window) for name, window in self._validation[0].items()}
        for start in range(0, len(self._validation), self._batch_size):
            places = (int(place) for place in start + self._own)
            yield _batch([self._validation[i] if i < len(self._validation) else empty for i in places])

    @property
    def record(self) -> dict[str, Any]:
        """What the batches depend on beside the config, and where it was found."""
        index = self._packed.index
        return {"fingerprint": self._packed.fingerprint, "path": self._corpus.location, "files": index["files"]}

    @property
    def summary(self) -> tuple[str, ...]:
        """Both splits' sizes, and what was left out, a line each."""
        lines = [self._size("train", self.windows), self._size("validation", len(self._validation))]
        if self._corpus.left_out:
            lines.append(f"Not read in '{self._corpus}': {shortened(self._corpus.left_out)}.")
        for what, sentence in COUNTED.items():
            if count := self._packed.index[what]:
                lines.append(sentence.format(count=count))
        return tuple(lines)

    def _size(self, split: TextSplit, windows: int) -> str:
        tokens, documents = (self._packed.count(split, what) for what in ("tokens", "documents"))
        return f"{split}: {tokens:,} tokens of {documents:,} documents, {windows:,} windows of {self._seq_len:,}"


def _batch(windows: list[dict[str, np.ndarray]]) -> Batch:
    tokens, ids = (np.stack([window[name] for window in windows]) for name in ("tokens", "segment_ids"))
    labelled = (ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] != 0)
    return {
        "inputs": tokens[:, :-1],
        "labels": np.where(labelled, tokens[:, 1:], NO_LABEL).astype(np.int32),
        "segment_ids": ids[:, :-1],
    }
