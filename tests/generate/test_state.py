import dataclasses
import json
import math
import types

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from helpers.decoding import random_decoder
from safetensors.numpy import load_file, save_file

from based_jax.errors import UserError
from based_jax.generate.decoder import Decoder
from based_jax.generate.fingerprint import fingerprint
from based_jax.generate.state import FORMAT, State, inspect
from based_jax.generate.state_layout import TOKEN_BLOCK, StateLayout, state_after
from based_jax.nn.lm import LMConfig

VOCAB, ROOM, LENGTH, READ = 50, 100, 70, 90
LAYERS = (
    ("taylor", {"num_heads": 2, "feature_dim": 4}),
    ("window", {"num_heads": 2, "window": 4}),
    ("attention", {"num_heads": 2}),
)
CONFIG = LMConfig(layers=LAYERS, d_model=16, vocab_size=VOCAB, dtype="float32")

prefill = jax.jit(lambda model, ids, cache: model.prefill(ids, cache))
step = jax.jit(lambda model, ids, cache: model.step(ids, cache), donate_argnames="cache")


@pytest.fixture(scope="module")
def decoder():
    return random_decoder(CONFIG)


@pytest.fixture(scope="module")
def model(decoder):
    return decoder.layout.model(decoder.params)


@pytest.fixture(scope="module")
def layout(decoder):
    return StateLayout(decoder)


@pytest.fixture(scope="module")
def ids():
    return np.random.default_rng(0).integers(0, VOCAB, (2, READ)).astype(np.int32)


@pytest.fixture(scope="module")
def cache(model, ids):
    """Return the caches of two rows after `LENGTH` tokens."""
    return prefill(model, ids[:, :LENGTH], model.init_cache(2, ROOM))[1]


@pytest.fixture(scope="module")
def state(layout, cache):
    """Return the state of the second row."""
    return layout.take(cache, LENGTH, row=1)


def steps(model, tokens, cache):
    """Return the hidden states of tokens (T) that the one row of a cache reads on."""
    hidden = []
    for token in tokens:
        y, cache = step(model, jnp.asarray([token]), cache)
        hidden.append(y[0])
    return np.stack(hidden)


def test_a_state_goes_on_in_any_room_and_its_forks_are_their_own(model, layout, ids, cache, state, close):
    first, second = layout.fork(state, ROOM), layout.fork(state, ROOM, rows=2)
    jax.tree.map(lambda fork, x: np.testing.assert_array_equal(fork, np.asarray(x)[[1]]), first, cache)
    jax.tree.map(lambda fork, x: np.testing.assert_array_equal(fork, np.asarray(x)[[1, 1]]), second, cache)
    in_room = steps(model, ids[1, LENGTH:], first)
    assert all(x.is_deleted() for x in jax.tree.leaves(first))  # they were donated, which the state does not feel
    np.testing.assert_array_equal(in_room, steps(model, ids[1, LENGTH:], layout.fork(state, ROOM)))
    close(steps(model, ids[1, LENGTH:], layout.fork(state, 2 * ROOM)), in_room)


def test_a_state_holds_blocks_of_the_tokens_read_and_not_the_room(model, layout, cache, state):
    """The same arrays of a cache with more room, and what they say of each layer."""
    assert {x.shape for name, x in state.arrays.items() if "layers/2/state/tokens" in name} == {(ROOM, 2, 8)}
    roomy = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), jax.eval_shape(lambda: model.init_cache(2, 4 * ROOM)))
    assert layout.take(roomy, LENGTH).layer(2)["state/tokens/0"].shape == (2 * TOKEN_BLOCK, 2, 8)
    rows = inspect(state)
    assert [row.mixer for row in rows] == [kind for kind, _ in LAYERS]
    mixers = model.mixers()
    bookkeeping = [1, 2, 2]  # the id of the document, and the tokens that a cache of tokens has had
    sizes = [mixer.state_size(ROOM) + extra for mixer, extra in zip(mixers, bookkeeping, strict=True)]
    assert [row.elements for row in rows] == sizes
    assert [row.bytes for row in rows] == [4 * size for size in sizes]
    assert state.nbytes == sum(row.bytes for row in rows)
    sums = [np.asarray(x[1], np.float64) for x in jax.tree.leaves(cache[0][0].state)]
    assert math.isclose(rows[0].norm, math.hypot(*map(np.linalg.norm, sums)), rel_tol=1e-12)


def test_a_state_is_refused_where_there_is_no_room_or_another_model(layout, state):
    with pytest.raises(
        UserError, match=r"^The state has read 70 tokens, and 'layers/2/state/tokens/0' has room for 69"
    ):
        layout.fork(state, LENGTH - 1)
    other = random_decoder(CONFIG)
    params = other.layout.state(other.params)
    kernel = params["stacks"][2]["blocks"][0]["mixer"]["out_proj"]["kernel"]
    kernel.set_value(kernel[...].at[3, 5].multiply(1 + 2**-23))
    other = Decoder(other.layout, tuple(jax.tree.leaves(params)))
    with pytest.raises(UserError, match=r"^The state is of model [0-9a-f]{32}; this model is [0-9a-f]{32}, with"):
        StateLayout(other).fork(state, ROOM)


@pytest.mark.parametrize("ids", [[-4], [10**6], [1.5], "ab"])
def test_a_text_of_what_are_no_ids_has_no_state(layout, ids):
    with pytest.raises(UserError, match=r"^The text (has|is) "):
        state_after(layout.decoder, ids)


