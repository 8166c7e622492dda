"""How fast a model of random weights generates: decoding by batch and context, and reading prompts, apart.

Nobody reads the context: the cache is filled with random numbers and says how many tokens it has had, since neither the
cost of a step nor that of a state depends on what they were.
"""

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from based_jax import devices
from based_jax.aot.compiling import TOO_MUCH_MEMORY
from based_jax.bench import clocks, rows, step_profile
from based_jax.bench.decode_state import array_bytes, moved_bytes
from based_jax.bench.generate_programs import Program, Programs, Subject, most_drawn, new_rows
from based_jax.bench.generate_size import PREFILLS, UNTIMED_PREFILLS, Effort, Size, check, prompts, roofline
from based_jax.bench.memory import peak_bytes, program_bytes
from based_jax.bench.runner import Runner
from based_jax.generate.drafts import Drafts
from based_jax.generate.prefill import Chunk, chunk_length, chunks, row_tokens
from based_jax.nn.lm_config import LMConfig

PROFILED_BLOCKS = 1


def measure(config: LMConfig, sizes: Sequence[Size], effort: Effort) -> Iterator[dict[str, Any]]:
    """Yield a row for each size: decoding and reading prompts in tokens/s, bytes of state, the roofline, memory.

    All programs are compiled before the first is timed; of sizes that share one the first is profiled. A size that does
    not fit into the device's memory has "error" in place of what is measured.

    Raises:
      UserError: a number is below 1, or the model reads fewer tokens.
    """
    subject, decoded, read = _compiled(config, sizes, effort)
    profiled = {found.key: found for found in reversed(decoded.values())}.values() if effort.profiled else ()

    @functools.cache
    def prefill(length: int) -> dict[str, Any]:
        return _fitting(functools.partial(read[length].measure, effort.profiled), "prefill_error")

    for size in sizes:
        row = {**size._asdict(), **_bytes(subject, size, effort.tokens)}
        if size in decoded:
            row |= _fitting(functools.partial(decoded[size].measure, decoded[size] in profiled), "error")
            row |= prefill(size.context) if effort.prefill else {}
        else:
            row |= {"error": "weights and state alone are more than the device's memory"}
        yield row | rows.facts()


def compile_programs(config: LMConfig, sizes: Sequence[Size], effort: Effort) -> float:
    """Compile what `measure` runs, and return the seconds that it took; nothing runs.

    A process with the same folder of compiled programs reads them from there.

    Raises:
      UserError: as of `measure`.
    """
    begin = time.perf_counter()
    _compiled(config, sizes, effort)
    return time.perf_counter() - begin


def _compiled(
    config: LMConfig, sizes: Sequence[Size], effort: Effort
) -> tuple[Subject, dict[Size, "_Decoded"], dict[int, "_Prompts"]]:
    """Return a model, what is decoded of the sizes that fit, and the prompts by their length, all compiled."""
    check(sizes, effort)
    subject = Subject(config)
    programs = Programs(subject)
    decoded = {size: _Decoded(programs, size, effort) for size in sizes if _fits(subject, size)}
    counts = prompts(decoded) if effort.prefill else {}
    read = {length: _Prompts(programs, count, length) for length, count in counts.items()}
    programs.compile()
    return subject, decoded, read


class _Decoded:
    """Rows of one size, and the program that decodes them."""

    def __init__(self, programs: Programs, size: Size, effort: Effort):
        self.programs, self.size, self.effort = programs, size, effort
        self.drafts = Drafts.by_lookup(effort.drafts) if effort.drafts else None
        self.room = size.context + most_drawn(effort.tokens, self.drafts)
        self.key = programs.add_block(size.batch, self.room, effort.tokens, self.drafts)

    def measure(self, profiled: bool) -> dict[str, Any]:
        """Return how fast tokens are decoded, and what it takes."""
        subject, program, tokens = self.programs.subject, self.programs[self.key], self.effort.tokens
        state = new_rows(subject.caches(self.size.batch, self.room), self.room, self.drafts)
        runner = Runner(program.step, state, [(subject.decoder.params, jnp.int32(self.size.context))])
        del state  # lest what is used up is held
        with clocks.recorded(jax.devices()[0]) as clock:
            seconds = runner.median_seconds(self.effort.blocks) / tokens
        return {
            "tokens": tokens,
            "blocks": self.effort.blocks,
            "milliseconds": round(1e3 * seconds, 4),
            "tokens_per_second": self.size.batch / seconds,
            **self._of_drafts(seconds),
            **clock,
            "compile_seconds": round(program.seconds, 2),
            "compiled_before": self.programs.was_read,
            "program_bytes": program_bytes(program.step),
            "peak_bytes": peak_bytes(),
            "impls": program.choices,
            "breakdown": _profile(program, runner, tokens) if profiled else None,
        }

    def _of_drafts(self, seconds: float) -> dict[str, Any]:
        """Return what a step of so many seconds verifies, and the tokens/s if all of it is right, where drafts are."""
        if not (count := self.effort.drafts):
            return {}
        return {"drafts": count, "verified_tokens_per_second": self.size.batch * (count + 1) / seconds}


