"""How fast a model of random weights generates: decoding by batch and context, and reading prompts, apart.

Nobody reads the context: the cache is filled with random numbers and says how many tokens it has had, since neither the
cost of a step nor that of a state depends on what they were.
"""

import concurrent.futures
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int

from based_jax import compilation, devices
from based_jax.aot.compiling import TOO_MUCH_MEMORY
from based_jax.bench import clocks, rows, step_profile
from based_jax.bench.decode_state import array_bytes, at_length, moved_bytes, random_state
from based_jax.bench.generate_size import PREFILLS, UNTIMED_PREFILLS, Effort, Size, check, roofline
from based_jax.bench.memory import peak_bytes, program_bytes
from based_jax.bench.runner import Runner
from based_jax.generate.decoder import Decoder, layout_of
from based_jax.generate.prefill import prefill
from based_jax.generate.requests import Request
from based_jax.generate.rows import Block, Rows, decode, loop_options
from based_jax.nn.lm import LM
from based_jax.nn.lm_config import LMConfig
from based_jax.ops import dispatch

COMPILING_THREADS = 8
PROFILED_BLOCKS = 1


class Subject:
    """A model with random weights, as decoding reads it."""

    def __init__(self, config: LMConfig):
        self.config, self.layout = config, layout_of(config)
        self.abstract = self.layout.model(self.layout.shapes)

    @functools.cached_property
    def decoder(self) -> Decoder:
        """The model with its weights."""
        graphdef, _ = nnx.split(nnx.eval_shape(lambda: LM(self.config, rngs=nnx.Rngs(0))))
        params = jax.jit(lambda key: nnx.state(LM(self.config, rngs=nnx.Rngs(key))))(jax.random.key(0))
        return Decoder.of(nnx.merge(graphdef, params))

    def caches(self, batch: int, max_len: int) -> Any:
        """Return the shapes of the caches of sequences."""
        return jax.eval_shape(lambda: self.abstract.init_cache(batch, max_len))

    @property
    def weight_bytes(self) -> int:
        """The bytes of weights that a step reads at least: all but an embedding that is no head."""
        unread = 0 if self.layout.config.tie_embeddings else array_bytes(self.layout.shapes["embed"])
        return array_bytes(self.layout.shapes) - unread


class BlockProgram(NamedTuple):
    """A compiled program that decodes a block of tokens.

    Attributes:
      step: `(rows, (params, context)) -> (rows, block)`; the rows are used up, and had `context` tokens before it.
      caches: their shapes.
      choices: by operation the implementations that it took.
      seconds: to compile it, beside others.
    """

    step: jax.stages.Compiled
    caches: Any
    choices: dict[str, list[str]]
    seconds: float


def measure(config: LMConfig, sizes: Sequence[Size], effort: Effort) -> Iterator[dict[str, Any]]:
    """Yield a row for each size: decoding and reading prompts in tokens/s, bytes of state, the roofline, memory.

    All programs are compiled before the first is timed. A size that does not fit into the device's memory has "error"
    in place of what is measured.

    Raises:
      UserError: a number is below 1, or the model reads fewer tokens.
    """
    check(sizes, effort)
    subject = Subject(config)
    fitting = [size for size in sizes if _fits(subject, size)]
    blocks, was_read = compiled_blocks(subject, fitting, effort.tokens)
    read = functools.cache(functools.partial(_prefill, subject))
    for size in sizes:
        row = {**size._asdict(), **_bytes(subject, size, effort.tokens)}
        if size in blocks:
            row |= _fitting(functools.partial(_decoding, subject, blocks[size], size, effort), "error")
            row |= {"compiled_before": was_read}
        else:
            row |= {"error": "weights and state alone are more than the device's memory"}
        if effort.prefill:
            row |= read(size.prompts, size.context)
        yield row | rows.facts()


def compiled_blocks(subject: Subject, sizes: Sequence[Size], tokens: int) -> tuple[dict[Size, BlockProgram], bool]:
    """Return the program of each size, and whether one was read from the disk; those with equal caches share one."""
    lowered: dict[Any, tuple] = {}
    keys = {}
    for size in sizes:
        caches = subject.caches(size.batch, size.context + tokens)
        keys[size] = key = tuple((x.shape, x.dtype) for x in jax.tree.leaves(caches))
        if key not in lowered:
            lowered[key] = (*_lowered(subject, size.batch, caches, tokens), caches)
    with compilation.counted_hits() as hits, concurrent.futures.ThreadPoolExecutor(COMPILING_THREADS) as pool:
        done = dict(zip(lowered, pool.map(lambda x: _compiled(*x), lowered.values()), strict=True))
    return {size: done[key] for size, key in keys.items()}, hits.count > 0


