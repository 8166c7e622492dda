"""What a mixer makes of sequences: causal, the same whole, in pieces and token by token, documents apart."""

import itertools
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from based_jax.contracts.fitting import (
    LONGEST,
    ROWS,
    TOKENS,
    Fitting,
    call,
    close,
    prefill,
    require,
    same,
    step,
)
from based_jax.dims import Unbroken
from based_jax.errors import UserError
from based_jax.generate.state import State
from based_jax.generate.state_layout import StateLayout
from based_jax.nn.mixer import Mixer

PATTERNS = """
    1 1 1 0 0 0   1 1 1 1 0 0
    0 0 0 1 1 1   0 0 1 1 1 1
    1 0 0 1 0 1   1 0 1 1 0 1
    0 0 0 0 0 0   0 1 1 0 1 2
    1 1 1 1 1 1   0 0 0 0 0 0
    3 3 3 3 3 1   2 2 2 2 2 2
    1 2 1 0 1 1   0 1 2 2 0 1
"""
"""Ids of rows that are read in two halves: what documents and padding may do at their ends and at the cut."""


def gives_finite_outputs(fitting: Fitting) -> None:
    """Outputs have the shape of inputs, and are numbers, in one pass and token by token."""
    x = fitting.normal(ROWS, TOKENS, fitting.d_model)
    for y, what in ((call(fitting.mixer, x), "Outputs"), (fitting.read(x, fitting.empty()), "Outputs of steps")):
        require(y.shape == x.shape, f"{what} have shape {y.shape} of inputs {x.shape}.")
        wrong = ~np.isfinite(y)
        require(not wrong.any(), f"{what} are NaN or infinite from token {wrong.any(axis=(0, 2)).argmax()} on.")


def is_causal(fitting: Fitting) -> None:
    """Another token t changes output t and none before: row t of 9 has one, and the rows of the last batch none."""
    T, D, mixer = TOKENS, fitting.d_model, fitting.mixer
    x, other = fitting.normal(T, D), fitting.normal(T, D)
    rows = np.where(np.eye(T + ROWS, T)[..., None], other[None], x[None]).astype(np.float32)
    y = np.concatenate([call(mixer, rows[i : i + ROWS]) for i in range(0, T + ROWS, ROWS)])
    influence = np.abs(y[:T] - y[T:][:1]).max(axis=-1)  # of the row's token on each output
    require(influence.max() > 1e-2, "No token has a part in any output.")
    early = np.argwhere(np.tril(influence, -1) > 1e-6 * influence.max())
    require(not early.size, f"Token {early[:1, :1].sum()} changes output {early[:1, 1:].sum()}, which is before it.")
    deaf = np.argwhere(np.diag(influence) <= 1e-3 * influence.max())
    require(not deaf.size, f"Output {deaf[:1].sum()} does not depend on its own token.")


def gives_outputs_at_positions(fitting: Fitting) -> None:
    """Outputs at some positions, in any order, are those of all."""
    x = fitting.normal(ROWS, TOKENS, fitting.d_model)
    places = np.stack([fitting.rng.permutation(TOKENS)[:4] for _ in range(ROWS)])
    some = jax.jit(lambda mixer, x, places: mixer(x, positions=places))(fitting.mixer, x, places)
    close(
        some, np.take_along_axis(np.asarray(call(fitting.mixer, x)), places[..., None], axis=1), "Outputs at positions"
    )


def continues_a_prefill(fitting: Fitting) -> None:
    """Prefill and steps equal one pass, split after one token, after 4 (a window's), and after the last."""
    mixer, x = fitting.mixer, fitting.normal(ROWS, TOKENS, fitting.d_model)
    whole = call(mixer, x)
    close(fitting.read(x, fitting.empty()), whole, "Outputs of steps alone")
    for split in (1, 4, TOKENS):
        y, cache = prefill(mixer, x[:, :split], fitting.empty())
        close(y, whole[:, :split], f"Outputs of a prefill of {split} tokens")
        if split < TOKENS:
            close(fitting.read(x[:, split:], cache), whole[:, split:], f"Outputs of steps after {split} tokens")


