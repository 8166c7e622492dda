"""What lm-eval asks of a model, and the class that it finds by `--model based_jax` (the extra `eval`).

lm-eval is optional: what it imports is imported where it is used.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from tqdm import tqdm

from based_jax.data.tokenizer import Tokenizer
from based_jax.errors import UserError, installs
from based_jax.evals.answering import answered, stop_ids, text_until
from based_jax.evals.likelihood import Continuation, Judge, Likelihood, likelihoods, strided
from based_jax.generate import Decoder, Request, Sampling
from based_jax.generate.text import encode_prompt
from based_jax.nn.lm import LM

NAME = "based_jax"
NEW_TOKENS = 256
"""Of an answer whose task says no number, lm-eval's default."""
SAMPLING_OPTIONS = ("do_sample", "temperature", "top_k", "top_p")
GENERATION_OPTIONS = ("until", "max_gen_toks", *SAMPLING_OPTIONS)


class HarnessModel:
    """A model as lm-eval asks it: likelihoods, those of whole texts, and answers, batched by length.

    Args:
      model, tokenizer: what is asked.
      batch_size: rows of `max_length` tokens that are read together; of shorter ones more.
      max_length: tokens that are read; of what is longer the beginning is left out.

    Raises:
      UserError: a number is below 1, or the model does not read `max_length` tokens.
    """

    def __init__(self, model: LM, tokenizer: Tokenizer, batch_size: int = 8, max_length: int = 2048):
        for name, value in (("batch_size", batch_size), ("max_length", max_length)):
            if value < 1:
                raise UserError(f"{name} is {value}; it is at least 1.")
        if model.max_len is not None and max_length > model.max_len:
            raise UserError(f"max_length is {max_length}; the model reads {model.max_len} tokens.")
        self.model, self.tokenizer, self.batch_size, self.max_length = model, tokenizer, batch_size, max_length
        self.judge = Judge(model, batch_size * max_length)

    @functools.cached_property
    def decoder(self) -> Decoder:
        """The model as generation reads it."""
        return Decoder.of(self.model)

    @property
    def before_texts(self) -> int:
        """The id that stands before a text without context: what begins one, or ends another."""
        return [self.tokenizer.end_of_text, *self.tokenizer.beginning][-1]

    def likelihoods(self, pairs: Sequence[Continuation]) -> Iterator[tuple[int, Likelihood]]:
        """Yield the place of each continuation with its likelihood."""
        return likelihoods(self.judge, pairs, self.max_length)

    def whole_texts(self, texts: Sequence[str]) -> list[float]:
        """Return the log-probability of each text behind `before_texts`, in windows that share no judged token."""
        windows = [
            (place, window)
            for place, text in enumerate(texts)
            for window in strided([self.before_texts, *self.tokenizer.encode(text)], self.max_length)
        ]
        sums = [0.0] * len(texts)
        for place, found in self.likelihoods([window for _, window in windows]):
            sums[windows[place][0]] += found.log_prob
        return sums

    def answers(self, asked: Sequence[tuple[str, Mapping[str, Any]]]) -> Iterator[tuple[int, str]]:
        """Yield the place of each (prompt, options of generation) with what the model says.

        Raises:
          UserError: an option is unknown, or leaves no room for the prompt.
        """
        stops = [_stops(options) for _, options in asked]
        requests = [self._request(*pair, stop) for pair, stop in zip(asked, stops, strict=True)]
        for place, ids in answered(self.decoder, requests, self.batch_size):
            yield place, text_until(self.tokenizer.decode(ids), stops[place])

    def _request(self, prompt: str, options: Mapping[str, Any], stops: Sequence[str]) -> Request:
        if unknown := set(options) - set(GENERATION_OPTIONS):
            raise UserError(
                f"Option '{min(unknown)}' of generation is unknown; there are {', '.join(GENERATION_OPTIONS)}."
            )
        new_tokens = int(options.get("max_gen_toks", NEW_TOKENS))
        if new_tokens >= self.max_length:
            raise UserError(f"max_gen_toks is {new_tokens}; it is less than max_length, {self.max_length}.")
        ids = encode_prompt(self.tokenizer, prompt)[-(self.max_length - new_tokens) :]
        return Request(ids, new_tokens, _sampling(options), stop_ids(self.tokenizer, stops))


def _stops(options: Mapping[str, Any]) -> list[str]:
    until = options.get("until") or []
    return [stop for stop in ([until] if isinstance(until, str) else until) if stop]


def _sampling(options: Mapping[str, Any]) -> Sampling:
    """Return how tokens are drawn: greedily unless `do_sample` asks for more, or a temperature does."""
    if not options.get("do_sample", True):
        return Sampling()
    return Sampling(
        float(options.get("temperature", 0.0)), int(options.get("top_k", 0)), float(options.get("top_p", 1.0))
    )


def register(load: Callable[..., tuple[LM, Tokenizer]]) -> type:
    """Let lm-eval find the class of `--model based_jax`, and return it.

    Args:
      load: returns model and tokenizer by those of `--model_args` that are none of `HarnessModel`'s.

    Raises:
      UserError: lm-eval is not installed.
    """
    try:
        from lm_eval.api.model import TemplateLM
        from lm_eval.api.registry import model_registry, register_model
    except ImportError as error:
        raise UserError(f"lm-eval is not installed ({error}); {installs('eval')} brings it.") from None

    class BasedJax(TemplateLM):
        """A model of based_jax in lm-eval."""

        def __init__(self, batch_size=1, max_length=2048, device=None, max_batch_size=None, **place):
            super().__init__()
            self.asked = HarnessModel(*load(**place), _whole("batch_size", batch_size), max_length)

        @property
        def eot_token_id(self):
            return self.asked.tokenizer.end_of_text

        @property
        def prefix_token_id(self):
            return self.asked.before_texts

        @property
        def tokenizer_name(self):
            return self.asked.tokenizer.fingerprint

        def tok_encode(self, string, add_special_tokens=None, **options):
            beginning = () if add_special_tokens is False else self.asked.tokenizer.beginning
            return [*beginning, *self.asked.tokenizer.encode(string)]

        def _loglikelihood_tokens(self, requests, disable_tqdm=False, **options):
            pairs = [Continuation(context, ids) for _, context, ids in requests]
            found = self._in_order(self.asked.likelihoods(pairs), len(pairs), disable_tqdm)
            for (texts, _, _), likelihood in zip(requests, found, strict=True):
                self.cache_hook.add_partial("loglikelihood", texts, tuple(likelihood))
            return [tuple(likelihood) for likelihood in found]

        def loglikelihood_rolling(self, requests, disable_tqdm=False):
            return self.asked.whole_texts([request.args[0] for request in requests])

        def generate_until(self, requests, disable_tqdm=False):
            asked = [request.args for request in requests]
            return self._in_order(self.asked.answers(asked), len(asked), disable_tqdm)

        def _in_order(self, found, count, disable_tqdm):
            places = dict(tqdm(found, total=count, disable=disable_tqdm))
            return [places[place] for place in range(count)]

    return BasedJax if NAME in model_registry else register_model(NAME)(BasedJax)


def _whole(name: str, value: Any) -> int:
    try:
        return int(value)
    except ValueError:
        raise UserError(f"{name} is '{value}'; it is a whole number.") from None
