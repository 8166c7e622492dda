"""Tasks of likelihood: which of several texts a model finds likelier behind a context, as lm-eval asks them.

LAMBADA's last words, and the choices of ARC, PIQA, HellaSwag and WinoGrande; `lambada` and `arc_easy` come with
samples.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from based_jax.data.tokenizer import Tokenizer
from based_jax.errors import UserError
from based_jax.evals.likelihood import Continuation, Judge, Likelihood, likelihoods
from based_jax.evals.scores import Mean, mean_of
from based_jax.evals.sets import Row, read_rows, sample

LISTS, LABELS = ("choices", "endings"), ("label", "answer")
"""Fields that are lists of texts, and those that are numbers, written as a text or not; all others are texts."""
BRACKETS = re.compile(r"\[.*?\]")


class Choice(NamedTuple):
    """Pairs of a context and what may follow it, of which that at `label` is right.

    Attributes:
      pairs: contexts, and texts with the space before them.
      label: the right one.
      sizes: characters of each text, by which `acc_norm` divides.
    """

    pairs: list[tuple[str, str]]
    label: int
    sizes: list[int]


def of_lambada(row: Row) -> Choice:
    """Return the last word behind its passage."""
    return _choice(row["context"], [row["target"]], 0)


def of_arc(row: Row) -> Choice:
    """Return the choices of a question."""
    return _choice(f"Question: {row['question']}\nAnswer:", row["choices"], int(row["label"]))


def of_piqa(row: Row) -> Choice:
    """Return the two solutions of a goal."""
    return _choice(f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]], int(row["label"]))


def of_hellaswag(row: Row) -> Choice:
    """Return the endings of a scene."""
    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return _choice(_without_brackets(context), [_without_brackets(x) for x in row["endings"]], int(row["label"]))


def of_winogrande(row: Row) -> Choice:
    """Return the end of a sentence behind each of two beginnings."""
    before, _, after = row["sentence"].partition("_")
    end = after.strip()
    pairs = [(before + row[name], f" {end}") for name in ("option1", "option2")]
    return Choice(pairs, int(row["answer"]) - 1, [len(end)] * 2)


@dataclasses.dataclass(frozen=True)
class ChoiceTask:
    """A set of choices.

    Attributes:
      source: of its rows, see `sets.read_rows`; "" where they have to be given.
      fields: that a row has.
      choice: what a row says.
    """

    source: str
    fields: tuple[str, ...]
    choice: Callable[[Row], Choice]


TASKS: dict[str, ChoiceTask] = {
    "lambada": ChoiceTask(sample("lambada"), ("context", "target"), of_lambada),
    "arc_easy": ChoiceTask(sample("arc_easy"), ("question", "choices", "label"), of_arc),
    "arc_challenge": ChoiceTask("", ("question", "choices", "label"), of_arc),
    "piqa": ChoiceTask("", ("goal", "sol1", "sol2", "label"), of_piqa),
    "hellaswag": ChoiceTask("", ("activity_label", "ctx_a", "ctx_b", "endings", "label"), of_hellaswag),
    "winogrande": ChoiceTask("", ("sentence", "option1", "option2", "answer"), of_winogrande),
}


def choices_of(name: str, source: str | None = None, limit: int | None = None) -> list[Choice]:
    """Return the choices of a task's rows, the first of them up to a limit.

    Raises:
      UserError: the rows cannot be read, are not given, or lack a field, have nothing
        to judge, or name a right choice that they do not have.
    """
    task = TASKS[name]
    if not (source := source or task.source):
        raise UserError(f"'{name}' has no rows here; give them by --data={name}=FILE.")
    rows = read_rows(source)[:limit]
    return [_checked_choice(task, row, f"Row {place} of '{source}'") for place, row in enumerate(rows, start=1)]


def encoded(tokenizer: Tokenizer, context: str, text: str) -> Continuation:
    """Return the ids of a text behind a context, of which spaces at the end are the text's, as lm-eval divides them."""
    whole, before = tokenizer.encode(context + text), tokenizer.encode(context.rstrip())
    begun = [*tokenizer.beginning, *before]
    return Continuation(begun or [tokenizer.end_of_text], whole[len(before) :])


def likelihoods_of(
    judge: Judge, tokenizer: Tokenizer, choices: Sequence[Choice], max_length: int
) -> list[list[Likelihood]]:
    """Return the likelihoods of the texts of each choice."""
    flat = [encoded(tokenizer, *pair) for choice in choices for pair in choice.pairs]
    found = dict(likelihoods(judge, flat, max_length))
    ends = np.cumsum([len(choice.pairs) for choice in choices])
    return [[found[place] for place in range(end - len(x.pairs), end)] for x, end in zip(choices, ends, strict=True)]


def scores_of(choices: Sequence[Choice], found: Sequence[Sequence[Likelihood]]) -> dict[str, Mean | float]:
    """Return lm-eval's metrics: "acc" (greedy) and "perplexity" of single texts, "acc" and "acc_norm" of several."""
    groups = list(map(str, range(len(choices))))
    if all(len(choice.pairs) == 1 for choice in choices):
        greedy = [float(x.is_greedy) for (x,) in found]
        mean_loss = -float(np.mean([x.log_prob for (x,) in found]))
        return {"acc": mean_of(greedy, groups), "perplexity": math.exp(min(mean_loss, 700.0))}
    by_sum = [np.argmax([x.log_prob for x in row]) for row in found]
    by_character = [
        np.argmax([x.log_prob / size for x, size in zip(row, choice.sizes, strict=True)])
        for row, choice in zip(found, choices, strict=True)
    ]
    labels = [choice.label for choice in choices]
    return {
        name: mean_of([float(a == b) for a, b in zip(chosen, labels, strict=True)], groups)
        for name, chosen in (("acc", by_sum), ("acc_norm", by_character))
    }


def _checked_choice(task: ChoiceTask, row: Row, where: str) -> Choice:
    for name in task.fields:
        if not _is_of_kind(name, row.get(name)):
            fields = ", ".join(task.fields)
            raise UserError(f"{where} has no '{name}' of the right kind; a row of this task has {fields}.")
    found, right = task.choice(row), task.fields[-1]
    if not 0 <= found.label < len(found.pairs):
        raise UserError(f"{where} has {right} {row[right]!r:.60}, which is none of its {len(found.pairs)} choices.")
    if not all(found.sizes):
        raise UserError(f"{where} has an empty text to judge; each has at least one character.")
    return found


def _is_of_kind(name: str, value: Any) -> bool:
    if name in LISTS:
        return isinstance(value, list) and all(isinstance(x, str) for x in value)
    return str(value).isdecimal() if name in LABELS else isinstance(value, str)


def _choice(context: str, texts: Sequence[str], label: int) -> Choice:
    return Choice([(context, f" {text}") for text in texts], label, [len(text) for text in texts])


def _without_brackets(text: str) -> str:
    """Return a text of WikiHow without its marks."""
    return BRACKETS.sub("", text.strip().replace(" [title]", ". ")).replace("  ", " ")
