import re
import uuid

import numpy as np
import pytest

from based_jax.data.tokenizer import ByteTokenizer, get_tokenizer
from based_jax.errors import UserError
from based_jax.evals.haystacks import REPEATED, Needles, made_up
from based_jax.evals.recall_tasks import NEW_TOKENS, TASKS, Part, Selection, examples_of

NIAH = ("niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1")


@pytest.fixture(scope="module")
def tokenizer():
    return get_tokenizer("gpt2")


def test_the_smallest_prompt_by_hand(tokenizer):
    (found,) = made_up(Needles("number", "repeat"), 160, 1, 0, tokenizer, NEW_TOKENS)
    key = re.search(r"for (\w+-\w+) is: (\d{7})\.", found.prompt)
    needle = f"One of the special magic numbers for {key[1]} is: {key[2]}."
    lines = sorted([needle, REPEATED], key=found.prompt.find)
    assert found.answers == (key[2],)
    assert found.prompt == (
        "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about"
        f" the number afterwards.\n{lines[0]}\n{lines[1]}\nWhat is the special magic number for {key[1]} mentioned in"
        f" the provided text? The special magic number for {key[1]} mentioned in the provided text is"
    )


@pytest.mark.parametrize("name", [*NIAH, "phonebook"])
@pytest.mark.parametrize("length", [400, 1500])
def test_prompts_fill_their_length_and_hold_their_answer_once(name, length, tokenizer):
    found = examples_of(Part(name, length), Selection(tokenizer, limit=4, seed=3))
    sizes = [len(tokenizer.encode(x.prompt)) + NEW_TOKENS for x in found]
    assert max(sizes) <= length and min(sizes) > length - (220 if name in NIAH[1:] else 40)
    assert all(x.prompt.count(x.answers[0]) == 1 for x in found)
    assert len({x.answers for x in found}) == 4
    assert found == examples_of(Part(name, length), Selection(tokenizer, limit=4, seed=3))
    assert found[0].answers != examples_of(Part(name, length), Selection(tokenizer, limit=1, seed=4))[0].answers


def test_what_is_hidden():
    found = {name: examples_of(Part(name, 2000), Selection(ByteTokenizer(), limit=10)) for name in NIAH}
    assert uuid.UUID(found["niah_single_3"][0].answers[0]).version == 4
    counts = {name: {x.prompt.count("One of the special magic") for x in found[name]} for name in NIAH}
    assert counts == {"niah_single_1": {1}, "niah_single_2": {1}, "niah_single_3": {1}, "niah_multikey_1": {4}}
    assert all(REPEATED in x.prompt for x in found["niah_single_1"])


@pytest.mark.parametrize("name", [*NIAH, "phonebook"])
def test_the_answer_stands_anywhere(name):
    """Not at one end, and among four needles not always at the same place."""
    found = examples_of(Part(name, 2500), Selection(ByteTokenizer(), limit=40))
    depths = np.array([x.prompt.find(x.answers[0]) / len(x.prompt) for x in found])
    assert depths.min() < 0.25 and depths.max() > 0.55 and 0.3 < depths.mean() < 0.65
    if name == "niah_multikey_1":
        needles = [re.findall(r"is: (\d{7})", x.prompt) for x in found]
        assert {x.index(y.answers[0]) for x, y in zip(needles, found, strict=True)} == {0, 1, 2, 3}


def test_a_phone_book_gives_two_of_its_entries_again(tokenizer):
    (found,) = examples_of(Part("phonebook", 300), Selection(tokenizer, limit=1))
    book, asked = found.prompt.split("\n\n")
    entries, (first, second, name) = book.split("\n"), asked.split("\n")
    assert first in entries and second in entries and f"{name} {found.answers[0]}" in entries
    assert len(set(entries)) == len(entries) and not name.startswith((first[:8], second[:8]))


def test_what_has_no_room_is_refused(tokenizer):
    with pytest.raises(UserError, match=r"A prompt has \d+ tokens at least, and there is room for 52; give a larger"):
        examples_of(Part("niah_single_1", 100), Selection(tokenizer, limit=1))
    assert set(TASKS) >= set(NIAH)
