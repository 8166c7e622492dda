"""A request for completions: its body, checked field by field.

OpenAI's fields, and `top_k` beside them. What cannot be answered as asked is refused, never left out in silence.
"""

import dataclasses
import json
import secrets
from collections.abc import Callable
from typing import Any

import numpy as np

from based_jax.data.tokenizer import Tokenizer
from based_jax.errors import UserError
from based_jax.generate import Sampling
from based_jax.generate.prompts import SEED_LIMIT, checked_prompts, is_integer, is_number, shown
from based_jax.generate.sampling import MOST_TOP
from based_jax.generate.text import encode_prompt
from based_jax.serve.api_errors import ApiError
from based_jax.serve.limits import Limits


@dataclasses.dataclass(frozen=True)
class Completion:
    """What a request asks for.

    Attributes:
      prompts: token ids of each.
      prompt_texts: of the same.
      seed: of all draws; choice i draws as row i.
    """

    prompts: list[np.ndarray]
    prompt_texts: list[str]
    sampling: Sampling
    seed: int
    max_tokens: int
    n: int
    stop: list[str]
    logprobs: int | None
    echo: bool
    stream: bool
    include_usage: bool


@dataclasses.dataclass(frozen=True)
class Field:
    """A field of the body: its default, also where it is null, whether a value is one, and what it is, in words."""

    default: Any
    allows: Callable[[Any], bool]
    meaning: str


def _is_integer_from(least: int) -> Callable[[Any], bool]:
    return lambda value: is_integer(value) and value >= least


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


MAX_STOPS = 4
FIELDS = {
    "model": Field(None, _is_text, "the name of a model, as /v1/models lists it"),
    "prompt": Field("", lambda value: isinstance(value, str | list), "a text, token ids, or a list of such"),
    "max_tokens": Field(16, _is_integer_from(1), "at least 1"),
    "n": Field(1, _is_integer_from(1), "at least 1"),
    "temperature": Field(1.0, is_number, "a number"),
    "top_p": Field(1.0, is_number, "a number"),
    "top_k": Field(0, is_integer, "an integer"),
    "seed": Field(
        None, lambda value: is_integer(value) and 0 <= value < SEED_LIMIT, f"an integer from 0 to {SEED_LIMIT - 1}"
    ),
    "stop": Field([], lambda value: _is_stop(value), f"a text, or a list of at most {MAX_STOPS}, none empty"),
    "logprobs": Field(
        None,
        lambda value: is_integer(value) and 0 <= value <= MOST_TOP,
        f"0, for those of the tokens that are drawn, up to {MOST_TOP} for so many of the likeliest too, or null",
    ),
    "echo": Field(False, _is_flag, "true or false"),
    "stream": Field(False, _is_flag, "true or false"),
    "stream_options": Field({}, lambda value: isinstance(value, dict), "an object"),
    "user": Field(None, _is_text, "a text"),
    "best_of": Field(1, lambda value: value == 1, "1"),
    "suffix": Field("", lambda value: value == "", "empty: a continuation sees only what stands before it"),
    "frequency_penalty": Field(0, lambda value: value == 0, "0"),
    "presence_penalty": Field(0, lambda value: value == 0, "0"),
    "logit_bias": Field({}, lambda value: value == {}, "empty"),
}


def parse_completion(body: bytes, tokenizer: Tokenizer, limits: Limits, vocab_size: int, model: str) -> Completion:
    """Return what a body asks for.

    Raises:
      ApiError: it is no JSON, has a field that is unknown or impossible, asks for more than the limits, or for another
        model than the one of this name.
    """
    fields = _fields(_object(body))
    if fields["model"] != model:
        raise ApiError(404, f"model is {shown(fields['model'])}; it is '{model}'.", "model", "model_not_found")
    if fields["echo"] and fields["logprobs"] is not None:
        both = f"logprobs is {fields['logprobs']} and echo is true"
        raise ApiError(400, f"{both}; tokens of a prompt have none here.", "logprobs")
    texts, prompts = _prompts(fields["prompt"], tokenizer, vocab_size)
    for prompt in prompts:
        _check_length(prompt, fields["max_tokens"], limits)
    if (rows := len(prompts) * fields["n"]) > limits.texts:
        raise ApiError(400, f"The request asks for {rows} texts; at most {limits.texts} are written or wait.", "n")
    return Completion(
        prompts=prompts,
        prompt_texts=texts,
        sampling=_sampling(fields),
        seed=secrets.randbelow(SEED_LIMIT) if fields["seed"] is None else fields["seed"],
        max_tokens=fields["max_tokens"],
        n=fields["n"],
        stop=_stops(fields["stop"]),
        logprobs=fields["logprobs"],
        echo=fields["echo"],
        stream=fields["stream"],
        include_usage=_include_usage(fields["stream_options"]),
    )


