"""What can be trained on: a task is a frozen config that opens a source of batches.

A new task is one line of `TASKS`: its data, since the loss and the metrics of all of them are those of `train/step.py`.
"""

import dataclasses
import functools
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Protocol

import numpy as np

from based_jax import config as configs
from based_jax.config import added_later
from based_jax.data import (
    compositional_mqar,
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
from based_jax.data.checks import check_bools, check_choice
from based_jax.data.fasta import LETTERS, check_dna
from based_jax.data.hosts import Rows
from based_jax.data.segments import SegmentedTask, SegmentSource
from based_jax.data.text_checks import TextPart, check_text, located
from based_jax.data.tokenizer_file import is_file_name, vocabulary_size
from based_jax.errors import UserError

if typing.TYPE_CHECKING:
    from based_jax.data.dna import DnaSource
    from based_jax.data.text import TextSource


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

    @property
    def summary(self) -> Sequence[str]:
        """What a run says of its data before the first step, a line each: the splits and their sizes."""
        ...

    @property
    def record(self) -> Mapping[str, Any]:
        """What the batches depend on beside the config, as JSON: a "fingerprint" and more, or nothing."""
        ...


class TaskConfig(Protocol):
    """The section `data` of a config, a frozen dataclass: what `TASKS` holds."""

    @property
    def kind(self) -> str:
        """The key of the task in `TASKS`."""
        ...

    @property
    def num_tokens(self) -> int:
        """Ids that the task uses."""
        ...

    @property
    def resolved_values(self) -> dict[str, Any]:
        """Every value by its key, those of a preset too."""
        ...

    @property
    def longest_test(self) -> int:
        """Tokens of the longest row that is evaluated."""
        ...

    @property
    def located(self) -> "TaskConfig":
        """The same task, whatever the current folder is."""
        ...

    def open(self, batch_size: int, rows: Rows | None = None) -> Source:
        """Return the source of batches, of which this host feeds these rows, all where they are None."""
        ...


@dataclasses.dataclass(frozen=True)
class PresetTask:
    """A synthetic task: one of its module's presets, with those of its values replaced that are not None here.

    `preset_task` adds the values that can be replaced, under the names that they have in the preset's class.

    Attributes:
      kind: the key that chooses the task in a config.
      preset: values by a name, which None stands for in the other keys.
      shuffle: whether an epoch permutes examples and batches, rather than reads the segments in their order.
      train, test: segments, each with its number of examples and their length, in the order that they are read in.
      vocab_size: ids.
      seed: of the draws.
      power_a: a gap of i pairs of positions is as likely as (i + 1) ** (power_a - 1).
      random_non_queries: whether tokens between the queries are drawn, rather than 0.
      order: tokens that the next one depends on.
      concentration: of the languages that are drawn; smaller ones are more predictable.
      alphabet: symbols that there are.
      max_symbols: symbols of a row at most.
      group: "parity", "s3", "a5" or "s5".
    """

    presets: ClassVar[Mapping[str, SegmentedTask]]
    kind: str
    preset: str
    shuffle: bool = False

    def __post_init__(self):
        check_bools(shuffle=self.shuffle)
        if not self.resolved.test:  # an impossible value is named here
            raise UserError(f"{self.kind} has no test segment; it needs one to evaluate.")

    @functools.cached_property
    def resolved(self) -> SegmentedTask:
        """The preset with this task's replacements; UserError for an unknown preset or an impossible value."""
        check_choice(f"{self.kind} preset", self.preset, self.presets)
        preset = self.presets[self.preset]
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(preset)}
        return dataclasses.replace(preset, **{name: value for name, value in values.items() if value is not None})

    @property
    def num_tokens(self) -> int:
        """Ids that the task uses."""
        return self.resolved.vocab_size

    @property
    def resolved_values(self) -> dict[str, Any]:
        """Every value by its key; the preset's name, which stands for values, is none."""
        return {"kind": self.kind, "shuffle": self.shuffle, **dataclasses.asdict(self.resolved)}

    @property
    def longest_test(self) -> int:
        """Tokens of the longest test segment."""
        return max(segment.seq_len for segment in self.resolved.test)

    @property
    def located(self) -> "PresetTask":
        """The task itself, which reads no file."""
        return self

    def open(self, batch_size: int, rows: Rows | None = None) -> SegmentSource:
        """Return the source of batches, of which this host feeds these rows, all where they are None."""
        return SegmentSource(self.resolved, batch_size, shuffle=self.shuffle, rows=rows)


def preset_task(kind: str, presets: Mapping[str, SegmentedTask], default: str = "default") -> type[PresetTask]:
    """Return the `PresetTask` of one module: a dataclass with each value of its presets as an optional field."""
    preset = type(presets[default])
    values = [(name, annotation | None, None) for name, annotation in typing.get_type_hints(preset).items()]
    fields = [("kind", Literal[kind], kind), ("preset", str, default), *values]
    name = preset.__name__.replace("Config", "Task")
    return dataclasses.make_dataclass(name, fields, bases=(PresetTask,), namespace={"presets": presets}, frozen=True)


