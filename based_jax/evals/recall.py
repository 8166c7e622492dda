"""What a model recalls of what it reads: tasks of `recall_tasks` through the engine, a row of the store an example.

Zero-shot and greedy: a model says up to 48 tokens, and what stands before the first newline is scored. A prompt that is
longer than the model is to read loses its beginning.
"""

import dataclasses
import hashlib
import json
import types
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TextIO

import jax
import pandas as pd

from based_jax.data.progress import Progress
from based_jax.data.tokenizer import Tokenizer
from based_jax.errors import UserError
from based_jax.evals import scores
from based_jax.evals.answering import answered, stop_ids, text_until
from based_jax.evals.prompts import Example
from based_jax.evals.recall_tasks import NEW_TOKENS, TASKS, MadeUpTask, Part, Selection, examples_of
from based_jax.generate import Decoder, Request
from based_jax.generate.text import encode_prompt
from based_jax.revision import revision
from based_jax.store import Store

STOP = ("\n",)
DOCUMENT_TOKENS = 2048
"""That a model reads of a document at most, with what it says, by default."""
PART_KEYS = ("model", "fingerprint", "task", "length", "reads", "source", "max_length")
"""What rows that are averaged have in common."""
KINDS: dict[str, type | types.UnionType] = {
    **dict.fromkeys(PART_KEYS, str),
    **dict.fromkeys(("length", "max_length"), int | None),
    "reads": int,
    "metric": str,
    "group": str,
    **dict.fromkeys(scores.SCORES, int | float),
}
"""What summaries read of a row."""


@dataclasses.dataclass(frozen=True)
class Asked:
    """The model that is asked, and how.

    Attributes:
      name: of the model in tables.
      decoder, tokenizer: of the model.
      batch_size: prompts that are read and answered together.
      max_length: tokens of a document's prompt with what is said; what is made up has the length of its part.
    """

    name: str
    decoder: Decoder
    tokenizer: Tokenizer
    batch_size: int = 8
    max_length: int = DOCUMENT_TOKENS

    def __post_init__(self):
        check_sizes(self.batch_size, self.max_length)


def check_sizes(batch_size: int, max_length: int) -> None:
    """Raise UserError for a batch of no prompts, or for documents without room for what is said."""
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}; it is at least 1.")
    if max_length <= NEW_TOKENS:
        raise UserError(f"max_length is {max_length}; it is more than the {NEW_TOKENS} tokens that are said.")


@dataclasses.dataclass(frozen=True)
class Question:
    """An example as the model gets it: the last of its ids that there is room for."""

    example: Example
    ids: list[int]
    left_out: int
    row_id: str


def check_made_up(asked: Asked, parts: Sequence[Part], selection: Selection) -> None:
    """Raise UserError for a length that has no room for the first of its prompts, or that the model does not read."""
    for part in parts:
        if isinstance(TASKS[part.task], MadeUpTask):
            next(_questions(asked, part, dataclasses.replace(selection, limit=1)))


def run_part(asked: Asked, part: Part, selection: Selection, store: Store, stream: TextIO | None = None) -> None:
    """Ask all of a part that the store has no row of, and write a row for each example.

    Raises:
      UserError: the examples cannot be had, or the store cannot be written.
    """
    known = store.ids()
    questions = [x for x in _questions(asked, part, selection) if x.row_id not in known]
    requests = [_request(asked, question) for question in questions]
    progress = Progress(f"{asked.name}: {part.name}", len(questions), stream)
    common = _common(asked, part, selection)
    try:
        for done, (place, ids) in enumerate(answered(asked.decoder, requests, asked.batch_size), start=1):
            store.append(common | _row(questions[place], text_until(asked.tokenizer.decode(ids), STOP)))
            progress.update(done)
    finally:
        progress.close()


def _questions(asked: Asked, part: Part, selection: Selection) -> Iterator[Question]:
    longest = _longest_prompt(asked, part)
    for example in examples_of(part, selection):
        ids = encode_prompt(asked.tokenizer, example.prompt)
        kept = ids if longest is None else ids[-longest:]
        yield Question(example, kept, len(ids) - len(kept), _row_id(asked, part, kept, example))


def _longest_prompt(asked: Asked, part: Part) -> int | None:
    """Return the most tokens of a prompt: what is cut or made up has its own length, if the model reads as much."""
    most = asked.decoder.max_len
    if part.length is not None and isinstance(TASKS[part.task], MadeUpTask) and part.length > (most or part.length):
        raise UserError(f"'{part.name}' has {part.length} tokens, and the model reads {most}.")
    bounds = [bound for bound in (most, asked.max_length if part.length is None else None) if bound is not None]
    if bounds and min(bounds) <= NEW_TOKENS:
        raise UserError(f"The model reads {min(bounds)} tokens, of which {NEW_TOKENS} are for what it says.")
    return min(bounds) - NEW_TOKENS if bounds else None