def prefills_in_pieces(fitting: Fitting) -> None:
    """Prefills one after the other leave the cache of one, and so do steps."""
    mixer, x, T = fitting.mixer, fitting.normal(ROWS, TOKENS + 2, fitting.d_model), TOKENS
    _, once = prefill(mixer, x[:, :T], fitting.empty())
    close(fitting.decode(x[:, :T], fitting.empty())[1], once, "The arrays of a cache after steps")
    whole = fitting.read(x, fitting.empty())[:, T:]
    for pieces in ((4, 1, 4), (1, 4, 4)):
        cache, start = fitting.empty(), 0
        for length in pieces:
            _, cache = prefill(mixer, x[:, start : start + length], cache)
            start += length
        close(cache, once, f"The arrays of a cache after pieces of {pieces} tokens")
        close(fitting.read(x[:, T:], cache), whole, f"Outputs after pieces of {pieces} tokens")


def goes_on_for_long(fitting: Fitting) -> None:
    """Many steps equal one pass: long enough for a ring to wrap around several times."""
    x = fitting.normal(ROWS, LONGEST, fitting.d_model)
    close(fitting.read(x, fitting.empty()), call(fitting.mixer, x), f"Outputs of {LONGEST} steps")


class OneLayer(NamedTuple):
    """What a layout of states asks of a decoder, of a mixer alone."""

    mixer: Mixer
    config: Any
    fingerprint: str = "of a contract"

    def row_shapes(self, max_len: int) -> Any:
        """Return the shapes of the caches of one row, without the axis of the rows."""
        return jax.eval_shape(lambda: jax.tree.map(lambda x: x[0], ((self.mixer.init_cache(1, max_len),),)))


def saves_its_state(fitting: Fitting, path: Any) -> None:
    """A state that was saved, into the file `path`, and forked goes on bit for bit."""
    x, row, C = fitting.normal(ROWS, TOKENS, fitting.d_model), 3, 4
    layer: Any = OneLayer(fitting.mixer, types.SimpleNamespace(layers=((fitting.kind, {}),)))
    layout = StateLayout(layer)
    _, cache = prefill(fitting.mixer, x[:, :C], fitting.empty())
    state = layout.take(((cache,),), C, row=row)
    unbroken, last = fitting.decode(x[:, C:], cache)
    state.save(path)
    loaded = State.load(path)
    require(loaded == state, "A state is another one after it was saved.")
    require(loaded != layout.take(((last,),), C, row=row), f"{TOKENS - C} tokens leave the state as it was.")
    for _ in range(2):
        [[fork]] = layout.fork(loaded, LONGEST, rows=ROWS)
        again = fitting.read(np.repeat(x[row : row + 1, C:], ROWS, axis=0), fork)[row]
        same(again, unbroken[row], "Outputs after a state that was saved")


def keeps_documents_apart(fitting: Fitting, before: int = 0) -> None:
    """Two prefills and steps of rows with padding and several documents, each as if it were read alone.

    `before` tokens without an id stand before them, which the first document goes on with.
    """
    D, n, after = fitting.d_model, before, 4
    halves = np.asarray([row.split() for row in PATTERNS.strip().splitlines()], np.int32)
    others = fitting.rng.integers(0, 3, (ROWS - len(halves), halves.shape[1]))
    halves = np.concatenate([halves, others]).astype(np.int32)
    C, last = halves.shape[1] // 2, [row[row != 0][-1] if row.any() else 1 for row in halves]
    ids = np.concatenate([np.zeros((ROWS, n), np.int32), halves, np.stack([last] * after, axis=1)], axis=1)
    ids = ids.astype(np.int32)
    ids[:, :n] = [[row[row != 0][0] if row.any() else 1] * n for row in halves]
    mixer, x = fitting.mixer, fitting.normal(ROWS, ids.shape[1], D)
    expected, real = _read_alone(fitting, x, ids), (ids != 0)[..., None]
    _, untouched = prefill(mixer, x[:, n : n + C], fitting.empty(), np.zeros((ROWS, C), np.int32))
    same(untouched, fitting.empty(), "The arrays of a cache that has read padding alone, and those of an empty one,")

    cache, parts = fitting.empty(), [np.zeros((ROWS, 0, D))]
    for t in range(n):
        y, cache = step(mixer, x[:, t], cache)
        parts.append(y[:, None])
    for start in (n, n + C):
        y, cache = prefill(mixer, x[:, start : start + C], cache, ids[:, start : start + C])
        parts.append(y)
    parts.append(fitting.read(x[:, n + 2 * C :], cache))
    close(np.where(real, np.concatenate(parts, axis=1), 0), expected, "Outputs of documents in prefills and steps")
    if not before:
        whole = call(mixer, x[:, : 2 * C], ids[:, : 2 * C])
        close(np.where(real[:, : 2 * C], whole, 0), expected[:, : 2 * C], "Outputs of documents in one pass")


