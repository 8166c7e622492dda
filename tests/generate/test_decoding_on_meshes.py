"""Generation on a mesh: what each device computes, keeps and sends."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.cases import parametrize_some
from helpers.decoding import random_decoder
from helpers.hlo import Program

from based_jax import parallel
from based_jax.errors import UserError
from based_jax.generate import PrefixCache, Request, Scheduler
from based_jax.generate.blocks import decoding_loop, verifying_loop
from based_jax.generate.drafts import Drafts
from based_jax.generate.intake import _read
from based_jax.generate.rows import Rows
from based_jax.generate.sampling import MOST_TOP
from based_jax.generate.state_layout import StateLayout
from based_jax.nn.lm_config import LMConfig

BATCH, HEADS, ROOM, STEPS, WIDTH, DRAFTED = 6, 4, 64, 8, 32, 3
OPTIONS = {
    "attention": {"num_heads": HEADS},
    "gla": {"num_heads": HEADS, "expand_k": 1.0, "gate_low_rank_dim": 4},
    "taylor": {"num_heads": HEADS, "feature_dim": 4},
    "window": {"num_heads": HEADS, "window": 32},
}
PARTS = {
    "attention": [(ROOM, 1, 8)] * 2,
    "gla": [(1, 8, 8)],
    "taylor": [(1, 15, 8), (1, 15)],
    "window": [(32, 1, 8)] * 2,
}
"""What a device keeps of the state of each row, one head of four."""


def decoder_of(*kinds):
    return random_decoder(LMConfig(tuple((kind, OPTIONS[kind]) for kind in kinds), d_model=WIDTH, vocab_size=64))


@pytest.fixture
def mesh():
    return parallel.make_mesh({"data": 2, "tensor": 4})


def sent(program, mesh):
    """Return the shapes of what devices send that differ in their place on "data", and on "tensor"."""
    sizes, axes = tuple(mesh.shape.values()), map(mesh.axis_names.index, ("data", "tensor"))
    return [[x.shape for x in program.exchanged(sizes, axis)] for axis in axes]


def between(program, mesh):
    """Return the numbers of elements of the same."""
    return [list(map(math.prod, shapes)) for shapes in sent(program, mesh)]


@parametrize_some("kind", OPTIONS, ordinary=("gla",))
def test_each_device_decodes_its_rows_and_heads_and_sends_no_state(kind, mesh):
    decoder = decoder_of(kind).over(mesh)
    with jax.set_mesh(mesh):
        rows = Rows.of(decoder.init_cache(BATCH, ROOM), [Request([1])] * BATCH)
        program = Program(
            decoding_loop.lower(decoder.layout, STEPS, decoder.params, rows, np.int32(STEPS)).compile().as_text()
        )
    parts = [(BATCH // 2, *part) for part in PARTS[kind]]
    drawn = [(STEPS, BATCH // 2, MOST_TOP)] * 2
    carried = [shape for shape in program.carried() if len(shape) > 2]
    assert [shape for shape in carried if shape[0] != WIDTH] == parts + drawn  # beside kernels, ordered once
    over_data, over_tensor = between(program, mesh)
    assert max(over_data) <= STEPS * BATCH * MOST_TOP  # the tokens that were drawn
    assert max(over_tensor) <= BATCH // 2 * 32 < max(map(math.prod, parts))  # activations


@parametrize_some("by", ["lookup", "model"], ordinary=("lookup",))
@parametrize_some("kind", OPTIONS, ordinary=("taylor",))
def test_each_device_verifies_drafts_of_its_rows_by_its_heads_and_sends_no_state(kind, by, mesh):
    """The caches of a model that drafts lie as those of the model that verifies."""
    decoder = decoder_of(kind).over(mesh)
    drafts = Drafts.by_lookup(DRAFTED) if by == "lookup" else Drafts.by_model(decoder, DRAFTED)
    with jax.set_mesh(mesh):
        arguments = decoder.params, drafts.params, Rows.stopped(decoder, BATCH, ROOM, drafts), np.int32(STEPS)
        lowered = verifying_loop.lower(decoder.layout, drafts.method, STEPS, *arguments)
        program = Program(lowered.compile().as_text())
    rows, most = BATCH // 2, STEPS * (DRAFTED + 1)
    states = {(rows, *part) for part in PARTS[kind]}
    of_rows = [shape for shape in program.carried() if len(shape) > 2 and shape[0] in (rows, BATCH)]
    assert {*of_rows} == states | {(rows, most, MOST_TOP)}
    assert all(of_rows.count(shape) >= (1 if by == "lookup" else 2) for shape in states)
    over_data, over_tensor = sent(program, mesh)
    assert {x for x in over_data if len(x) > 1 and x != (rows, 2)} == {(BATCH, most), (BATCH, most, MOST_TOP)}
    assert not states & {*over_tensor}
    activations = [math.prod(shape) for shape in over_tensor if shape[:1] != (WIDTH,)]  # beside kernels, ordered once
    assert max(activations) == rows * (DRAFTED + 1) * WIDTH


@parametrize_some("kind", [*OPTIONS, "conv", "deltanet", "mamba"], ordinary=("conv",))
def test_tokens_one_by_one_and_several_on_trial_are_those_of_one_device(kind, mesh, rng, close):
    """Of several, as of drafts, the first two are kept, and the third is read again."""
    layers = ((kind, OPTIONS.get(kind, {})),) * 2
    config = LMConfig(layers, d_model=WIDTH, vocab_size=64, dtype="float32")
    decoder, ids = random_decoder(config), rng.integers(64, size=(BATCH, 3), dtype=np.int32)

    def read(params, ids):
        model = decoder.layout.model(params)
        steps, caches = [], model.init_cache(BATCH, ROOM)
        for t in range(3):
            hidden, caches = model.step(ids[:, t], caches)
            steps.append(hidden)
        tried, trials = model.try_tokens(ids, model.init_cache(BATCH, ROOM))
        last, _ = model.step(ids[:, 2], model.keep(trials, jnp.full(BATCH, 2)))
        return jnp.stack(steps, axis=1), tried, last

    alone, _, _ = jax.jit(read)(decoder.params, ids)
    divided = decoder.over(mesh).params
    with jax.set_mesh(mesh):
        steps, tried, last = jax.jit(read)(divided, ids)
    close(steps, alone)
    close(tried, alone)
    close(last, alone[:, 2])


@pytest.mark.long
@pytest.mark.parametrize("kind", OPTIONS)
def test_of_prompts_that_are_read_their_own_states_are_sent_and_no_others(kind, mesh):
    """Two rows of eight change devices where they are on another one, each its own heads alone."""
    decoder, count = decoder_of(kind).over(mesh), 2
    with jax.set_mesh(mesh):
        caches = decoder.init_cache(8, ROOM)
        chunk = np.ones((count, 16), np.int32)
        arguments = decoder.params, caches, np.asarray([0, 7], np.int32), np.bool_(False), chunk, chunk
        heads = jax.jit(lambda *x: _read(decoder.layout, ROOM, *x)).lower(*arguments).compile().output_shardings
        arguments = decoder.params, jax.device_put(caches, heads), *arguments[2:]
        program = Program(_read.lower(decoder.layout, ROOM, *arguments).compile().as_text())
    largest = max(map(math.prod, PARTS[kind]))
    over_data, over_tensor = between(program, mesh)
    assert largest <= max(over_data) <= count * largest
    assert max(over_tensor) <= count * 16 * 32  # activations


def test_a_state_is_taken_from_one_device_and_goes_on_on_another(mesh, normal):
    decoder = decoder_of("taylor", "attention")
    layout, rows = StateLayout(decoder), jax.NamedSharding(mesh, jax.P("data"))
    caches = jax.tree.map(lambda x: jax.device_put(normal(*x.shape).astype(x.dtype), rows), decoder.init_cache(4, ROOM))
    before = jax.tree.map(np.asarray, caches)
    with jax.set_mesh(mesh):
        after = jax.tree.map(np.asarray, layout.put(caches, 0, layout.take(caches, ROOM, row=3)))
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(new, old[[3, 1, 2, 3]])


def answered(decoder, prompts, cache):
    """Return the tokens of each prompt, asked one after the other."""
    scheduler = Scheduler(decoder, slots=2, max_len=ROOM, chunk_tokens=32, block_tokens=3, prefix_cache=cache)
    tokens = []
    for ids in prompts:
        scheduler.submit(Request(ids, 4))
        tokens.append([])
        while scheduler.busy:
            tokens[-1] += [token for event in scheduler.advance() for token in event.tokens]
    return tokens


@pytest.mark.long
def test_states_of_prompts_are_kept_and_found_on_a_mesh(mesh, rng):
    """As on one device, also where the row that goes on from a state is another device's than the row it is of."""
    decoder, first = decoder_of("taylor", "window"), rng.integers(0, 64, 40, np.int32)
    prompts = [first, first, np.append(first[:33], first[:9])]
    alone = answered(decoder, prompts, PrefixCache(10**7))
    cache = PrefixCache(10**7)
    assert answered(decoder.over(mesh), prompts, cache) == alone
    assert cache.metrics.tokens_restored == 39 + 32


@pytest.mark.parametrize(
    "sizes, sentence",
    [
        ({"fsdp": 2}, "^Mesh axis 'fsdp' has 2 devices; a model decodes over 'data' and 'tensor' alone\\.$"),
        ({"tensor": 8}, "^num_heads of .* is 4, which cannot be divided over 8 devices of the mesh axis tensor"),
    ],
)
def test_what_decoding_cannot_divide_is_refused(sizes, sentence):
    mesh = parallel.make_mesh(sizes, jax.devices()[: math.prod(sizes.values())])
    with pytest.raises(UserError, match=sentence):
        decoder_of("taylor").over(mesh)