def _object(body: bytes) -> dict[str, Any]:
    try:
        value = json.loads(body, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        why = " ".join(str(error).split())[:80]
        raise ApiError(400, f"The body is no JSON: {why}.") from None
    if not isinstance(value, dict):
        raise ApiError(400, f"The body is {shown(value)}; it is a JSON object.")
    return value


def _no_number(word: str) -> Any:
    raise ValueError(f"{word} is no number of JSON")


def _fields(given: dict[str, Any]) -> dict[str, Any]:
    """Return all fields; ApiError for one that is unknown, or whose value is none of its own."""
    for name, value in given.items():
        if name not in FIELDS:
            raise ApiError(400, f"Unknown field {shown(name)}; there are {', '.join(FIELDS)}.", shown(name)[1:-1])
        if value is not None and not FIELDS[name].allows(value):
            raise ApiError(400, f"{name} is {shown(value)}; it is {FIELDS[name].meaning}.", name)
    return {name: field.default if given.get(name) is None else given[name] for name, field in FIELDS.items()}


def _prompts(prompt: str | list, tokenizer: Tokenizer, vocab_size: int) -> tuple[list[str], list[np.ndarray]]:
    """Return the texts and the ids of the prompts; an empty one begins where a text ends."""
    is_one = isinstance(prompt, str) or not prompt or is_integer(prompt[0])
    given = ["" if one == [] else one for one in ([prompt] if is_one else prompt)]
    try:
        encoded = [encode_prompt(tokenizer, _utf8("prompt", one)) if isinstance(one, str) else one for one in given]
        ids = checked_prompts(encoded, vocab_size)
    except UserError as error:
        raise ApiError(400, str(error), "prompt") from None
    texts = [one if isinstance(one, str) else tokenizer.decode(one) for one in given]
    return texts, ids


def _stops(stop: str | list[str]) -> list[str]:
    """Return the stop strings; ApiError for one that no text has."""
    try:
        return [_utf8("stop", one) for one in ([stop] if isinstance(stop, str) else stop)]
    except UserError as error:
        raise ApiError(400, str(error), "stop") from None


def _utf8(name: str, text: str) -> str:
    """Return a text; UserError for one that UTF-8 does not have."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{name} is {shown(text)}, which has half of a surrogate pair.") from None
    return text


def _check_length(prompt: np.ndarray, max_tokens: int, limits: Limits) -> None:
    asked, code = f"max_tokens is {shown(max_tokens)}", "context_length_exceeded"
    if max_tokens > limits.new_tokens:
        raise ApiError(400, f"{asked}; it is at most {limits.new_tokens}.", "max_tokens", code)
    if len(prompt) + max_tokens > limits.max_len:
        both = f"The prompt has {len(prompt)} tokens and {asked}; together they are at most {limits.max_len}."
        raise ApiError(400, both, "prompt", code)


def _sampling(fields: dict[str, Any]) -> Sampling:
    try:
        return Sampling(fields["temperature"], fields["top_k"], fields["top_p"])
    except UserError as error:
        raise ApiError(400, str(error), str(error).split()[0]) from None


def _is_stop(value: Any) -> bool:
    stops = value if isinstance(value, list) else [value]
    return len(stops) <= MAX_STOPS and all(isinstance(stop, str) and stop for stop in stops)


def _include_usage(options: dict[str, Any]) -> bool:
    for name, value in options.items():
        if name != "include_usage" or not isinstance(value, bool):
            sentence = f"stream_options has {shown(name)}: {shown(value)}; it may have include_usage, true or false."
            raise ApiError(400, sentence, "stream_options")
    return options.get("include_usage", False)
