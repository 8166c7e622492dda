"""Prompts that are made up, as long as one asks: RULER's needles in a haystack, and a phone book.

Each is a pure function of the task, the length, the seed, its number and the tokenizer. RULER (Hsieh et al. 2024,
NVIDIA/RULER, Apache-2.0) is followed in its prompts, and in what is hidden where; keys are words of our own lists, and
essays are prose that comes with the package.
"""

import dataclasses
import functools
import math
import re
import uuid
from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np

from based_jax.data.corpus import default_corpus
from based_jax.data.documents import Reading, read_documents
from based_jax.data.tokenizer import Tokenizer
from based_jax.errors import UserError
from based_jax.evals.prompts import Example
from based_jax.evals.sets import SAMPLES

PROMPT = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. I will quiz you about the"
    " {kind} afterwards.\n{context}\nWhat is the special magic {kind} for {key} mentioned in the provided text?"
    " The special magic {kind} for {key} mentioned in the provided text is"
)
NEEDLE = "One of the special magic {kind}s for {key} is: {value}."
REPEATED = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
DEPTHS = np.linspace(0, 100, num=40).round() / 100
"""Where needles may stand in essays."""
SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[.!?][\"”’)])\s+")
Draw = Callable[[np.random.Generator], str]


def number(rng: np.random.Generator) -> str:
    """Return seven digits."""
    return str(rng.integers(10**6, 10**7))


def random_uuid(rng: np.random.Generator) -> str:
    """Return a UUID of version 4."""
    return str(uuid.UUID(bytes=rng.bytes(16), version=4))


VALUES: dict[str, Draw] = {"number": number, "uuid": random_uuid}


class MadeUp(Protocol):
    """A task whose prompts are made of `count` units, more of which are longer."""

    def asked(self, rng: np.random.Generator, count: int) -> tuple[str, str]:
        """Return the prompt and its answer; the same generator gives the same needles for any count."""


@dataclasses.dataclass(frozen=True)
class Needles:
    """One needle that is asked, among others of its form, in a haystack.

    Attributes:
      kind: a key of `VALUES`.
      haystack: "repeat" or "essay".
      keys: needles that are hidden.
    """

    kind: str
    haystack: str
    keys: int = 1

    def asked(self, rng: np.random.Generator, count: int) -> tuple[str, str]:
        """Return a haystack of sentences, and the value of one of its keys."""
        keys = _pairs(rng, "adjectives", "nouns", self.keys, "-")
        values = [VALUES[self.kind](rng) for _ in keys]
        needles = [NEEDLE.format(kind=self.kind, key=k, value=v) for k, v in zip(keys, values, strict=True)]
        context = HAYSTACKS[self.haystack](rng, needles, count)
        return PROMPT.format(kind=self.kind, context=context, key=keys[0]), values[0]


@dataclasses.dataclass(frozen=True)
class PhoneBook:
    """Names with numbers, of which one is asked behind two that are given again (Jelassi et al. 2024, section 4)."""

    def asked(self, rng: np.random.Generator, count: int) -> tuple[str, str]:
        """Return a book of `count` names and three, and the number of one of them."""
        names = _pairs(rng, "first_names", "last_names", count + 3, " ")
        digits = rng.integers((200, 200, 0), (1000, 1000, 10**4), size=(len(names), 3))
        numbers = [f"{a}-{b}-{c:04d}" for a, b, c in digits]
        entries = [f"{name}: {phone}" for name, phone in zip(names, numbers, strict=True)]
        book = "\n".join(entries[place] for place in rng.permutation(len(entries)))
        return f"{book}\n\n{entries[0]}\n{entries[1]}\n{names[2]}:", numbers[2]


def made_up(
    task: MadeUp, length: int, count: int, seed: int, tokenizer: Tokenizer, new_tokens: int
) -> Iterator[Example]:
    """Yield examples whose prompts, with what is to be written behind them, have at most `length` tokens.

    Raises:
      UserError: the length has no room for what is hidden and asked.
    """
    for place in range(count):
        prompt, answer = _fitted(task, (seed, place), length - new_tokens, tokenizer)
        yield Example(str(place), str(place), prompt, (answer,))


def _fitted(task: MadeUp, seeds: tuple[int, int], room: int, tokenizer: Tokenizer) -> tuple[str, str]:
    """Return the prompt of the most units that there is room for, steps towards which are as long as a unit seems."""

    def asked(units: int) -> tuple[tuple[str, str], int]:
        found = task.asked(np.random.default_rng(seeds), units)
        return found, len(tokenizer.encode(found[0]))

    fits, too_many = 1, math.inf
    found, tokens = asked(fits)
    if tokens > room:
        raise UserError(f"A prompt has {tokens} tokens at least, and there is room for {room}; give a larger length.")
    each: float = tokens
    while too_many - fits > 1:
        units = int(min(fits + max((room - tokens) // each, 1), too_many - 1))
        more, size = asked(units)
        each = size / units
        if size <= room:
            fits, found, tokens = units, more, size
        else:
            too_many = units
    return found


def _repeated(rng: np.random.Generator, needles: list[str], count: int) -> str:
    """Return lines of the same few sentences, with the needles between some of them."""
    lines = [REPEATED] * count
    for place, needle in _deepest_first(rng.choice(count + 1, len(needles)), needles):
        lines.insert(int(place), needle)
    return "\n".join(lines)


def _essay(rng: np.random.Generator, needles: list[str], count: int) -> str:
    """Return sentences of prose, over and over where there are not as many, with the needles at some of `DEPTHS`."""
    prose = essay_sentences()
    sentences = [prose[place % len(prose)] for place in range(count)]
    for depth, needle in _deepest_first(rng.choice(DEPTHS, len(needles), replace=False), needles):
        sentences.insert(int(count * depth), needle)
    return " ".join(sentences)


def _deepest_first(places: np.ndarray, needles: list[str]) -> list[tuple[float, str]]:
    """Return places with the needles that they were drawn for, in an order in which no insertion moves another's."""
    return sorted(zip(places.tolist(), needles, strict=True), reverse=True)


def _pairs(rng: np.random.Generator, first: str, second: str, count: int, between: str) -> list[str]:
    """Return distinct pairs of words of two lists, of which more begin with fewer of them."""
    ones, others = words()[first], words()[second]
    if count > len(ones) * len(others):
        raise UserError(f"A prompt of {count} names is too long; there are {len(ones) * len(others)} names.")
    places = rng.permutation(len(ones) * len(others))[:count]
    return [f"{ones[place // len(others)]}{between}{others[place % len(others)]}" for place in places]


@functools.cache
def words() -> dict[str, list[str]]:
    """Return the lists of words that keys and names are made of, by name."""
    lines = (SAMPLES / "words.txt").read_text().splitlines()
    return {name: found.split() for name, found in (line.split(": ") for line in lines)}


@functools.cache
def essay_sentences() -> tuple[str, ...]:
    """Return the sentences of the shipped prose that is held out of training."""
    documents = read_documents(default_corpus() / "val.jsonl.xz", Reading())
    text = " ".join(" ".join(chunk.text.split()) for chunk in documents)
    return tuple(SENTENCE_END.split(text))


HAYSTACKS: dict[str, Callable[[np.random.Generator, list[str], int], str]] = {"repeat": _repeated, "essay": _essay}
