"""RWKV-4's average of values on Hopper: the forward pass (see `ops/wkv4.py`).

    y_t = (e^m_t a_t + e^{u + k_t} v_t) / (e^m_t b_t + e^{u + k_t})
    e^m_{t+1} a_{t+1} = e^{m_t + d} a_t + e^k_t v_t        e^m_{t+1} b_{t+1} = e^{m_t + d} b_t + e^k_t

A lane has one channel, whose state (a, b, m) stays in its registers, and walks over the tokens in tiles (`strips.py`)
without a loop within one, so that few steps wait for others: m alone goes from token to token in two operations.
Of two weights over the larger, one is 1 and takes no exponential.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import split
from pallas_kernels.hopper import stream, strips
from pallas_kernels.hopper.mosaic import WARPS, like, load_global, save

TILE_TOKENS = 16
"""Of a tile; T is a multiple of them."""
RING_SLOTS = 6
BEGINS, PADDING = 1, 2
"""Marks of tokens: the first of a document that is not its row's first, and padding; 0 are others."""
FORGET, HIDE = -1e38, -3e38
"""Exponents: added to that of a state that is left behind, and that of the key of padding, which is below all."""
SMALLEST = 1e-37
"""Of a divisor, where padding stands behind no token."""

LAYOUT = plgpu.Layout.WG_STRIDED((WARPS, strips.WARP_CHANNELS), vec_size=1)
"""The layout of a block's channels."""


@functools.partial(jax.jit, static_argnames="with_starts")
def forward(k, v, decay, bonus, state, marks=None, *, with_starts: bool):
    """Return y like v, the state after the last token and, where asked for, those before every tile.

    Args:
      k, v: (B, T, D), each bf16 or fp32; T is a multiple of 16, D of 128.
      decay: log-decays (D,) fp32.
      bonus: (D,) fp32.
      state: (a, b, m) before the first token, (B, 3, D) fp32.
      marks: (B, T) int32, or None where all are 0.
    """
    plan, channels = strips.Plan.of(k, TILE_TOKENS), [strips.by_warps(x) for x in (decay, bonus, state)]
    sources = [strips.by_warps(k), strips.by_warps(v), *([] if marks is None else [marks])]
    starts = [strips.per_strip(plan, plan.tiles, 3)] if with_starts else []

    def body(*refs):
        source_refs, (decay_ref, bonus_ref, state_ref, y_ref, last_ref), refs = split(refs, len(sources), 5)
        starts_refs, tiles, [filled] = split(refs, len(starts), len(sources))
        k_tile, v_tile, *mark_tiles = tiles
        at = plan.here()

        def fetch(n, slot):
            strips.copy_tokens(at, source_refs, tiles, filled, n, slot)

        ring = stream.Ring(plan.tiles, RING_SLOTS, filled, fetch)
        rates = Rates.load(decay_ref, bonus_ref, at)

        def step(n, slot, state):
            for ref in starts_refs:
                state.save(ref.at[at.row, n], at)
            outputs = []
            for token in load_tokens(slot, k_tile, v_tile, mark_tiles):
                state = token.entered(state)
                outputs.append(token.shown(Read.of(token, state, rates).y))
                state = token.left(state, rates)
            for i, y in enumerate(outputs):
                save(v_tile.at[slot, i], y)
            return state

        def put(n, slot):
            strips.copy_results(at, [v_tile], [y_ref], n, slot)

        ring.walk(step, put, State.load(state_ref.at[at.row], at)).save(last_ref.at[at.row], at)

    out_type = [like(sources[1]), strips.per_strip(plan, 3), *starts]
    kernel = stream.kernel(body, "wkv4_forward", plan.blocks, out_type, plan.scratch(sources, RING_SLOTS))
    y, last, *starts = kernel(*sources, *channels)
    return [y.reshape(v.shape), last.reshape(state.shape), *starts]