def _profile(program: Program, runner: Runner, tokens: int) -> dict[str, Any] | None:
    text = step_profile.program_of(program.step.as_text() or "")
    return step_profile.profile(runner.take, text, PROFILED_BLOCKS, tokens)


class _Prompts:
    """Prompts of one length that are read together, and the programs that read their chunks."""

    def __init__(self, programs: Programs, count: int, length: int):
        self.programs, self.count, self.length = programs, count, length
        vocab_size = programs.subject.config.vocab_size
        self.ids = list(np.random.default_rng(0).integers(vocab_size, size=(count, length), dtype=np.int32))
        self.keys = [programs.add_chunk(length, chunk) for chunk in self._chunks(self.ids)]

    def measure(self, profiled: bool) -> dict[str, Any]:
        """Return how fast prompts are read into caches, and where the time of their first chunk goes."""
        seconds = Runner(self._read, None, [self.ids]).median_seconds(PREFILLS, UNTIMED_PREFILLS)
        return {
            "prefill_rows": self.count,
            "prefill_milliseconds": round(1e3 * seconds, 3),
            "prefill_tokens_per_second": self.count * self.length / seconds,
            "prefill_compile_seconds": round(sum(self.programs[key].seconds for key in set(self.keys)), 2),
            "prefill_chunk_tokens": next(self._chunks(self.ids))[0].shape[1],
            "prefill_breakdown": self._profile() if profiled else None,
        }

    def _profile(self) -> dict[str, Any] | None:
        decoder, program = self.programs.subject.decoder, self.programs[self.keys[0]]
        caches, chunk = decoder.init_cache(self.count, self.length), next(self._chunks(self.ids))

        def run(times: int) -> None:
            after = caches
            for _ in range(times):
                after = program.step(after, (decoder.params, chunk))
            jax.block_until_ready(after)

        return step_profile.profile(run, step_profile.program_of(program.step.as_text() or ""), PROFILED_BLOCKS)

    def _chunks(self, ids: Sequence[np.ndarray]) -> Iterator[Chunk]:
        return chunks(ids, chunk_length(self.programs.subject.abstract, row_tokens(self.count)))

    def _read(self, _: None, ids: Sequence[np.ndarray]) -> tuple[None, Any]:
        decoder = self.programs.subject.decoder
        caches = decoder.init_cache(self.count, self.length)
        for key, chunk in zip(self.keys, self._chunks(ids), strict=True):
            caches = self.programs[key].step(caches, (decoder.params, chunk))
        return None, caches


def _bytes(subject: Subject, size: Size, tokens: int) -> dict[str, Any]:
    """Return the bytes of weights and of a sequence's state, and the speed at which they allow to decode."""
    while_decoded = subject.caches(1, size.context + tokens // 2)
    moved = subject.weight_bytes + size.batch * moved_bytes(while_decoded)
    return {
        "state_bytes": array_bytes(subject.caches(1, size.context)),
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


def _fitting(call: Callable[[], dict[str, Any]], name: str) -> dict[str, Any]:
    """Return what a call does, or under `name` that it does not fit into the device's memory."""
    try:
        return call()
    except jax.errors.JaxRuntimeError as error:
        if TOO_MUCH_MEMORY not in str(error):
            raise
        return {name: str(error).splitlines()[0]}
