"""Text for language models: a corpus, tokenised and packed into windows once, then read at random from ArrayRecord.

Documents follow one another, each closed by the end-of-text token, and the stream is cut into windows of seq_len + 1
tokens; neighbours share one token, so every token is a target once:

    tokens       t h e   e n d <eot> a n d        inputs  = tokens[:-1]
    segment_ids  1 1 1 1 1 1 1   1   2 2 2        labels  = tokens[1:], NO_LABEL where the next document begins
"""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import filelock
import grain
import numpy as np
import tensorflow_datasets as tfds

from based_jax.data.corpus import Corpus, FolderCorpus, default_corpus
from based_jax.data.hosts import own_rows
from based_jax.data.segments import Batch
from based_jax.data.tfds_corpus import TFDS_PREFIX, TfdsCorpus, quiet_tfds
from based_jax.data.tokenizer import Tokenizer, get_tokenizer
from based_jax.errors import UserError
from based_jax.labels import NO_LABEL

CACHE_VARIABLE = "BASED_JAX_CACHE"


def default_cache_dir() -> Path:
    """Return where packed datasets are kept: $BASED_JAX_CACHE, or based_jax in the user's cache folder."""
    user_cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get(CACHE_VARIABLE) or Path(user_cache) / "based_jax")


def open_corpus(path: str | os.PathLike | None, text_feature: str | None = None) -> Corpus:
    """Return the corpus of 'tfds:NAME' or of a folder; the shipped prose if the path is None.

    Raises:
      UserError: a text feature is asked of a folder.
    """
    name = str(path or default_corpus())
    if name.startswith(TFDS_PREFIX):
        return TfdsCorpus(name.removeprefix(TFDS_PREFIX), text_feature)
    if text_feature is not None:
        raise UserError(
            f"text_feature is '{text_feature}', but the path '{name}' is not {TFDS_PREFIX}NAME; it is None there."
        )
    return FolderCorpus(name)


