"""What a model is asked of a document: read once or twice, whole or cut around the answer.

The forms are those of HazyResearch/based-evaluation-harness (a set's own text) and of HazyResearch/
prefix-linear-attention, "Just read twice" (Arora et al. 2024): the context without its last full stop, ".", and what is
asked, in words that the answer completes.
"""

import dataclasses
import re
from typing import Any, NamedTuple

from based_jax.data.tokenizer import Tokenizer
from based_jax.evals.sets import Row

SUMMARY = "Summary of information above..."
"""In SWDE's texts, before what is asked."""
MARKS = re.compile(r"\[(PAR|DOC|TLE)\]")
"""Of TriviaQA's parts."""
ANSWER_TOKENS = 50
"""What a document that is cut leaves of its length for what is asked and for the answer."""


class Example(NamedTuple):
    """A prompt, and answers of which any will do.

    Attributes:
      id: within its task.
      group: examples of one document share it.
    """

    id: str
    group: str
    prompt: str
    answers: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Document:
    """A row of a set.

    Attributes:
      context: what is read.
      question: what is asked behind it.
      answers: any of them will do.
      intro: what stands before the first of two readings.
      title: of the document.
      text: the set's own prompt, context and question in one, "" where it has none.
    """

    context: str
    question: str
    answers: tuple[str, ...]
    intro: str = ""
    title: str = ""
    text: str = ""


def of_key(row: Row) -> Document:
    """Return a document with the name and the value of one of its attributes, as in SWDE and FDA."""
    key = str(row["key"])
    title = key[:1].upper() + key[1:]
    context = _without_end(row["text"].split(SUMMARY)[0].strip(), f"{key}:")
    intro = f"Information about {title}."
    return Document(context, f"{title}:", _answers(row["value"]), intro, text=row["text"].strip())


def of_bare_key(row: Row) -> Document:
    """Return the same of a text that does not end with what is asked."""
    return dataclasses.replace(of_key(row), text="")


def of_completion(row: Row) -> Document:
    """Return a document whose text ends in a sentence that the answer completes."""
    context = row["context"].split("Question:")[0]
    return Document(context, "", _answers(row["value"]), row["question"], text=row["text"].strip())


def of_cloze(row: Row) -> Document:
    """Return a document with a question in words that the answer completes, and the question as it was."""
    question = row["question"].strip()
    context = _without_end(MARKS.sub("", row["context"]).strip(), question)
    return Document(context, question, _answers(row["answers"]), row["orig_question"].strip(":"))


def of_question(row: Row) -> Document:
    """Return a document with a question in plain words."""
    question = row["question"].strip()
    return Document(row["context"], question, _answers(row["answers"]), question, str(row.get("title", "")))


def once(document: Document) -> str:
    """Return the set's own text, or the cloze form of a document."""
    return document.text or f"{_body(document)} {document.question}"


def twice(document: Document) -> str:
    """Return the cloze form of a document that is read twice."""
    return f"{document.intro} {_body(document)}\n{_body(document)} {document.question}"


def once_asked(document: Document) -> str:
    """Return the form in which lm-eval asks SQuAD's questions."""
    title = document.title.replace("_", " ")
    return f"Title: {title}\n\nBackground: {document.context}\n\nQuestion: {document.question}\n\nAnswer:"


def twice_completed(document: Document) -> str:
    """Return the question and the context before a text that ends in what the answer completes."""
    return f"{document.intro} {document.context}\n{document.text}"


def twice_asked(document: Document) -> str:
    """Return the question and the context before the form of `once_asked`."""
    return f"{document.intro} {document.context}\n{once_asked(document)}"


def cut(document: Document, length: int, tokenizer: Tokenizer) -> Document:
    """Return a document whose context has at most `length` - ANSWER_TOKENS tokens, the answer in the middle of them.

    It has what stands before the answer's first place, half of that length at most, and fills the rest from there on.
    What does not have the answer is cut as if it stood at the end.
    """
    context, room = document.context.strip(), max(length - ANSWER_TOKENS, 1)
    ids = tokenizer.encode(context)
    place = len(tokenizer.encode(context[: _first_place(context, document.answers)]))
    start = max(0, place - room // 2)
    return dataclasses.replace(document, context=tokenizer.decode(ids[start : start + room]), text="")


def _first_place(context: str, answers: tuple[str, ...]) -> int:
    """Return where the first of the answers stands that the context has, in upper or lower case; else its end."""
    found = [re.search(re.escape(answer), context, re.IGNORECASE) for answer in answers]
    return min((match.start() for match in found if match), default=len(context))


def _body(document: Document) -> str:
    return document.context.strip().strip(".").strip() + "."


def _without_end(context: str, end: str) -> str:
    """Return a context without what is asked at its end, as often as it stands there."""
    while end and context.lower().endswith(end.lower()):
        context = context[: -len(end)].strip()
    return context


def _answers(values: Any) -> tuple[str, ...]:
    """Return the answers that say something, each once: of a text, a list, or SQuAD's {"text": list}."""
    values = values.get("text", ()) if isinstance(values, dict) else values
    values = [values] if isinstance(values, str) else values
    return tuple(dict.fromkeys(text for value in values if (text := str(value).strip())))
