"""Answers to requests for completions, whole or as a stream of server-sent events."""

import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from based_jax.data.tokenizer import Tokenizer
from based_jax.generate import Event, Request
from based_jax.generate.text import TextStream
from based_jax.serve.api_errors import ApiError
from based_jax.serve.completion import Completion
from based_jax.serve.driver import Driver

END_OF_STREAM = "data: [DONE]\n\n"


class Choice:
    """One continuation as it comes.

    Attributes:
      tokens: how many were drawn.
    """

    def __init__(self, index: int, completion: Completion, prompt: str, tokenizer: Tokenizer):
        self._index, self._tokenizer = index, tokenizer
        self._echo = prompt if completion.echo else ""
        self._so_far = None if completion.logprobs is None else TextStream(tokenizer)
        self._offset = len(self._echo)
        self.tokens = 0

    def read(self, event: Event) -> dict[str, Any]:
        """Return what an event adds, as the API's choice."""
        text, self._echo = self._echo + event.text, ""
        self.tokens += len(event.tokens)
        logprobs = None if self._so_far is None else self._log_probabilities(event, self._so_far)
        return {"index": self._index, "text": text, "logprobs": logprobs, "finish_reason": event.finish}

    def _log_probabilities(self, event: Event, so_far: TextStream) -> dict[str, Any]:
        """Return those of new tokens, and where in the text each begins."""
        tokens, offsets = [self._tokenizer.decode([token]) for token in event.tokens], []
        for token, own in zip(event.tokens, tokens, strict=True):
            new = so_far.push(token)  # that of tokens before may be held back until now
            offsets.append(self._offset + (len(new) - len(own) if new.endswith(own) else 0))
            self._offset += len(new)
        return {
            "tokens": tokens,
            "token_logprobs": event.log_probs,
            "top_logprobs": self._likeliest(event) or None,
            "text_offset": offsets,
        }

    def _likeliest(self, event: Event) -> list[dict[str, float]]:
        """Return by their texts the likeliest tokens beside each new one, and that."""
        found: list[dict[str, float]] = [{} for _ in event.top_log_probs]
        for texts, top, own, of_own in zip(found, event.top_log_probs, event.tokens, event.log_probs, strict=False):
            for token, log_prob in [*top.items(), (own, of_own)]:
                texts.setdefault(self._tokenizer.decode([token]), log_prob)
        return found


class Answer:
    """The answer to one request, in flight from the start; `close` it whatever happens."""

    def __init__(self, completion: Completion, model: str, tokenizer: Tokenizer, driver: Driver):
        self._completion = completion
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }
        prompts = [text for text in completion.prompt_texts for _ in range(completion.n)]
        self._choices = [Choice(index, completion, prompt, tokenizer) for index, prompt in enumerate(prompts)]
        self._ticket = driver.submit(rows(completion, tokenizer.end_of_text))

    def close(self) -> None:
        """Give up what has not ended."""
        self._ticket.give_up()

    async def whole(self) -> dict[str, Any]:
        """Return the body of an answer that does not stream; raise the ApiError that ends it before."""
        parts: list[list[dict[str, Any]]] = [[] for _ in self._choices]
        async for part in self._parts():
            parts[part["index"]].append(part)
        return {**self._head, "choices": [_joined(of_choice) for of_choice in parts], "usage": self._usage()}

    async def events(self) -> AsyncIterator[str]:
        """Yield the server-sent events of an answer that streams; what ends it before is the last one."""
        usage = {"usage": None} if self._completion.include_usage else {}
        try:
            async for part in self._parts():
                if part["text"] or part["logprobs"] or part["finish_reason"]:
                    yield _event({**self._head, "choices": [part], **usage})
            if usage:
                yield _event({**self._head, "choices": [], "usage": self._usage()})
            yield END_OF_STREAM
        except ApiError as error:
            yield _event(error.body())

    async def _parts(self) -> AsyncIterator[dict[str, Any]]:
        async for index, event in self._ticket.events():
            yield self._choices[index].read(event)

    def _usage(self) -> dict[str, Any]:
        prompt, new = sum(map(len, self._completion.prompts)), sum(choice.tokens for choice in self._choices)
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


def rows(completion: Completion, end_of_text: int) -> list[Request]:
    """Return what a request asks of the scheduler: n rows a prompt, each with draws of its own."""
    prompts = [prompt for prompt in completion.prompts for _ in range(completion.n)]
    return [
        Request(
            prompt=prompt,
            max_new_tokens=completion.max_tokens,
            sampling=completion.sampling,
            stop_ids=(end_of_text,),
            stop_strings=tuple(completion.stop),
            seed=completion.seed,
            row_id=row_id,
            top_log_probs=completion.logprobs or 0,
        )
        for row_id, prompt in enumerate(prompts)
    ]


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, separators=(',', ':'))}\n\n"


def _joined(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return one choice of what several events added to it."""
    logprobs = [part["logprobs"] for part in parts if part["logprobs"] is not None]
    names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    lists = {name: [value for one in logprobs for value in one[name] or ()] for name in names}
    return {
        **parts[-1],
        "text": "".join(part["text"] for part in parts),
        "logprobs": {**lists, "top_logprobs": lists["top_logprobs"] or None} if logprobs else None,
    }