class PackedText(tfds.core.GeneratorBasedBuilder):
    """Windows of a corpus: tokens and segment_ids (seq_len + 1,), id 0 for the padding of a split's last window."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, corpus: Corpus, tokenizer: Tokenizer, seq_len: int, cache_dir: Path):
        self._corpus, self._tokenizer, self._seq_len = corpus, tokenizer, seq_len
        key = f"{corpus.fingerprint()} {tokenizer.fingerprint} {seq_len}"
        config = tfds.core.BuilderConfig(name=hashlib.sha256(key.encode()).hexdigest()[:16])
        with quiet_tfds():
            super().__init__(data_dir=cache_dir, config=config, file_format="array_record")

    def build(self) -> None:
        """Write the dataset unless it is there; another process that writes it is waited for.

        Raises:
          UserError: the corpus is bad or shorter than a window; nothing is written then.
        """
        self.data_path.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(str(self.data_path) + ".lock"):
            if not (self.data_path / "dataset_info.json").exists():
                self._windows = self._packed_splits()
                with quiet_tfds():
                    self.download_and_prepare()
                del self._windows
            elif not self.info.splits:  # written since this builder looked
                self.info.read_from_directory(self.data_path)

    def _packed_splits(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        splits = {}
        for split, documents in self._corpus.split_documents().items():
            tokens, segment_ids = pack(documents, self._tokenizer, self._seq_len)
            if split == "train" and not segment_ids[0].all():
                count = int(np.count_nonzero(segment_ids))
                raise UserError(
                    f"seq_len {self._seq_len} is longer than the data: '{self._corpus}' has {count} tokens to train on."
                )
            splits[split] = tokens, segment_ids
        return splits

    def _info(self):
        window = tfds.features.Tensor(shape=(self._seq_len + 1,), dtype=np.int32)
        features = tfds.features.FeaturesDict({"tokens": window, "segment_ids": window})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in self._windows}

    def _generate_examples(self, split: str):
        for index, (tokens, segment_ids) in enumerate(zip(*self._windows[split], strict=True)):
            yield index, {"tokens": tokens, "segment_ids": segment_ids}


def pack(documents: list[str], tokenizer: Tokenizer, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (tokens, segment_ids) of all windows of documents, int32 of shape (windows, seq_len + 1)."""
    ids = [np.append(np.asarray(text, np.int32), tokenizer.end_of_text) for text in tokenizer.encode_batch(documents)]
    stream = np.concatenate(ids)
    numbers = np.repeat(np.arange(len(ids)), [len(tokens) for tokens in ids])
    windows = max(-(-(len(stream) - 1) // seq_len), 1)
    padding = windows * seq_len + 1 - len(stream)
    at = np.arange(windows)[:, None] * seq_len + np.arange(seq_len + 1)[None, :]
    tokens = np.pad(stream, (0, padding))[at].astype(np.int32)
    document = np.pad(numbers, (0, padding), constant_values=-1)[at]
    segment_ids = np.where(document >= 0, document - document[:, :1] + 1, 0).astype(np.int32)
    return tokens, segment_ids


class TextSource:
    """Batches of packed text: {"inputs", "labels", "segment_ids"} of shape (batch_size / process_count, seq_len).

    Batch t is a pure function of (corpus, tokenizer, seq_len, seed, batch_size, t): windows are shuffled anew in every
    epoch, and a batch is the next `batch_size` of them. Host p of n gets the p-th of n equal blocks of its rows.

    Args:
      path, text_feature: the corpus, see `open_corpus`.
      tokenizer: a name of `data/tokenizer.py`.
      seq_len: tokens per row.
      seed: of the shuffle.
      cache_dir: where the packed windows are kept; `default_cache_dir` if None.

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
        process_index: int = 0,
        process_count: int = 1,
    ):
        if seq_len < 1:
            raise UserError(f"seq_len is {seq_len}; it is at least 1.")
        self._batch_size, self._seq_len = batch_size, seq_len
        self._own = own_rows(batch_size, process_index, process_count)
        cache = Path(cache_dir or default_cache_dir()).resolve()
        builder = PackedText(open_corpus(path, text_feature), get_tokenizer(tokenizer), seq_len, cache)
        builder.build()
        self._path = builder.data_path
        with self._reading():
            self._validation = builder.as_data_source(split="validation")
            train = builder.as_data_source(split="train")
            self.windows = len(train)
            self._train = grain.MapDataset.source(train).seed(seed).shuffle().repeat()

    @property
    def sizes(self) -> dict[str, tuple[int, int]]:
        """Windows and tokens of each split; the padding that fills the last window counts as tokens."""
        windows = {"train": self.windows, "validation": len(self._validation)}
        return {split: (count, count * self._seq_len) for split, count in windows.items()}

    def batch(self, step: int) -> Batch:
        """Return this host's rows of training batch `step`, counted from 0 through all epochs."""
        rows = range(step * self._batch_size, (step + 1) * self._batch_size)[self._own]
        with self._reading():
            return _batch([self._train[row] for row in rows])

    def eval_batches(self, name: str) -> Iterator[Batch]:
        """Yield this host's rows of the validation windows, once, the last batch filled up with unlabelled rows."""
        empty = {name: np.zeros_like(window) for name, window in self._validation[0].items()}
        for start in range(0, len(self._validation), self._batch_size):
            rows = range(start, start + self._batch_size)[self._own]
            with self._reading():
                yield _batch([self._validation[i] if i < len(self._validation) else empty for i in rows])

    @contextlib.contextmanager
    def _reading(self):
        """Name the dataset in whatever a damaged file makes the reader raise."""
        try:
            yield
        except Exception as error:
            reason = str(error).partition("\n")[0][:150]
            raise UserError(
                f"Packed text '{self._path}' is damaged ({reason}); remove this folder and it is built again."
            ) from error


def _batch(windows: list[dict[str, np.ndarray]]) -> Batch:
    tokens, ids = (np.stack([window[name] for window in windows]) for name in ("tokens", "segment_ids"))
    labelled = (ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] != 0)
    return {
        "inputs": tokens[:, :-1],
        "labels": np.where(labelled, tokens[:, 1:], NO_LABEL).astype(np.int32),
        "segment_ids": ids[:, :-1],
    }
