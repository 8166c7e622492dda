"""The recall tasks by name: sets of documents that ask for what stands in them, and prompts that are made up.

Published sets are those of Arora et al. (2024) on the Hugging Face hub; `extraction` and `squad_questions` come with
samples, so that they run anywhere.
"""

import dataclasses
import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from based_jax.data.tokenizer import Tokenizer
from based_jax.errors import UserError, unknown
from based_jax.evals import prompts
from based_jax.evals.haystacks import MadeUp, Needles, PhoneBook, made_up
from based_jax.evals.prompts import Document, Example
from based_jax.evals.sets import Row, read_rows, sample

log = logging.getLogger(__name__)

NEW_TOKENS = 48
"""That a model may say."""
KEYS = ("text", "key", "value")
CLOZE = ("context", "question", "orig_question", "answers")


@dataclasses.dataclass(frozen=True)
class Selection:
    """What is asked for: how many examples, by which tokens.

    Attributes:
      tokenizer: counts the tokens of a length.
      data: sources by the names of tasks, in place of their own (see `sets.read_rows`).
      limit: examples of a task; None for all of a set, and `MADE_UP` of what is made up.
      seed: of what is made up, and of which examples of a set.
    """

    tokenizer: Tokenizer
    data: Mapping[str, str] = dataclasses.field(default_factory=dict)
    limit: int | None = None
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class SetTask:
    """A set of documents.

    Attributes:
      source: of its rows, see `sets.read_rows`.
      fields: that a row has.
      document: what a row says.
      once, twice: its prompts.
      metric: a key of `scores.SCORES`.
      cuts: whether a document may be cut; what was cut when the set was made, or is short, is not.
    """

    source: str
    fields: tuple[str, ...]
    document: Callable[[Row], Document]
    once: Callable[[Document], str] = prompts.once
    twice: Callable[[Document], str] = prompts.twice
    metric: str = "contains"
    cuts: bool = True


@dataclasses.dataclass(frozen=True)
class MadeUpTask:
    """Prompts of any length."""

    made: MadeUp
    metric: str = "contains"


MADE_UP = 500
"""Examples of a made-up task, RULER's number."""
TASKS: dict[str, SetTask | MadeUpTask] = {
    "swde": SetTask("hub:hazyresearch/based-swde-v2", KEYS, prompts.of_key),
    "fda": SetTask("hub:hazyresearch/based-fda", KEYS, prompts.of_key),
    "extraction": SetTask(sample("extraction"), KEYS, prompts.of_bare_key),
    "squad": SetTask(
        "hub:hazyresearch/based-squad",
        ("text", "value", "context", "question"),
        prompts.of_completion,
        twice=prompts.twice_completed,
        metric="f1",
        cuts=False,
    ),
    "squad_questions": SetTask(
        sample("squad_questions"),
        ("context", "question", "answers"),
        prompts.of_question,
        once=prompts.once_asked,
        twice=prompts.twice_asked,
        metric="f1",
    ),
    "nq_512": SetTask("hub:hazyresearch/based_nq_512", CLOZE, prompts.of_cloze, cuts=False),
    "nq_1024": SetTask("hub:hazyresearch/based_nq_1024", CLOZE, prompts.of_cloze, cuts=False),
    "nq_2048": SetTask("hub:hazyresearch/based_nq_2048", CLOZE, prompts.of_cloze, cuts=False),
    "triviaqa": SetTask("hub:hazyresearch/based_triviaqa", CLOZE, prompts.of_cloze),
    "drop": SetTask("hub:hazyresearch/based_drop", CLOZE, prompts.of_cloze),
    "niah_single_1": MadeUpTask(Needles("number", "repeat")),
    "niah_single_2": MadeUpTask(Needles("number", "essay")),
    "niah_single_3": MadeUpTask(Needles("uuid", "essay")),
    "niah_multikey_1": MadeUpTask(Needles("number", "essay", keys=4)),
    "phonebook": MadeUpTask(PhoneBook()),
}


@dataclasses.dataclass(frozen=True)
class Part:
    """A task as it is asked.

    Attributes:
      task: a key of `TASKS`.
      length: tokens, of a prompt that is made up, or that a document is cut to; None for whole ones.
      reads: how often a document is read, 1 or 2.
    """

    task: str
    length: int | None = None
    reads: int = 1

    @property
    def name(self) -> str:
        """The task, its length, and whether a document is read twice: "fda@512 twice"."""
        return f"{self.task}{'' if self.length is None else f'@{self.length}'}{' twice' * (self.reads == 2)}"


