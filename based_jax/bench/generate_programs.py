"""What generation by a model runs: blocks of decoded tokens and chunks of prompts, compiled side by side."""

import concurrent.futures
import dataclasses
import functools
import time
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from based_jax import compilation
from based_jax.bench.decode_state import array_bytes, at_length, random_state, random_weights
from based_jax.generate.blocks import Block, decode_within, loop_options
from based_jax.generate.decoder import Caches, Decoder, layout_of
from based_jax.generate.drafts import Drafts
from based_jax.generate.prefill import Chunk, prefill_chunk
from based_jax.generate.requests import Request
from based_jax.generate.rows import Rows
from based_jax.nn.lm_config import LMConfig
from based_jax.ops import dispatch

COMPILING_THREADS = 8


class Subject:
    """A model with random weights, as decoding reads it."""

    def __init__(self, config: LMConfig):
        self.config, self.layout = config, layout_of(config)
        self.abstract = Decoder(self.layout, tuple(jax.tree.leaves(self.layout.shapes)))

    @functools.cached_property
    def decoder(self) -> Decoder:
        """The model with its weights, whose numbers cost the same whatever they are."""
        return Decoder(self.layout, random_weights(self.abstract.params, jax.random.key(0)))

    def caches(self, batch: int, max_len: int) -> Any:
        """Return the shapes of the caches of sequences."""
        model = self.layout.model(self.layout.shapes)
        return jax.eval_shape(lambda: model.init_cache(batch, max_len))

    @property
    def weight_bytes(self) -> int:
        """The bytes of weights that a step reads at least: all but an embedding that is no head."""
        unread = 0 if self.layout.config.tie_embeddings else array_bytes(self.layout.shapes["embed"])
        return array_bytes(self.layout.shapes) - unread


class Lowered(NamedTuple):
    """What a program is compiled from; see `Program`, and the compiler's options."""

    lowered: jax.stages.Lowered
    choices: dict[str, list[str]]
    options: dict[str, str] | None


class Program(NamedTuple):
    """A compiled program.

    Attributes:
      step: the program.
      choices: by operation the implementations that it took.
      seconds: to compile it, beside others.
    """

    step: jax.stages.Compiled
    choices: dict[str, list[str]]
    seconds: float


class Programs:
    """The programs of a model by what they are called with: those with equal arguments are one.

    Attributes:
      was_read: whether one was read from the disk instead of compiled.
    """

    def __init__(self, subject: Subject):
        self.subject = subject
        self._lowered: dict[Hashable, Lowered] = {}
        self._compiled: dict[Hashable, Program] = {}
        self.was_read = False

    def add_block(self, batch: int, max_len: int, tokens: int, drafts: Drafts | None = None) -> Hashable:
        """Add the program that decodes so many tokens of rows, or takes as many steps with drafts; return its key.

        It is `(rows, (params, context)) -> (rows, block)`, where the rows are used up: it begins after `context`
        tokens, whatever the rows have had.
        """
        most = most_drawn(tokens, drafts)

        def block(rows: Rows, inputs: tuple) -> tuple[Rows, Block]:
            params, context = inputs
            return decode_within(Decoder(self.subject.layout, params), _after(rows, context, most), tokens, drafts)

        caches = self.subject.caches(batch, max_len)
        rows = jax.eval_shape(lambda: new_rows(caches, max_len, drafts))
        inputs = self.subject.abstract.params, jax.ShapeDtypeStruct((), jnp.int32)
        return self._add(block, rows, inputs, options=loop_options())

    def add_chunk(self, max_len: int, chunk: Chunk) -> Hashable:
        """Add the program that reads a chunk of prompts, and return its key: `(caches, (params, chunk)) -> caches`."""

        def read(caches: Caches, inputs: tuple) -> Caches:
            params, chunk = inputs
            return prefill_chunk(Decoder(self.subject.layout, params), caches, chunk)

        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), chunk)
        return self._add(read, self.subject.caches(len(chunk[0]), max_len), (self.subject.abstract.params, shapes))

    def compile(self) -> None:
        """Compile what was added, some at a time."""
        with compilation.counted_hits() as hits, concurrent.futures.ThreadPoolExecutor(COMPILING_THREADS) as pool:
            done = pool.map(_compiled, self._lowered.values())
            self._compiled |= dict(zip(self._lowered, done, strict=True))
        self.was_read |= hits.count > 0
        self._lowered.clear()

    def __getitem__(self, key: Hashable) -> Program:
        """Return a program that has been compiled."""
        return self._compiled[key]

    def _add(self, function: Callable, *arguments: Any, options: dict[str, str] | None = None) -> Hashable:
        leaves, structure = jax.tree.flatten(arguments)
        key = function.__name__, structure, tuple((x.shape, x.dtype) for x in leaves)
        if key not in self._lowered:
            with dispatch.recorded_choices() as choices:
                lowered = jax.jit(function, donate_argnums=0).lower(*arguments)
            self._lowered[key] = Lowered(lowered, {name: list(impls) for name, impls in choices.items()}, options)
        return key


def _compiled(given: Lowered) -> Program:
    lowered, choices, options = given
    begin = time.perf_counter()
    step = lowered.compile(options)
    return Program(step, choices, time.perf_counter() - begin)


def most_drawn(steps: int, drafts: Drafts | None) -> int:
    """Return the tokens that so many steps draw at most."""
    return steps if drafts is None else steps * (drafts.method.tokens + 1)


def new_rows(caches: Any, max_len: int, drafts: Drafts | None = None) -> Rows:
    """Return greedy rows with caches of some shapes, filled with numbers that no text has left there."""
    requests = [Request([0])] * jax.tree.leaves(caches)[0].shape[0]
    drafting = None if drafts is None else drafts.begun(requests, max_len)
    return Rows.of(random_state(caches, jax.random.key(1)), requests, drafting)


def _after(rows: Rows, context: Int[Array, ""], left: int) -> Rows:
    """Return rows that have had a context and may draw so many tokens."""
    return dataclasses.replace(
        rows,
        caches=at_length(rows.caches, context),
        length=jnp.full_like(rows.length, context + 1),
        left=jnp.full_like(rows.left, left),
    )
