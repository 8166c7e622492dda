"""Drafted tokens verified: a model reads them all at once, and those that it would have drawn stay."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from based_jax.dims import BTD
from based_jax.generate.drafts import Draft, Method
from based_jax.generate.rows import Rows
from based_jax.generate.sampling import Drawn, draw, drawable
from based_jax.nn.lm import LM


class Verified(NamedTuple):
    """What one pass over the newest token and N drafted ones has drawn.

    Attributes:
      drawn: (B, N + 1), the first `counts` of which are new; an id that stops the row is its last.
      counts: new tokens of each row, at least one of a row that goes on, none of one that has stopped.
      offered: of the drafted tokens those that were meant.
    """

    drawn: Drawn
    counts: Int[Array, "B"]
    offered: Int[Array, "B"]


def verify(model: LM, method: Method, params: Any, rows: Rows) -> tuple[Rows, Verified]:
    """Read the newest token of each row with those drafted behind it; return the rows with all that come of it."""
    draft = method.draft(params, rows)
    hidden, trials = model.try_tokens(jnp.concatenate([rows.token[:, None], draft.ids], axis=1), rows.caches)
    drawn = _drawn_behind_each(model, hidden, rows)
    is_new, stops = _new_tokens(rows, draft, drawn.token)
    count = jnp.sum(is_new, axis=1)
    newest = jnp.take_along_axis(drawn.token, jnp.maximum(count - 1, 0)[:, None], axis=1)[:, 0]
    after = dataclasses.replace(
        rows,
        caches=model.keep(trials, count),
        token=jnp.where(count > 0, newest, rows.token),
        length=rows.length + count,
        left=jnp.where(stops, 0, rows.left - count),
        drafting=method.after(params, rows, draft, drawn.token, count),
    )
    return after, Verified(drawn, count, jnp.where(rows.live, draft.offered, 0))


@jax.named_scope("draw")
def _drawn_behind_each(model: LM, hidden: BTD, rows: Rows) -> Drawn:
    """Draw behind each token that was read, at its own place, as if those before it were all of the text."""
    B, T, _ = hidden.shape
    row, behind = jnp.repeat(jnp.arange(B), T), jnp.tile(jnp.arange(T), B)
    draws = jax.tree.map(lambda x: x[row], rows.draws.of_live(rows.live))
    drawn = draw(drawable(model, hidden.reshape(B * T, -1)), draws, rows.length[row] + behind)
    return jax.tree.map(lambda x: x.reshape(B, T, *x.shape[1:]), drawn)


def _new_tokens(rows: Rows, draft: Draft, drawn: Int[Array, "B n"]) -> tuple[Bool[Array, "B n"], Bool[Array, "B"]]:
    """Return which drawn tokens are new, and which rows a stop id ends.

    A token is new if all drafted before it are what was drawn there, none of these stops, and it may still be drawn.
    """
    place = jnp.arange(drawn.shape[1])[None]
    agrees = (drawn[:, :-1] == draft.ids) & (place[:, :-1] < draft.offered[:, None])
    stops = jnp.any(drawn[..., None] == rows.stop_ids[:, None], axis=2)
    goes_on = jnp.cumprod(agrees & ~stops[:, :-1], axis=1).astype(bool)
    is_new = jnp.concatenate([rows.live[:, None], goes_on & rows.live[:, None]], axis=1) & (place < rows.left[:, None])
    return is_new, jnp.any(is_new & stops, axis=1)