def _row_id(asked: Asked, part: Part, ids: Sequence[int], example: Example) -> str:
    """Return an id that changes with the model, the prompt and the answers."""
    facts = [asked.decoder.fingerprint, asked.name, part.name, example.id, list(ids), list(example.answers)]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:20]


def _request(asked: Asked, question: Question) -> Request:
    return Request(question.ids, NEW_TOKENS, stop_ids=stop_ids(asked.tokenizer, STOP))


def _common(asked: Asked, part: Part, selection: Selection) -> dict[str, Any]:
    """Return what all rows of a part say."""
    task = TASKS[part.task]
    source = selection.data.get(part.task, getattr(task, "source", f"made up, seed {selection.seed}"))
    return {
        "model": asked.name,
        "fingerprint": asked.decoder.fingerprint,
        "task": part.task,
        "length": part.length,
        "reads": part.reads,
        "metric": task.metric,
        "source": source,
        "max_length": asked.max_length if part.length is None else None,
        "device": jax.devices()[0].device_kind,
        "revision": revision(),
    }


def _row(question: Question, said: str) -> dict[str, Any]:
    example = question.example
    return {
        "id": question.row_id,
        "example": example.id,
        "group": example.group,
        "prompt_tokens": len(question.ids),
        "left_out": question.left_out,
        "answers": list(example.answers),
        "said": said,
        **{name: score(said, example.answers) for name, score in scores.SCORES.items()},
    }


def rows_of(store: Store) -> list[dict[str, Any]]:
    """Return the rows of a store; UserError where one is none of recall."""
    rows = store.rows()
    for row in rows:
        if wrong := _wrong_key(row):
            told = f"its {wrong} is {row[wrong]!r:.60}" if wrong in row else f"it has no '{wrong}'"
            raise UserError(f"Row '{row['id']}' of '{store.path}' is none of `eval recall`: {told}.")
    return rows


def _wrong_key(row: Mapping[str, Any]) -> str | None:
    """Return the first key that a row lacks, or whose value none of recall has."""
    for key, kind in KINDS.items():
        if key not in row or not isinstance(row[key], kind):
            return key
    return next((key for key, known in (("task", TASKS), ("metric", scores.SCORES)) if row[key] not in known), None)


@dataclasses.dataclass(frozen=True)
class Summary:
    """Means over the examples of a part.

    Attributes:
      model: its name.
      part: what was asked.
      source: of the examples.
      metric: which of the scores is the task's.
      examples: how many there are.
      scores: a mean for each of `scores.SCORES`.
    """

    model: str
    part: Part
    source: str
    metric: str
    examples: int
    scores: Mapping[str, scores.Mean]


def summaries(rows: Iterable[Mapping[str, Any]]) -> list[Summary]:
    """Return the means of each part that a store's rows are of, by model, task, length and readings.

    Rows of other weights under the same name, of another source, or of another `max_length` are parts of their own.
    """
    parts: dict[tuple[Any, ...], list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        parts[tuple(row[key] for key in PART_KEYS)].append(row)
    return sorted(map(_summary, parts.values()), key=_place)


def _summary(rows: Sequence[Mapping[str, Any]]) -> Summary:
    first, groups = rows[0], [row["group"] for row in rows]
    found = {name: scores.mean_of([row[name] for row in rows], groups) for name in scores.SCORES}
    part = Part(first["task"], first["length"], first["reads"])
    return Summary(first["model"], part, first["source"], first["metric"], len(rows), found)


def _place(summary: Summary) -> tuple[str, int, int, int]:
    part = summary.part
    return summary.model, list(TASKS).index(part.task), part.length or 0, part.reads


def table(summaries: Sequence[Summary]) -> pd.DataFrame:
    """Return a line of text for each part; the score by which its task is compared has a star."""
    return pd.DataFrame([_line(summary) for summary in summaries])


def _line(summary: Summary) -> dict[str, str]:
    part = summary.part
    return {
        "model": summary.model,
        "task": part.task,
        "tokens": "whole" if part.length is None else f"{part.length:,}",
        "reads": str(part.reads),
        "examples": f"{summary.examples:,}",
        **{name: f"{mean}{'*' * (name == summary.metric)}" for name, mean in summary.scores.items()},
    }