def goes_on_with_a_document(fitting: Fitting) -> None:
    """The same after two tokens without an id, which the first document goes on with."""
    keeps_documents_apart(fitting, before=2)


def _documents(ids: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (row, times) of each document of rows of ids: the times of a longest run of equal ids, without padding."""
    for row, of_row in enumerate(ids):
        times = np.flatnonzero(of_row)
        begins = 1 + np.flatnonzero(np.diff(of_row[times]))
        yield from ((row, document) for document in np.split(times, begins))


def _read_alone(fitting: Fitting, x: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Return the outputs of x where each document is read by itself, token by token; 0 at padding."""
    outputs = np.zeros_like(x)
    for some in itertools.batched(_documents(ids), ROWS):
        alone = np.zeros((ROWS, max(times.size for _, times in some), x.shape[2]), np.float32)
        for i, (row, times) in enumerate(some):
            alone[i, : times.size] = x[row, times]
        y = fitting.read(alone, fitting.empty())
        for i, (row, times) in enumerate(some):
            outputs[row, times] = y[i, : times.size]
    return outputs


def refuses_what_has_no_room(fitting: Fitting) -> None:
    """A cache that grows gives NaN to each token that it has no room for, and what is right to those before."""
    mixer, x, room = fitting.mixer, fitting.normal(ROWS, 7, fitting.d_model), 4
    grows = mixer.state_size(room) < mixer.state_size(room + 1)
    expected = fitting.read(x, fitting.empty())
    if grows:
        expected[:, room:] = np.nan
        _refused(
            lambda: jax.eval_shape(mixer.prefill, x[:, : room + 1], fitting.empty(room)),
            f"room for {room} tokens, and {room + 1} are to be read",
            f"A prefill of {room + 1} tokens into a cache for {room}",
        )
    first, cache = prefill(mixer, x[:, :6], fitting.empty(room), np.asarray([[0, 1, 1, 1, 1, 1]] * ROWS, np.int32))
    first_alone = fitting.read(x[:, 1:6], fitting.empty(room))
    close(np.isnan(first_alone), np.isnan(expected[:, :5]), "Outputs of steps that are NaN")
    close(np.nan_to_num(first[:, 1:]), np.nan_to_num(first_alone), "Outputs of a prefill with padding")
    later = np.isnan(np.asarray(fitting.read(x[:, 6:], cache)))
    require(later.all() == grows and later.any() == grows, "Outputs beyond a cache are NaN where it grows, no others.")
    whole = np.nan_to_num(fitting.read(x, fitting.empty(room)))
    close(whole, np.nan_to_num(expected), f"Outputs of steps with a cache for {room} tokens")


def refuses_impossible_caches(fitting: Fitting) -> None:
    """A cache of no tokens or no rows is refused."""
    for sizes, message in (((ROWS, 0), "max_len of a cache is 0"), ((0, TOKENS), "batch of a cache is 0")):
        _refused(lambda sizes=sizes: fitting.mixer.init_cache(*sizes), message, f"A cache of {sizes}")


def _refused(attempt: Any, part: str, what: str) -> None:
    """Require that a call raises a UserError with this part."""
    try:
        attempt()
    except UserError as error:
        require(part in str(error), f"{what} is refused without the words '{part}': {error}")
    else:
        require(False, f"{what} is not refused.")


def reads_ids_of_a_model(fitting: Fitting) -> None:
    """Ids come as `dims.Unbroken` from a model, and are read by `segments.ids_of` or handed on."""
    x, ids = jnp.zeros((2, TOKENS, fitting.d_model)), jnp.ones((2, TOKENS), jnp.int32)
    shape = jax.eval_shape(fitting.mixer, x, Unbroken(ids)).shape
    require(shape == x.shape, f"Outputs have shape {shape} of inputs {x.shape}.")