@dataclasses.dataclass(frozen=True)
class TextTask:
    """Language modelling on documents (`data/text.py`).

    Attributes:
      kind: the key that chooses the task in a config.
      path: a folder of files of text or of tokens, or "tfds:NAME" for a dataset of tensorflow-datasets; None for the
        shipped prose, or for a mixture.
      text_feature: the key of .jsonl, the column of .parquet or the feature of "tfds:NAME" that holds a document; None
        if it is "text", or the only feature.
      tokenizer: "bytes", "gpt2" or the path of a tokenizer.json.
      seq_len: tokens of a row.
      seed: of the order of rows.
      cache_dir: where the packed windows are kept; None for the user's cache folder.
      processes: that pack text which is not packed yet, by files where there are as many, else by batches; 1 for the
        run's own, with the threads of its tokenizer.
      mixture: several corpora by names of their own, in place of `path`; their validation is evaluated by name.
    """

    kind: Literal["text"] = "text"
    path: str | None = None
    text_feature: str | None = None
    tokenizer: str = "gpt2"
    seq_len: int = 2048
    seed: int = 0
    cache_dir: str | None = None
    processes: int = 1
    mixture: dict[str, TextPart] | None = added_later(None)  # noqa: RUF009

    def __post_init__(self):
        check_text(self.path, self.text_feature, self.mixture, self.seq_len, self.seed, self.cache_dir, self.processes)
        _ = self.num_tokens  # an unknown tokenizer is named here

    @functools.cached_property
    def num_tokens(self) -> int:
        """Ids that the task uses."""
        return vocabulary_size(self.tokenizer)

    @property
    def resolved_values(self) -> dict[str, Any]:
        """Every value by its key."""
        return configs.to_dict(self)

    @property
    def longest_test(self) -> int:
        """Tokens of a row."""
        return self.seq_len

    @property
    def located(self) -> "TextTask":
        """The same task with absolute paths."""
        return dataclasses.replace(
            self,
            path=self.path and located(self.path),
            tokenizer=located(self.tokenizer) if is_file_name(self.tokenizer) else self.tokenizer,
            cache_dir=self.cache_dir and located(self.cache_dir),
            mixture=self.mixture and {name: part.located for name, part in self.mixture.items()},
        )

    def open(self, batch_size: int, rows: Rows | None = None) -> "TextSource":
        """Pack the text unless it is packed, and return the source of batches, of which this host feeds these rows."""
        from based_jax.data.text import TextSource  # imports grain, which no other task needs

        return TextSource(
            self.path,
            self.tokenizer,
            self.seq_len,
            batch_size,
            text_feature=self.text_feature,
            mixture=self.mixture,
            seed=self.seed,
            cache_dir=self.cache_dir,
            processes=self.processes,
            rows=rows,
        )


@dataclasses.dataclass(frozen=True)
class DnaTask:
    """Language modelling on DNA, base by base (`data/dna.py`).

    Attributes:
      kind: the key that chooses the task in a config.
      path: a FASTA file or a folder of them; None for the shipped genome of E. coli and slice of human chromosome 22.
      seq_len: bases of a training row.
      test_lengths: bases of the rows of evaluations, which read the same held-out bases at each; () for seq_len.
      reverse_complement: whether half of the training rows are of the other strand.
      seed: of the rows' places and strands.
    """

    kind: Literal["dna"] = "dna"
    path: str | None = None
    seq_len: int = 8192
    test_lengths: tuple[int, ...] = ()
    reverse_complement: bool = True
    seed: int = 0

    def __post_init__(self):
        check_dna(self.path, self.seq_len, self.test_lengths, self.reverse_complement, self.seed)

    @property
    def num_tokens(self) -> int:
        """Ids that the task uses."""
        return len(LETTERS)

    @property
    def resolved_values(self) -> dict[str, Any]:
        """Every value by its key."""
        return configs.to_dict(self)

    @property
    def longest_test(self) -> int:
        """Bases of the longest row that is evaluated."""
        return max(self.test_lengths, default=self.seq_len)

    @property
    def located(self) -> "DnaTask":
        """The same task with an absolute path."""
        return dataclasses.replace(self, path=self.path and located(self.path))

    def open(self, batch_size: int, rows: Rows | None = None) -> "DnaSource":
        """Read the files, and return the source of batches, of which this host feeds these rows."""
        from based_jax.data.dna import DnaSource  # imports grain, as text does

        return DnaSource(
            self.path,
            self.seq_len,
            batch_size,
            test_lengths=self.test_lengths,
            reverse_complement=self.reverse_complement,
            seed=self.seed,
            rows=rows,
        )


SYNTHETIC_TASKS: dict[str, type[PresetTask]] = {
    "mqar": preset_task("mqar", mqar.PRESETS, "figure2"),
    "selective_copying": preset_task("selective_copying", selective_copying.PRESETS),
    "induction_heads": preset_task("induction_heads", induction_heads.PRESETS),
    "in_context_ngram": preset_task("in_context_ngram", in_context_ngram.PRESETS),
    "memorization": preset_task("memorization", memorization.PRESETS),
    "compression": preset_task("compression", compression.PRESETS),
    "state_tracking": preset_task("state_tracking", state_tracking.PRESETS),
    "forgetting_mqar": preset_task("forgetting_mqar", forgetting_mqar.PRESETS),
    "compositional_mqar": preset_task("compositional_mqar", compositional_mqar.PRESETS),
    "needle": preset_task("needle", needle.PRESETS),
}
FILE_TASKS: dict[str, type[TaskConfig]] = {"text": TextTask, "dna": DnaTask}
TASKS: dict[str, type[TaskConfig]] = {**SYNTHETIC_TASKS, **FILE_TASKS}

SyntheticTask = Annotated[PresetTask, SYNTHETIC_TASKS]
Task = Annotated[TaskConfig, TASKS]
