"""What every model of the study is asked, made once: prompts as tokens, with their answers, in one file.

Needles are hidden at 1, 2, 4 and 8 times the training length; documents are cut to it around the answer.
"""

import dataclasses
import json
import lzma
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from based_jax.data.tokenizer import Tokenizer
from based_jax.errors import UserError
from based_jax.evals import scores
from based_jax.evals.answering import answered, stop_ids, text_until
from based_jax.evals.recall import STOP
from based_jax.evals.recall_tasks import NEW_TOKENS, TASKS, Part, Selection, SetTask, examples_of
from based_jax.folders import make_folder, read_file
from based_jax.generate import Decoder, Request
from based_jax.generate.text import encode_prompt

DOCUMENTS = ("squad_questions", "extraction")
NEEDLES = ("niah_single_1", "niah_single_2", "niah_single_3")
TIMES = (1, 2, 4, 8)
"""Training lengths of a prompt with a needle."""
ROWS = 50
"""Prompts that are answered together."""


@dataclasses.dataclass(frozen=True)
class Questions:
    """A part of what is asked.

    Attributes:
      part: the task and its length.
      source: of its examples.
      prompts: token ids.
      answers: of each prompt, any of which will do.
      groups: examples of one document share it.
    """

    part: Part
    source: str
    prompts: list[list[int]]
    answers: list[list[str]]
    groups: list[str]

    def first(self, count: int) -> "Questions":
        """Return the first of them alone."""
        fields = {name: getattr(self, name)[:count] for name in ("prompts", "answers", "groups")}
        return dataclasses.replace(self, **fields)

    def requests(self, tokenizer: Tokenizer) -> list[Request]:
        """Return what the engine is asked: up to 48 tokens or a newline."""
        stops = stop_ids(tokenizer, STOP)
        return [Request(ids, NEW_TOKENS, stop_ids=stops) for ids in self.prompts]

    def scored(self, decoder: Decoder, tokenizer: Tokenizer) -> dict[str, Any]:
        """Return the mean of a model's answers by the task's own score, with its interval of 95 % over documents."""
        metric, said = TASKS[self.part.task].metric, {}
        for place, ids in answered(decoder, self.requests(tokenizer), ROWS):
            said[place] = text_until(tokenizer.decode(ids), STOP)
        values = [scores.SCORES[metric](said[place], self.answers[place]) for place in range(len(said))]
        mean = scores.mean_of(values, self.groups)
        found = {"task": self.part.task, "length": self.part.length, "metric": metric, "source": self.source}
        return found | {"examples": len(values), **{key: round(x, 4) for key, x in mean._asdict().items()}}


def parts_of(length: int) -> list[Part]:
    """Return what is asked of models that were trained at a length."""
    return [
        *(Part(task, length) for task in DOCUMENTS),
        *(Part(task, times * length) for task in NEEDLES for times in TIMES),
    ]


def made(parts: Iterable[Part], selection: Selection, limits: Mapping[str, int]) -> Iterator[Questions]:
    """Yield the questions of each part, as many as `limits` says of its task."""
    for part in parts:
        task, limited = TASKS[part.task], dataclasses.replace(selection, limit=limits[part.task])
        own = Path(task.source).name if isinstance(task, SetTask) else f"made up, seed {selection.seed}"
        source = Path(selection.data[part.task]).name if part.task in selection.data else own
        found = examples_of(part, limited)
        prompts = [encode_prompt(selection.tokenizer, example.prompt) for example in found]
        yield Questions(part, source, prompts, [list(x.answers) for x in found], [x.group for x in found])


def write(path: Path, questions: Iterable[Questions]) -> None:
    """Write questions as JSON lines, compressed, a line a part."""
    make_folder(path.parent)
    with lzma.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(dataclasses.asdict(found)) + "\n" for found in questions)


def read(path: Path) -> list[Questions]:
    """Return the questions of a file; UserError where there is none, or it holds something else."""
    try:
        values = [json.loads(line) for line in lzma.decompress(read_file(path)).splitlines()]
        return [Questions(**value | {"part": Part(**value["part"])}) for value in values]
    except FileNotFoundError:
        raise UserError(
            f"There are no questions at '{path}'; `python -m experiments.lm_recall prepare` makes them."
        ) from None
    except (OSError, lzma.LZMAError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"'{path}' holds no questions: {type(error).__name__}.") from error


def warming(questions: Sequence[Questions]) -> list[Questions]:
    """Return so few of them that each program which they need is compiled: the longest and shortest of a kind."""
    needles = [found for found in questions if found.part.task not in DOCUMENTS[1:]]
    kinds = {(found.part.length, len(found.prompts) > ROWS): found for found in reversed(needles)}
    return [_ends(found) for found in (*kinds.values(), *(x for x in questions if x.part.task in DOCUMENTS[1:]))]


def _ends(questions: Questions) -> Questions:
    """Return the prompts of the first and of the last batch by length, as `answered` cuts them."""
    order = np.argsort([-len(ids) for ids in questions.prompts], kind="stable")
    places = [*order[:ROWS], *order[ROWS:][-ROWS:]]
    fields = {name: [getattr(questions, name)[i] for i in places] for name in ("prompts", "answers", "groups")}
    return dataclasses.replace(questions, **fields)