@pytest.mark.parametrize(
    ("stacks", "message"),
    [
        (
            (0, 1, 1),
            r"^'layers/2/state/tokens/0' of the state is float32\[100, 2, 8\]; the cache's is float32\[4, 2",
        ),
        ((0, 1), r"^'layers/2/segment_id' is not both in the state and in the model's caches, whose options differ"),
    ],
    ids=["other shapes", "other arrays"],
)
def test_caches_with_other_options_are_refused(model, layout, state, stacks, message):
    def init_cache(rows, max_len):
        return tuple(model.stacks[stack].init_cache(rows, max_len) for stack in stacks)

    def row_shapes(max_len):
        return jax.eval_shape(lambda: jax.tree.map(lambda x: x[0], init_cache(1, max_len)))

    decoder = layout.decoder
    facts = {"config": decoder.config, "fingerprint": decoder.fingerprint}
    like = types.SimpleNamespace(init_cache=init_cache, row_shapes=row_shapes, **facts)
    with pytest.raises(UserError, match=message):
        StateLayout(like).fork(state, ROOM)


def test_a_fingerprint_is_of_what_is_read_and_of_nothing_else(layout):
    config, params = layout.decoder.config, layout.decoder.layout.state(layout.decoder.params)
    name = layout.decoder.fingerprint
    assert fingerprint(dataclasses.replace(config, init_std=0.1, remat="full"), params) == name
    assert fingerprint(dataclasses.replace(config, dtype="bfloat16"), params) != name
    assert fingerprint(config, jax.tree.map(lambda x: x[::-1], params)) != name


def awkward_state():
    """Return a state with every bit pattern of 8 and 16 bits, NaNs of all kinds and scalars."""
    halves = np.arange(2**16, dtype=np.uint16)
    arrays = {
        "layers/0/bf16": halves.view(ml_dtypes.bfloat16).reshape(2, -1),
        "layers/0/fp8": np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn),
        "layers/0/fp32": np.array([0.0, -0.0, np.inf, np.nan], np.float32).view(np.uint32).view(np.float32),
        "layers/1/int8": np.arange(-128, 128, dtype=np.int8),
        "layers/1/length": np.array(7, np.int32),
    }
    return State(arrays, ("taylor", "window"), 7, "of a test")


def test_every_bit_comes_back_from_a_file(tmp_path):
    file, state = tmp_path / "folder" / "state.safetensors", awkward_state()
    state.save(file)
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    loaded = State.load(file)
    assert loaded == state
    assert {name: x.dtype for name, x in loaded.arrays.items()} == {name: x.dtype for name, x in state.arrays.items()}
    negative = state.arrays["layers/0/fp32"].copy()
    negative[0] = -0.0
    assert dataclasses.replace(state, arrays=state.arrays | {"layers/0/fp32": negative}) != state
    assert dataclasses.replace(state, length=8) != state


def test_a_file_that_is_damaged_anywhere_is_one_sentence(tmp_path, rng):
    file, damaged = tmp_path / "state.safetensors", tmp_path / "damaged.safetensors"
    awkward_state().save(file)
    whole = file.read_bytes()
    header = int.from_bytes(whole[:8], "little")
    places = [0, 3, *rng.integers(8, 8 + header, 40), *rng.integers(8 + header, len(whole), 10), len(whole) - 1]
    contents = [whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :] for place in places]
    contents += [whole[:length] for length in (0, 7, 200, 8 + header, len(whole) - 1)]
    for content in contents:
        damaged.write_bytes(content)
        with pytest.raises(UserError, match=r"^'[^\n]*damaged.safetensors' [^\n]*\.$"):
            State.load(damaged)


def test_what_is_no_state_is_one_sentence(tmp_path):
    file = tmp_path / "file"
    with pytest.raises(UserError, match=r"file' cannot be read as a state: No such file or directory\.$"):
        State.load(file)
    with pytest.raises(UserError, match=r"cannot be read as a state: Is a directory\.$"):
        State.load(tmp_path)
    save_file({"a": np.zeros(2)}, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"file' is no state of a sequence; `generate --save-state` writes one\.$"):
        State.load(file)
    awkward_state().save(tmp_path / "state")
    with pytest.raises(UserError, match=r"state' is not empty; name a new one\.$"):
        awkward_state().save(tmp_path / "state")
    for metadata in ("[]", "null", "{", json.dumps({"version": 2}), json.dumps({"version": 1})):
        save_file(load_file(tmp_path / "state"), file, {FORMAT: metadata})
        with pytest.raises(UserError, match=r"^'[^\n]*file' [^\n]*\.$"):
            State.load(file)


@pytest.mark.long
@pytest.mark.parametrize("policy", ["window", "streaming", "h2o", "roco"])
@pytest.mark.parametrize("read", [20, 50])
def test_a_cache_of_a_policy_goes_on_bitwise_before_and_after_it_is_full(policy, read, ids):
    layer = ("attention", {"num_heads": 2, "cache_policy": policy, "cache_budget": 32})
    config = dataclasses.replace(CONFIG, layers=(layer,))
    decoder = random_decoder(config)
    model, layout = decoder.layout.model(decoder.params), StateLayout(decoder)
    cache = prefill(model, ids[:1, :read], model.init_cache(1, ROOM))[1]
    state = layout.take(cache, read)
    unbroken = steps(model, ids[0, read:], cache)
    np.testing.assert_array_equal(steps(model, ids[0, read:], layout.fork(state, ROOM)), unbroken)
    np.testing.assert_array_equal(steps(model, ids[0, read:], layout.fork(state, 3 * ROOM)), unbroken)
