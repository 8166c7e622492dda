"""Tokens that are drafted for a model to verify, several at once: by looking the text up, or by a smaller model.

A draft changes no answer. The model draws at each place as it would without it, by the row's key and the place, and
drafted tokens stay as far as they are what was drawn (drafter-invariant speculative decoding, arXiv 2408.07978): of a
draft that is certain as many as by rejection sampling. A smaller model drafts with the same keys, so that equal
distributions draw equal tokens.
"""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from based_jax.errors import UserError
from based_jax.generate.decoder import Caches, Decoder, Layout, Params
from based_jax.generate.prefill import CHUNK_TOKENS, FEWEST_TOKENS, prefill
from based_jax.generate.prompts import is_integer, shown
from based_jax.generate.requests import Request
from based_jax.generate.sampling import draw, drawable
from based_jax.nn.lm import LM

if TYPE_CHECKING:
    from based_jax.generate.rows import Rows

MOST_TOKENS = 32
"""That are drafted at once."""
LONGEST_MATCH = 3
"""Newest tokens that are looked for in the text, fewer where so many are not found."""
UNKNOWN = -1
"""A place of the text of which only a state is known."""

DraftIds = Int[Array, "B N"]


class Draft(NamedTuple):
    """Tokens that may come next, and how many of each row's are meant."""

    ids: DraftIds
    offered: Int[Array, "B"]


class Method(Protocol):
    """How tokens are drafted; what it is called with, and what it keeps of each row, are pytrees of arrays."""

    tokens: int

    def draft(self, params: Any, rows: "Rows") -> Draft:
        """Return the next tokens of each row."""

    def after(self, params: Any, before: "Rows", draft: Draft, drawn: Int[Array, "B n"], count: Int[Array, "B"]) -> Any:
        """Return what is kept of rows of which the first `count` of the tokens `drawn` (N + 1) are new."""


class Lookup(NamedTuple):
    """Drafts what followed where the newest tokens last stood in the text (prompt lookup decoding).

    Of the places where the most of them stood, `LONGEST_MATCH` at most, it is the latest; a text that ends there
    repeats itself. Kept of a row are its tokens by their places.
    """

    tokens: int

    def draft(self, params: None, rows: "Rows") -> Draft:
        """Return what followed, nothing where the newest token is new."""
        text, newest = rows.drafting, rows.length[:, None] - 1
        place = jnp.arange(text.shape[1])[None]
        matched, matches = jnp.zeros(text.shape, jnp.int32), place < newest
        for back in range(LONGEST_MATCH):
            wanted = jnp.where(newest >= back, _at(text, newest - back), UNKNOWN)
            matches &= (_shifted(text, back) == wanted) & (wanted != UNKNOWN)
            matched += matches
        score = jnp.where(matched > 0, matched * text.shape[1] + place, -1)
        found = jnp.argmax(score, axis=1)[:, None]
        period = jnp.maximum(newest - found, 1)
        ids = _at(text, found + 1 + jnp.arange(self.tokens)[None] % period)
        there = jnp.max(score, axis=1) >= 0
        return Draft(jnp.where(there[:, None], ids, 0), jnp.where(there, self.tokens, 0))

    def after(self, params: None, before: "Rows", draft: Draft, drawn: Int[Array, "B n"], count: Int[Array, "B"]):
        """Return the texts with the new tokens."""
        text, new = before.drafting, jnp.arange(drawn.shape[1])[None]
        places = jnp.where(new < count[:, None], before.length[:, None] + new, text.shape[1])
        return jax.vmap(lambda text, places, new: text.at[places].set(new, mode="drop"))(text, places, drawn)

    def begun(self, params: None, requests: Sequence[Request], max_len: int) -> Int[np.ndarray, "B S"]:
        """Return the texts of requests, their prompts, behind what is not known."""
        text = np.full((len(requests), max_len), UNKNOWN, np.int32)
        for row, request in enumerate(requests):
            text[row, request.length - len(request.prompt) : request.length] = request.prompt
        return text

    def check(self, params: None, decoder: Decoder, max_len: int) -> None:
        """Refuse nothing: any text can be looked up."""