def _lowered(subject: Subject, batch: int, caches: Any, tokens: int) -> tuple[jax.stages.Lowered, dict[str, list[str]]]:
    def block(rows: Rows, inputs: tuple) -> tuple[Rows, Block]:
        params, context = inputs
        return decode(Decoder(subject.layout, params), _after(rows, context, tokens), tokens)

    rows = jax.eval_shape(lambda: _rows(caches, batch))
    inputs = subject.layout.shapes, jax.ShapeDtypeStruct((), jnp.int32)
    with dispatch.recorded_choices() as choices:
        lowered = jax.jit(block, donate_argnums=0).lower(rows, inputs)
    return lowered, {operation: list(impls) for operation, impls in choices.items()}


def _rows(caches: Any, batch: int) -> Rows:
    """Return greedy rows with caches of some shapes that nobody has read a token into."""
    return Rows.of(random_state(caches, jax.random.key(1)), [Request([0])] * batch)


def _after(rows: Rows, context: Int[Array, ""], left: int) -> Rows:
    """Return rows that have had a context and may draw so many tokens."""
    return dataclasses.replace(
        rows,
        caches=at_length(rows.caches, context),
        length=jnp.full_like(rows.length, context + 1),
        left=jnp.full_like(rows.left, left),
    )


def _compiled(lowered: jax.stages.Lowered, choices: dict[str, list[str]], caches: Any) -> BlockProgram:
    begin = time.perf_counter()
    step = lowered.compile(loop_options(jax.default_backend()))
    return BlockProgram(step, caches, choices, time.perf_counter() - begin)


def _decoding(subject: Subject, block: BlockProgram, size: Size, effort: Effort) -> dict[str, Any]:
    """Return how fast tokens are decoded, and what it takes."""
    inputs = subject.decoder.params, jnp.int32(size.context)
    runner = Runner(block.step, jax.jit(lambda: _rows(block.caches, size.batch))(), [inputs])
    with clocks.recorded(jax.devices()[0]) as clock:
        seconds = runner.median_seconds(effort.blocks) / effort.tokens
    peak = peak_bytes()
    program = step_profile.program_of(block.step.as_text() or "")
    profiled = step_profile.profile(runner.take, program, PROFILED_BLOCKS, effort.tokens) if effort.profiled else None
    return {
        "tokens": effort.tokens,
        "blocks": effort.blocks,
        "milliseconds": round(1e3 * seconds, 4),
        "tokens_per_second": size.batch / seconds,
        **clock,
        "compile_seconds": round(block.seconds, 2),
        "program_bytes": program_bytes(block.step),
        "peak_bytes": peak,
        "impls": block.choices,
        "breakdown": profiled,
    }


def _bytes(subject: Subject, size: Size, tokens: int) -> dict[str, Any]:
    """Return the bytes of weights and of a sequence's state, and the speed at which they allow to decode."""
    state = array_bytes(subject.caches(1, size.context))
    while_decoded = subject.caches(1, size.context + tokens // 2)
    moved = subject.weight_bytes + size.batch * moved_bytes(while_decoded)
    return {
        "state_bytes": state,
        "weight_bytes": subject.weight_bytes,
        "roofline_tokens_per_second": roofline(moved, size.batch, jax.devices()[0].device_kind),
        "cache": "random numbers",
    }


def _fits(subject: Subject, size: Size) -> bool:
    """Return whether weights and state fit into the device's memory, as far as it is known."""
    device = devices.find(jax.devices()[0].device_kind)
    if device is None or device.hbm_bytes is None:
        return True
    state = size.batch * array_bytes(subject.caches(1, size.context))
    return subject.weight_bytes + state < device.hbm_bytes


def _prefill(subject: Subject, count: int, length: int) -> dict[str, Any]:
    """Return how fast so many prompts of a length are read, up to their first new tokens."""
    return _fitting(functools.partial(_prefilling, subject, count, length), "prefill_error")


def _prefilling(subject: Subject, count: int, length: int) -> dict[str, Any]:
    decoder = subject.decoder
    prompts = np.random.default_rng(0).integers(subject.config.vocab_size, size=(count, length), dtype=np.int32)

    def read(_: None, prompts: Any) -> tuple:
        return None, prefill(decoder, decoder.init_cache(count, length), prompts)

    begin = time.perf_counter()
    jax.block_until_ready(read(None, prompts))
    first = time.perf_counter() - begin
    seconds = Runner(read, None, [prompts]).median_seconds(PREFILLS, UNTIMED_PREFILLS)
    return {
        "prefill_rows": count,
        "prefill_milliseconds": round(1e3 * seconds, 3),
        "prefill_tokens_per_second": count * length / seconds,
        "prefill_compile_seconds": round(max(0.0, first - seconds), 2),
    }


def _fitting(call: Callable[[], dict[str, Any]], name: str) -> dict[str, Any]:
    """Return what a call does, or under `name` that it does not fit into the device's memory."""
    try:
        return call()
    except jax.errors.JaxRuntimeError as error:
        if TOO_MUCH_MEMORY not in str(error):
            raise
        return {name: str(error).splitlines()[0]}