class Rates(NamedTuple):
    """Log-decay and bonus of each channel."""

    decay: jax.Array
    bonus: jax.Array

    @classmethod
    def load(cls, decay_ref, bonus_ref, at: strips.Place) -> "Rates":
        """Load those of a block's channels."""
        return cls(*(load_global(ref.at[at.strip], LAYOUT) for ref in (decay_ref, bonus_ref)))


class State(NamedTuple):
    """Numerator and denominator over e^top, and top."""

    num: jax.Array
    den: jax.Array
    top: jax.Array

    @classmethod
    def load(cls, ref, at: strips.Place) -> "State":
        """Load a block's part of (3, D / W, W)."""
        return cls(*(load_global(ref.at[i, at.strip], LAYOUT) for i in range(3)))

    def save(self, ref, at: strips.Place) -> None:
        """Undo `load`."""
        for i, x in enumerate(self):
            save(ref.at[i, at.strip], x)


class Token(NamedTuple):
    """A token's key and value, and its mark, None where none are given."""

    k: jax.Array
    v: jax.Array
    mark: jax.Array | None

    @classmethod
    def of(cls, k, v, mark) -> "Token":
        """Return the token; padding has a key below all and no value."""
        token = cls(k, v, mark)
        return cls(token.shown(k, HIDE), token.shown(v), mark)

    @property
    def forgets(self):
        """What is added to the exponents of all that passes from before the token to it."""
        return 0.0 if self.mark is None else jnp.where(self.mark == BEGINS, FORGET, 0.0)

    def shown(self, x, nothing: float = 0.0) -> jax.Array:
        """Return x, or `nothing` at padding."""
        return x if self.mark is None else jnp.where(lax.broadcast(self.mark == PADDING, x.shape), nothing, x)

    def passes(self, rates: Rates) -> jax.Array:
        """Return the log-decay over the token, none over padding."""
        return self.shown(rates.decay)

    def entered(self, state: State) -> State:
        """Return the state that the token reads."""
        return state if self.mark is None else state._replace(top=state.top + self.forgets)

    def left(self, state: State, rates: Rates) -> State:
        """Return the state with the token."""
        decayed = state.top + self.passes(rates)
        past, now = shares(decayed, self.k)
        return State(past * state.num + now * self.v, past * state.den + now, jnp.maximum(decayed, self.k))


class Read(NamedTuple):
    """What a token reads: its average, its own share and 1 / (the sum of weights), both over e^top, and top."""

    y: jax.Array
    own: jax.Array
    inverse: jax.Array
    top: jax.Array

    @classmethod
    def of(cls, token: Token, state: State, rates: Rates) -> "Read":
        """Return the average of a state and the token itself."""
        own = token.k + rates.bonus
        past, now = shares(state.top, own)
        total = past * state.den + now
        inverse = 1.0 / (total if token.mark is None else jnp.maximum(total, SMALLEST))
        return cls((past * state.num + now * token.v) * inverse, now, inverse, jnp.maximum(state.top, own))


def shares(first, second) -> tuple[jax.Array, jax.Array]:
    """Return e^first and e^second over the larger of them."""
    less = jnp.exp(-jnp.abs(first - second))
    return jnp.where(first >= second, 1.0, less), jnp.where(first >= second, less, 1.0)


def load_tokens(slot, k_tile, v_tile, mark_tiles) -> list[Token]:
    """Load the tokens of a tile."""
    tokens = range(TILE_TOKENS)
    k, v = ([load_channels(tile.at[slot, i]) for i in tokens] for tile in (k_tile, v_tile))
    marks = [mark_tiles[0][slot, i] for i in tokens] if mark_tiles else [None] * TILE_TOKENS
    return [Token.of(*values) for values in zip(k, v, marks, strict=True)]


def load_channels(ref) -> jax.Array:
    """Load one value per channel from shared memory, in fp32.

    The layout is that of what it meets: each one that is named makes Mosaic search for the others once more.
    """
    return plgpu.load(ref, optimized=False).astype(jnp.float32)