@dataclasses.dataclass(frozen=True)
class SmallModel:
    """Drafts what another model draws by the same keys. Kept of a row are its caches after all tokens but the newest.

    What a request's state holds it has not read.
    """

    layout: Layout
    tokens: int

    def draft(self, params: Params, rows: "Rows") -> Draft:
        """Return tokens that the model draws one by one; its own caches stay before them."""
        model, draws = self.layout.model(params), rows.draws.of_live(rows.live).without_likeliest()

        def step(carry, place):
            token, caches = carry
            hidden, caches = model.step(token, caches)
            token = draw(drawable(model, hidden), draws, place).token
            return (token, caches), token

        places = rows.length[None] + jnp.arange(self.tokens)[:, None]
        _, ids = jax.lax.scan(step, (rows.token, rows.drafting), places)
        return Draft(ids.T, jnp.full_like(rows.length, self.tokens))

    def after(self, params: Params, before: "Rows", draft: Draft, drawn: Int[Array, "B n"], count: Int[Array, "B"]):
        """Return the caches after the tokens that stay, of which the newest is read next time."""
        model = self.layout.model(params)
        read = jnp.concatenate([before.token[:, None], draft.ids], axis=1)
        return model.keep(model.try_tokens(read, before.drafting)[1], count)

    def begun(self, params: Params, requests: Sequence[Request], max_len: int) -> Caches:
        """Return the caches after the prompts of requests."""
        decoder = Decoder(self.layout, params)
        prompts = [np.asarray(request.prompt[:-1], np.int32) for request in requests]
        return prefill(decoder, decoder.init_cache(len(requests), max_len), prompts, CHUNK_TOKENS)

    def check(self, params: Params, decoder: Decoder, max_len: int) -> None:
        """Raise UserError where the model does not know the tokens of another, or reads fewer."""
        own, vocab_size = Decoder(self.layout, params), decoder.config.vocab_size
        if own.config.vocab_size != vocab_size:
            both = f"{own.config.vocab_size} tokens, and the model that it drafts for {vocab_size}"
            raise UserError(f"The model that drafts knows {both}; they have to be the same.")
        if own.max_len is not None and own.max_len < max_len:
            raise UserError(f"The model that drafts reads {own.max_len} tokens; {max_len} are to be read.")
        if own.prefix_length:
            raise UserError("The model that drafts reads the beginning of a text in no order; give one that does not.")


@dataclasses.dataclass(frozen=True, eq=False)
class Drafts:
    """How many tokens are drafted for a model, and by what.

    A model with many bytes to read and little to compute verifies a few tokens at the cost of one. Where the last one
    read has to be kept (`Mixer.keep`) a state is not taken back but goes on from before the drafted tokens.
    """

    method: Lookup | SmallModel
    params: Any = None

    @classmethod
    def by_lookup(cls, tokens: int) -> "Drafts":
        """Return drafts of so many tokens from the text itself; UserError for a number that is none."""
        return cls(Lookup(_checked(tokens)))

    @classmethod
    def by_model(cls, model: LM | Decoder, tokens: int) -> "Drafts":
        """Return drafts of so many tokens by a smaller model; UserError for a number that is none."""
        decoder = Decoder.of(model)
        return cls(SmallModel(decoder.layout, _checked(tokens)), decoder.params)

    def check(self, decoder: Decoder, max_len: int) -> None:
        """Raise UserError for drafts that a model with room for `max_len` tokens cannot verify."""
        if (read := self.method.tokens + 1) > max_len:
            raise UserError(f"{read - 1} tokens are drafted and {read} read at once; there is room for {max_len}.")
        self.method.check(self.params, decoder, max_len)

    def compile(self, rows: int, max_len: int) -> None:
        """Compile what so many prompts of any length run, before the first one waits for it."""
        lengths = [FEWEST_TOKENS << i for i in range((CHUNK_TOKENS // FEWEST_TOKENS).bit_length())]
        for read in (length - lacking for length in lengths for lacking in (0, 1) if length < max_len):
            self.begun([Request([0] * (read + 1))] * rows, max_len)

    def begun(self, requests: Sequence[Request], max_len: int) -> Any:
        """Return what is kept of rows of requests whose prompts have been read."""
        return jax.device_put(self.method.begun(self.params, requests, max_len))


def check_drafts(drafts: Any, decoder: Decoder, max_len: int) -> None:
    """Raise UserError for what are no drafts, or none that a model with room for `max_len` tokens can verify."""
    if drafts is None:
        return
    if not isinstance(drafts, Drafts):
        raise UserError(f"drafts is {shown(drafts)}; it is None or Drafts, as in Drafts.by_lookup(4).")
    drafts.check(decoder, max_len)


def _checked(tokens: Any) -> int:
    if not is_integer(tokens) or not 1 <= tokens <= MOST_TOKENS:
        raise UserError(f"{shown(tokens)} tokens are to be drafted at once; 1 to {MOST_TOKENS} can be.")
    return int(tokens)


def _at(text: Int[Array, "B S"], places: Int[Array, "B n"]) -> Int[Array, "B n"]:
    return jnp.take_along_axis(text, jnp.clip(places, 0, text.shape[1] - 1), axis=1)


def _shifted(text: Int[Array, "B S"], back: int) -> Int[Array, "B S"]:
    """Return at each place the token that stands so many before it."""
    return jnp.pad(text, [(0, 0), (back, 0)], constant_values=UNKNOWN)[:, : text.shape[1]]
