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
from flax import nnx

from based_jax import compilation, devices
from based_jax.aot.compiling import TOO_MUCH_MEMORY
from based_jax.bench import decode_state, rows, step_profile
from based_jax.bench.generate_size import PREFILLS, UNTIMED_PREFILLS, Effort, Size, check, roofline
from based_jax.bench.memory import peak_bytes, program_bytes
from based_jax.bench.runner import Runner
from based_jax.generate.engine import decode_step
from based_jax.generate.sampling import GREEDY, row_keys
from based_jax.nn.lm import LM
from based_jax.nn.lm_config import LMConfig
from based_jax.ops import dispatch

COMPILING_THREADS = 8
PROFILED_BLOCKS = 1


class Subject:
    """A model with random weights, and what its caches look like."""

    def __init__(self, config: LMConfig):
        self.config = config
        self.abstract, self.layers = map(_abstract, (config, dataclasses.replace(config, scan_layers=False)))
        self.graphdef, self.param_shapes = nnx.split(self.abstract)

    @functools.cached_property
    def params(self) -> nnx.State:
        """The weights."""
        return jax.jit(lambda key: nnx.state(LM(self.config, rngs=nnx.Rngs(key))))(jax.random.key(0))

    def model(self, params: nnx.State) -> LM:
        """Return the model with these weights."""
        return nnx.merge(self.graphdef, params)

    def cache_shapes(self, batch: int, max_len: int) -> Any:
        """Return the shapes of the caches that decoding takes."""
        return jax.eval_shape(lambda: self.abstract.init_cache(batch, max_len))

    def layer_caches(self, batch: int, max_len: int) -> Any:
        """Return the same with layers apart."""
        return jax.eval_shape(lambda: self.layers.init_cache(batch, max_len))

    @property
    def weight_bytes(self) -> int:
        """The bytes of weights that a step reads at least, in the dtype of products; of an embedding only as a head."""
        unread = 0 if self.config.tie_embeddings else self.layers.embed.embedding.size
        return (self.layers.num_params() - unread) * jnp.dtype(self.config.dtype).itemsize


