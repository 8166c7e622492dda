"""What the compiled programs of generation do: caches in place, memory that no prompt makes larger."""

import jax
import numpy as np
import pytest
from flax import nnx

from based_jax.generate import Decoder, Request
from based_jax.generate.blocks import decoding_loop
from based_jax.generate.intake import _read
from based_jax.generate.prefill import _prefill, prefill
from based_jax.generate.rows import Rows
from based_jax.nn.lm import LM, LMConfig
from tests.helpers.decoding import random_decoder
from tests.helpers.hlo import Program
from tests.helpers.small_mixers import SMALL

BATCH, STEPS = 3, 8
KINDS = ("taylor", "window", "attention", "taylor", "window", "attention")


@pytest.fixture(scope="module")
def decoder():
    layers = tuple((kind, SMALL[kind]) for kind in KINDS)
    config = LMConfig(layers=layers, d_model=16, vocab_size=50, scan_layers=True)
    return Decoder.of(nnx.jit(lambda: LM(config, rngs=nnx.Rngs(1)))())


def test_a_token_copies_no_state(decoder):
    """Stacked layers come apart, and the loop writes the caches that it is given."""
    rows = Rows.of(decoder.init_cache(BATCH, 64), [Request([1])] * BATCH)
    compiled = decoding_loop.lower(decoder.layout, STEPS, decoder.params, rows, np.int32(STEPS)).compile()
    states = [x for x in jax.tree.leaves(rows.caches) if x.ndim > 1]
    assert compiled.memory_analysis().alias_size_in_bytes >= sum(x.nbytes for x in states)
    copies = [
        x.instruction for x in Program(compiled.as_text()).runs if x.fusion is None and x.instruction.kind == "copy"
    ]
    copied = {shape for copy in copies for shape in copy.shapes}
    assert copied and not copied & {x.shape for x in states}


def test_prompts_that_are_read_together_are_read_where_their_caches_are(normal):
    """Memory does not grow with the room of caches, and only those of the rows that read are written."""
    layers = tuple((kind, SMALL[kind]) for kind in ("taylor", "window"))
    decoder = random_decoder(LMConfig(layers, d_model=16, vocab_size=50))
    rows, chunk = np.asarray([1, 3], np.int32), (np.ones((2, 32), np.int32), np.ones((2, 32), np.int32))
    memory = []
    for room in (4096, 64):
        caches = jax.tree.map(lambda x: normal(*x.shape).astype(x.dtype), decoder.init_cache(4, room))
        before = [np.asarray(x) for x in jax.tree.leaves(caches)]
        arguments = decoder.params, caches, rows, np.bool_(False), *chunk
        compiled = _read.lower(decoder.layout, room, *arguments).compile()
        memory.append(compiled.memory_analysis())
    assert memory[0].temp_size_in_bytes == memory[1].temp_size_in_bytes > 0
    assert memory[1].alias_size_in_bytes == sum(x.nbytes for x in before)
    after = [np.asarray(x) for x in jax.tree.leaves(compiled(*arguments))]
    assert all(np.array_equal(x[::2], y[::2]) for x, y in zip(before, after, strict=True))
    assert any((x[row] != y[row]).any() for row in rows for x, y in zip(before, after, strict=True))


def test_prompts_of_any_length_take_the_same_programs_and_memory():
    layers = tuple((kind, SMALL[kind]) for kind in ("taylor", "window"))
    config = LMConfig(layers=layers, d_model=16, vocab_size=50)
    decoder = Decoder.of(nnx.jit(lambda: LM(config, rngs=nnx.Rngs(1)))())
    chunk = np.zeros((BATCH, 32), np.int32)
    memory = [
        _prefill.lower(decoder.layout, decoder.params, decoder.init_cache(BATCH, room), chunk, None)
        .compile()
        .memory_analysis()
        for room in (64, 4096)
    ]
    assert memory[0].temp_size_in_bytes == memory[1].temp_size_in_bytes > 0
    assert memory[0].alias_size_in_bytes == sum(x.nbytes for x in jax.tree.leaves(decoder.init_cache(BATCH, 64)))
    prefill(decoder, decoder.init_cache(1, 64), [np.ones(40, np.int32)], 32)
    programs = _prefill._cache_size()
    prefill(decoder, decoder.init_cache(1, 64), [np.ones(8 * 32 + 7, np.int32)], 32)
    assert _prefill._cache_size() == programs
