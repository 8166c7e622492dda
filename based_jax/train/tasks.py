"""What can be trained on: a task is a frozen config that opens a source of batches.

A new task is one dataclass here: its data, since the loss and the metrics of all of them are those of `train/step.py`.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import ClassVar, Literal, Protocol

import numpy as np

from based_jax.data import (
    compression,
    forgetting_mqar,
    in_context_ngram,
    induction_heads,
    memorization,
    mqar,
    needle,
    selective_copying,
    state_tracking,
)
from based_jax.data.segments import SegmentedTask, SegmentSource
from based_jax.data.tokenizer import get_tokenizer
from based_jax.errors import unknown


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
class PresetTask:
    """A synthetic task: one of its module's presets, with those of its values replaced that are not None here.

    A subclass adds the fields that can be replaced, under the names that they have in the preset's class.

    Attributes:
      kind: the key that chooses the task in a config.
      preset: a key of `presets`.
      seed: of the examples and of their order.
      shuffle: whether an epoch permutes examples and batches, rather than reads the segments in their order.
    """

    presets: ClassVar[Mapping[str, SegmentedTask]]
    kind: str = ""
    preset: str = "default"
    seed: int | None = None
    shuffle: bool = False

    def __post_init__(self):
        self.resolved()

    def resolved(self) -> SegmentedTask:
        """Return the preset with this task's replacements; UserError for an unknown preset or an impossible value."""
        if self.preset not in self.presets:
            raise unknown(f"{self.kind} preset", self.preset, self.presets)
        names = [field.name for field in dataclasses.fields(self) if field.name not in ("kind", "preset", "shuffle")]
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return dataclasses.replace(self.presets[self.preset], **given)

    @property
    def num_tokens(self) -> int:
        """Ids that the task uses."""
        return self.resolved().vocab_size

    def open(self, batch_size: int, process_index: int, process_count: int) -> SegmentSource:
        """Return the source of one host's batches."""
        return SegmentSource(
            self.resolved(),
            batch_size,
            shuffle=self.shuffle,
            process_index=process_index,
            process_count=process_count,
        )


@dataclasses.dataclass(frozen=True)
class MqarTask(PresetTask):
    """Multi-query associative recall (`data/mqar.py`)."""

    presets = mqar.PRESETS
    kind: Literal["mqar"] = "mqar"
    preset: str = "figure2"
    train: tuple[mqar.Segment, ...] | None = None
    test: tuple[mqar.Segment, ...] | None = None
    vocab_size: int | None = None
    random_non_queries: bool | None = None


@dataclasses.dataclass(frozen=True)
class SelectiveCopyingTask(PresetTask):
    """Selective copying (`data/selective_copying.py`)."""

    presets = selective_copying.PRESETS
    kind: Literal["selective_copying"] = "selective_copying"
    train: tuple[selective_copying.Segment, ...] | None = None
    test: tuple[selective_copying.Segment, ...] | None = None
    vocab_size: int | None = None


@dataclasses.dataclass(frozen=True)
class InductionHeadsTask(PresetTask):
    """Induction heads (`data/induction_heads.py`)."""

    presets = induction_heads.PRESETS
    kind: Literal["induction_heads"] = "induction_heads"
    train: tuple[induction_heads.Segment, ...] | None = None
    test: tuple[induction_heads.Segment, ...] | None = None
    vocab_size: int | None = None


@dataclasses.dataclass(frozen=True)
class InContextNgramTask(PresetTask):
    """In-context n-grams (`data/in_context_ngram.py`)."""

    presets = in_context_ngram.PRESETS
    kind: Literal["in_context_ngram"] = "in_context_ngram"
    train: tuple[in_context_ngram.Segment, ...] | None = None
    test: tuple[in_context_ngram.Segment, ...] | None = None
    vocab_size: int | None = None
    order: int | None = None
    concentration: float | None = None


@dataclasses.dataclass(frozen=True)
class MemorizationTask(PresetTask):
    """Memorization of a dictionary (`data/memorization.py`)."""

    presets = memorization.PRESETS
    kind: Literal["memorization"] = "memorization"
    train: tuple[memorization.Segment, ...] | None = None
    test: tuple[memorization.Segment, ...] | None = None
    vocab_size: int | None = None


@dataclasses.dataclass(frozen=True)
class CompressionTask(PresetTask):
    """Compression (`data/compression.py`)."""

    presets = compression.PRESETS
    kind: Literal["compression"] = "compression"
    train: tuple[compression.Segment, ...] | None = None
    test: tuple[compression.Segment, ...] | None = None
    alphabet: int | None = None
    max_symbols: int | None = None


@dataclasses.dataclass(frozen=True)
class StateTrackingTask(PresetTask):
    """State tracking (`data/state_tracking.py`)."""

    presets = state_tracking.PRESETS
    kind: Literal["state_tracking"] = "state_tracking"
    train: tuple[state_tracking.Segment, ...] | None = None
    test: tuple[state_tracking.Segment, ...] | None = None
    group: str | None = None


@dataclasses.dataclass(frozen=True)
class ForgettingMqarTask(PresetTask):
    """MQAR with forgetting (`data/forgetting_mqar.py`)."""

    presets = forgetting_mqar.PRESETS
    kind: Literal["forgetting_mqar"] = "forgetting_mqar"
    train: tuple[forgetting_mqar.Segment, ...] | None = None
    test: tuple[forgetting_mqar.Segment, ...] | None = None
    vocab_size: int | None = None
    random_non_queries: bool | None = None


@dataclasses.dataclass(frozen=True)
class NeedleTask(PresetTask):
    """A needle in a haystack (`data/needle.py`)."""

    presets = needle.PRESETS
    kind: Literal["needle"] = "needle"
    train: tuple[needle.Segment, ...] | None = None
    test: tuple[needle.Segment, ...] | None = None
    vocab_size: int | None = None


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
        from based_jax.data.text import TextSource  # imports tensorflow-datasets, which no other task needs

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


SyntheticTask = (
    MqarTask
    | SelectiveCopyingTask
    | InductionHeadsTask
    | InContextNgramTask
    | MemorizationTask
    | CompressionTask
    | StateTrackingTask
    | ForgettingMqarTask
    | NeedleTask
)
Task = SyntheticTask | TextTask