class Block(NamedTuple):
    """A compiled program that decodes a block of tokens.

    Attributes:
      step: `((ids, caches), (params, context)) -> ((ids, caches), new ids)`.
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
    prefill = functools.cache(functools.partial(_prefill, subject))
    for size in sizes:
        row = {**size._asdict(), **_bytes(subject, size, effort.tokens)}
        if size in blocks:
            row |= _fitting(functools.partial(_decoding, subject, blocks[size], size, effort), "error")
            row |= {"compiled_before": was_read}
        else:
            row |= {"error": "weights and state alone are more than the device's memory"}
        if effort.prefill:
            row |= prefill(size.prompts, size.context)
        yield row | rows.facts()


def compiled_blocks(subject: Subject, sizes: Sequence[Size], tokens: int) -> tuple[dict[Size, Block], bool]:
    """Return the program of each size, and whether one was read from the disk; those with equal caches share one."""
    lowered: dict[Any, tuple] = {}
    keys = {}
    for size in sizes:
        caches = subject.cache_shapes(size.batch, size.context + tokens)
        keys[size] = key = tuple((x.shape, x.dtype) for x in jax.tree.leaves(caches))
        if key not in lowered:
            lowered[key] = (*_lowered(subject, size.batch, caches, tokens), caches)
    with compilation.counted_hits() as hits, concurrent.futures.ThreadPoolExecutor(COMPILING_THREADS) as pool:
        done = dict(zip(lowered, pool.map(lambda x: _compiled(*x), lowered.values()), strict=True))
    return {size: done[key] for size, key in keys.items()}, hits.count > 0


def _lowered(subject: Subject, batch: int, caches: Any, tokens: int) -> tuple[jax.stages.Lowered, dict[str, list[str]]]:
    def block(state: tuple, inputs: tuple) -> tuple:
        params, context = inputs
        ids, caches = state
        model, keys = subject.model(params), row_keys(jnp.zeros((batch, 3), jnp.uint32))

        def step(carry: tuple, _: None) -> tuple:
            carry = decode_step(model, *carry, GREEDY, keys)
            return carry, carry[0]

        return jax.lax.scan(step, (ids, decode_state.at_length(caches, context)), None, length=tokens)

    state = jax.ShapeDtypeStruct((batch,), jnp.int32), caches
    inputs = subject.param_shapes, jax.ShapeDtypeStruct((), jnp.int32)
    with dispatch.recorded_choices() as choices:
        lowered = jax.jit(block, donate_argnums=0).lower(state, inputs)
    return lowered, {operation: list(impls) for operation, impls in choices.items()}


def _compiled(lowered: jax.stages.Lowered, choices: dict[str, list[str]], caches: Any) -> Block:
    begin = time.perf_counter()
    step = lowered.compile()
    return Block(step, caches, choices, time.perf_counter() - begin)


def _decoding(subject: Subject, block: Block, size: Size, effort: Effort) -> dict[str, Any]:
    """Return how fast tokens are decoded, and what it takes."""
    fill = jax.jit(functools.partial(decode_state.random_state, block.caches))
    state = jnp.zeros(size.batch, jnp.int32), fill(jax.random.key(1))
    runner = Runner(block.step, state, [(subject.params, jnp.int32(size.context))])
    del state  # lest it is held twice
    seconds = runner.median_seconds(effort.blocks) / effort.tokens
    peak = peak_bytes()
    program = step_profile.program_of(block.step.as_text() or "")
    profiled = step_profile.profile(runner.take, program, PROFILED_BLOCKS, effort.tokens) if effort.profiled else None
    return {
        "tokens": effort.tokens,
        "blocks": effort.blocks,
        "milliseconds": round(1e3 * seconds, 4),
        "tokens_per_second": size.batch / seconds,
        "compile_seconds": round(block.seconds, 2),
        "program_bytes": program_bytes(block.step),
        "peak_bytes": peak,
        "impls": block.choices,
        "breakdown": profiled,
    }


def _bytes(subject: Subject, size: Size, tokens: int) -> dict[str, Any]:
    """Return the bytes of weights and of a sequence's state, and the speed at which they allow to decode."""
    state = decode_state.state_bytes(subject.layer_caches(1, size.context))
    while_decoded = subject.layer_caches(1, size.context + tokens // 2)
    moved = subject.weight_bytes + size.batch * decode_state.moved_bytes(while_decoded)
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
    state = size.batch * decode_state.state_bytes(subject.layer_caches(1, size.context))
    return subject.weight_bytes + state < device.hbm_bytes


def _prefill(subject: Subject, count: int, length: int) -> dict[str, Any]:
    """Return how fast so many prompts of a length are read, up to their first new tokens."""
    return _fitting(functools.partial(_prefilling, subject, count, length), "prefill_error")


def _prefilling(subject: Subject, count: int, length: int) -> dict[str, Any]:
    def read(_: None, inputs: tuple) -> tuple:
        params, ids = inputs
        model = subject.model(params)
        hidden, caches = model.prefill(ids, model.init_cache(count, length))
        return None, (jnp.argmax(model.logits(hidden[:, -1]), axis=-1), caches)

    ids = jax.random.randint(jax.random.key(2), (count, length), 0, subject.config.vocab_size)
    begin = time.perf_counter()
    step = jax.jit(read).lower(None, (subject.params, ids)).compile()
    compile_seconds = time.perf_counter() - begin
    seconds = Runner(step, None, [(subject.params, ids)]).median_seconds(PREFILLS, UNTIMED_PREFILLS)
    return {
        "prefill_rows": count,
        "prefill_milliseconds": round(1e3 * seconds, 3),
        "prefill_tokens_per_second": count * length / seconds,
        "prefill_compile_seconds": round(compile_seconds, 2),
    }


def _fitting(call: Callable[[], dict[str, Any]], name: str) -> dict[str, Any]:
    """Return what a call does, or under `name` that it does not fit into the device's memory."""
    try:
        return call()
    except jax.errors.JaxRuntimeError as error:
        if TOO_MUCH_MEMORY not in str(error):
            raise
        return {name: str(error).splitlines()[0]}


def _abstract(config: LMConfig) -> LM:
    return nnx.eval_shape(lambda: LM(config, rngs=nnx.Rngs(0)))