def parts_of(tasks: Sequence[str], lengths: Sequence[int], reads: Sequence[int], default_length: int) -> list[Part]:
    """Return each task at each length, its documents read as often as each of `reads`.

    Without lengths documents are whole, and what is made up has `default_length` tokens.

    Raises:
      UserError: a task is unknown, or a number is impossible.
    """
    for task in tasks:
        if task not in TASKS:
            raise unknown("task", task, TASKS)
    if bad := [value for value in lengths if value < 1]:
        raise UserError(f"A length is {bad[0]}; it is at least 1.")
    if bad := [value for value in reads if value not in (1, 2)]:
        raise UserError(f"A document is read {bad[0]} times; it is read 1 or 2 times.")
    return list(dict.fromkeys(part for task in tasks for part in _parts(task, lengths, reads, default_length)))


def _parts(task: str, lengths: Sequence[int], reads: Sequence[int], default_length: int) -> Iterator[Part]:
    match TASKS[task]:
        case MadeUpTask():
            yield from (Part(task, length) for length in lengths or (default_length,))
        case SetTask(cuts=cuts):
            cut_to = lengths if cuts and lengths else (None,)
            yield from (Part(task, length, times) for length in cut_to for times in reads)


def examples_of(part: Part, selection: Selection) -> list[Example]:
    """Return the examples of a part.

    Raises:
      UserError: the rows cannot be read, lack a field, or have no answers; or the length has no room for a prompt.
    """
    match TASKS[part.task]:
        case MadeUpTask(made=made):
            count = MADE_UP if selection.limit is None else selection.limit
            return list(made_up(made, part.length or 0, count, selection.seed, selection.tokenizer, NEW_TOKENS))
        case SetTask() as task:
            return _set_examples(task, part, selection)


def check_rows(parts: Sequence[Part], data: Mapping[str, str]) -> None:
    """Warn of rows that cannot be asked.

    Raises:
      UserError: a set's rows cannot be read, one lacks a field, or none can be asked.
    """
    for name in dict.fromkeys(part.task for part in parts):
        if isinstance(task := TASKS[name], SetTask):
            found = _documents(task, source := data.get(name, task.source))
            if left_out := sum(not _can_be_asked(document) for document in found):
                log.warning(
                    "'%s': %d of %d rows have no answer or no document: left out.", source, left_out, len(found)
                )


def _set_examples(task: SetTask, part: Part, selection: Selection) -> list[Example]:
    documents = _documents(task, selection.data.get(part.task, task.source))
    return [
        Example(
            str(place), _digest(document.context), _prompt(task, part, document, selection.tokenizer), document.answers
        )
        for place in _chosen(len(documents), selection.limit, selection.seed)
        if _can_be_asked(document := documents[place])
    ]


def _documents(task: SetTask, source: str) -> list[Document]:
    """Return what the rows of a source say."""
    rows = read_rows(source)
    for place, row in enumerate(rows):
        _check_fields(row, place, task.fields, source)
    found = [task.document(row) for row in rows]
    if not any(map(_can_be_asked, found)):
        raise UserError(f"'{source}' has no row with a document and an answer.")
    return found


def _can_be_asked(document: Document) -> bool:
    """Return whether there is something to read, and an answer to be told."""
    return bool(document.answers and (document.context.strip() or document.text))


def _prompt(task: SetTask, part: Part, document: Document, tokenizer: Tokenizer) -> str:
    if part.length is not None:
        document = prompts.cut(document, part.length, tokenizer)
    return (task.once if part.reads == 1 else task.twice)(document)


def _chosen(count: int, limit: int | None, seed: int) -> list[int]:
    """Return which rows are asked, in their order: all, or as many as the limit, drawn."""
    order = range(count) if limit is None else np.random.default_rng(seed).permutation(count)[:limit]
    return sorted(int(place) for place in order)


def _digest(text: str) -> str:
    """Return what tells documents apart."""
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()[:12]


def _check_fields(row: Row, place: int, fields: Sequence[str], source: str) -> None:
    for name in fields:
        if not _is_of_kind(name, row.get(name)):
            raise UserError(
                f"Row {place + 1} of '{source}' has no '{name}' of the right kind; a row of this task has"
                f" {', '.join(fields)}."
            )


def _is_of_kind(name: str, value: Any) -> bool:
    """Return whether a field is a text, or answers: a text, a list, or SQuAD's {"text": list}."""
    if name == "answers":
        value = value.get("text") if isinstance(value, dict) else value
        return isinstance(value, str) or (isinstance(value, list) and all(isinstance(x, str | int) for x in value))
    return isinstance(value, str)
