"""Text of tokens as they come."""

import numpy as np
import pytest

from based_jax.data.tokenizer import ByteTokenizer, Gpt2Tokenizer
from based_jax.generate.text import BROKEN, TextStream, encode_prompt


@pytest.fixture(scope="module", params=[ByteTokenizer, Gpt2Tokenizer])
def tokenizer(request):
    return request.param()


def pieces(tokenizer, ids, stops=()):
    """Return what is told after each token, and at the end, until a stop."""
    stream, told = TextStream(tokenizer, stops), []
    for token in ids:
        told.append(stream.push(token))
        if stream.stopped:
            return told
    return [*told, stream.finish()]


def test_pieces_join_to_the_text_and_break_no_character(tokenizer):
    text = "Über 7 €, naïve 🦊 and 中文.\n\n  The end"
    told = pieces(tokenizer, tokenizer.encode(text))
    assert "".join(told) == text and BROKEN not in "".join(told)
    assert sum(map(bool, told)) > 10


def test_only_the_character_that_is_not_whole_is_held_back():
    stream = TextStream(ByteTokenizer())
    told = [
        stream.push(*block) for block in ("中".encode()[:1], "中".encode()[1:] + b"a\xe2\x82", b"\xac", b"\xff" * 9)
    ]
    assert [*told, stream.finish()] == ["", "中a", "€", BROKEN * 6, BROKEN * 3]


def test_blocks_of_tokens_join_to_the_text(tokenizer):
    text = "Über 7 €, naïve 🦊 and 中文.\n\n  The end" * 5
    ids, stream = tokenizer.encode(text), TextStream(tokenizer)
    told = [stream.push(*ids[start : start + 7]) for start in range(0, len(ids), 7)]
    assert all(told) and "".join(told) + stream.finish() == text


def test_any_ids_are_told_as_they_are_decoded(tokenizer):
    ids = np.random.default_rng(0).integers(0, tokenizer.vocab_size, 300).tolist()
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("one two three", ("two",), "one "),
        ("one two three", ("three", "wo t"), "one t"),
        ("aaab", ("aab",), "a"),
        ("ends with its sto", ("stop",), "ends with its sto"),
        ("€ and €uro", ("€u",), "€ and "),
        ("at the end.", (".",), "at the end"),
    ],
)
def test_nothing_of_a_stop_string_is_told(tokenizer, text, stops, expected):
    told = pieces(tokenizer, tokenizer.encode(text), stops)
    assert "".join(told) == expected


def test_what_no_stop_string_goes_on_with_is_told_at_once():
    assert pieces(ByteTokenizer(), b"ab stop", ("stab",)) == ["a", "b", " ", "", "", "sto", "p", ""]


def test_an_empty_prompt_begins_a_document(tokenizer):
    assert encode_prompt(tokenizer, "") == [tokenizer.end_of_text]
    assert encode_prompt(tokenizer, "a") == tokenizer.encode("a")
