"""What can be trained on: a task is a frozen config that opens a source of batches.

A new task is one dataclass here: its data, since the loss and the metrics of all of them are those of `train/step.py`.
"""

import dataclasses
from collections.abc import Iterator
from typing import Literal, Protocol

import numpy as np

from based_jax.data import mqar
from based_jax.data.mqar import Segment
from based_jax.data.tokenizer import get_tokenizer


class Source(Protocol):
    """Batches of one task for one host."""

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """Return this host's rows of training batch `step`, a pure function of (config, step)."""
        ...

    @property
    def eval_names(self) -> tuple[str, ...]:
        """The evaluation segments."""
        ...

    def eval_batches(self, name: str) -> Iterator[dict[str, np.ndarray]]:
        """Yield this host's rows of an evaluation segment, once, in order."""
        ...


@dataclasses.dataclass(frozen=True)
class MqarTask:
    """Multi-query associative recall (`data/mqar.py`): a preset, with some of its values replaced."""

    kind: Literal["mqar"] = "mqar"
    preset: str = "figure2"
    train: tuple[Segment, ...] | None = None
    test: tuple[Segment, ...] | None = None
    vocab_size: int | None = None
    seed: int | None = None
    random_non_queries: bool | None = None
    shuffle: bool = False

    def __post_init__(self):
        self.resolved()

    def resolved(self) -> mqar.MqarConfig:
        """Return the preset with this task's replacements."""
        names = ("train", "test", "vocab_size", "seed", "random_non_queries")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return dataclasses.replace(mqar.get_preset(self.preset), **given)

    @property
    def num_tokens(self) -> int:
        """Ids that the task uses."""
        return self.resolved().vocab_size

    def open(self, batch_size: int, process_index: int, process_count: int) -> Source:
        """Return the source of one host's batches."""
        return mqar.MqarSource(
            self.resolved(),
            batch_size,
            shuffle=self.shuffle,
            process_index=process_index,
            process_count=process_count,
        )


@dataclasses.dataclass(frozen=True)
class TextTask:
    """Language modelling on a folder of text files (`data/text.py`); the shipped prose where `path` is None."""

    kind: Literal["text"] = "text"
    path: str | None = None
    tokenizer: str = "gpt2"
    seq_len: int = 2048
    seed: int = 0
    cache_dir: str | None = None

    @property
    def num_tokens(self) -> int:
        """Ids that the task uses."""
        return get_tokenizer(self.tokenizer).vocab_size

    def open(self, batch_size: int, process_index: int, process_count: int) -> Source:
        """Build the dataset if it is not cached, and return the source of one host's batches."""
        from based_jax.data.text import TextSource  # imports tensorflow-datasets, which MQAR does not need

        return TextSource(
            self.path,
            self.tokenizer,
            self.seq_len,
            batch_size,
            seed=self.seed,
            cache_dir=self.cache_dir,
            process_index=process_index,
            process_count=process_count,
        )
