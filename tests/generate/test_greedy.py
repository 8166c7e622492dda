"""Every mixer goes on as its parallel form says."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from based_jax.errors import UserError
from based_jax.generate import Decoder, Request
from based_jax.generate.blocks import blocks
from based_jax.generate.rows import begun
from based_jax.nn.lm import LM, LMConfig
from based_jax.nn.mixers import MIXERS
from tests.helpers.cases import parametrize_some
from tests.helpers.small_mixers import SMALL

VOCAB, NEW = 50, 6
PROMPTS = [[7], [3, 1, 4, 1, 5], [i * 7 % VOCAB for i in range(37)]]
"""None to prefill, less than a chunk, and more than one, for which the others are padded."""


def model_of(*layers, dtype="float32", **options):
    config = LMConfig(layers=layers, d_model=16, vocab_size=VOCAB, dtype=dtype, init_std=0.5, **options)
    return nnx.jit(lambda: LM(config, rngs=nnx.Rngs(1)))()


def continued(decoder, prompts, steps=4):
    """Return the greedy continuations of prompts that are read in chunks of 16 tokens."""
    rows = begun(decoder, [Request(prompt, NEW) for prompt in prompts], 64, chunk_tokens=16)
    found = list(blocks(decoder, rows, steps))
    return [
        np.concatenate([block.tokens[i, : block.drawn[i]] for block in found]).tolist() for i in range(len(prompts))
    ]


def best(model, prompts, new):
    """Return the most likely tokens behind prompts and what was added to them, by one pass over all."""
    texts = [[*prompt, *added] for prompt, added in zip(prompts, new, strict=True)]
    ids = jnp.asarray([text + [0] * (64 - len(text)) for text in texts], jnp.int32)  # causal: the end is not seen
    likely = np.asarray(nnx.jit(model)(ids)[..., :VOCAB].argmax(-1))
    return [likely[row, len(prompt) - 1 : len(prompt) + NEW - 1].tolist() for row, prompt in enumerate(prompts)]


@parametrize_some("kind", MIXERS, ordinary=("linear",))
def test_greedy_tokens_are_the_argmax_of_the_parallel_form(kind):
    model = model_of((kind, SMALL.get(kind, {})), ("conv", {}))
    new = continued(Decoder.of(model), PROMPTS)
    assert new == best(model, PROMPTS, new)
    assert len({tuple(row) for row in new}) > 1  # a short memory comes to say the same behind some of them


def test_a_state_that_is_written_every_few_tokens_changes_no_token():
    model = model_of(("taylor", SMALL["taylor"]), ("conv", {}))
    decoder = Decoder.of(model, flush=4)
    new = continued(decoder, PROMPTS)
    assert new == best(model, PROMPTS, new)
    tokens = 2 * 4 * (4 + 8) * 4 + 4  # of two heads in fp32, and their count
    assert decoder.state_bytes(8) == Decoder.of(model).state_bytes(8) + tokens
    assert Decoder.of(model, options=["taylor.flush=4"]).config == decoder.config
    with pytest.raises(UserError, match=r"^With taylor.feature_dim=8 it is another model: 'stacks/0/blocks/0/mixer/"):
        Decoder.of(model, options=["taylor.feature_dim=8"])
    with pytest.raises(UserError, match=r"flush is 4 and state_dtype 'int8'; a state that is not 'float32' loses"):
        Decoder.of(model, flush=4, state_dtype="int8")
    with pytest.raises(UserError, match=r"^flush is 16, but the model has no Taylor layer; leave it out\.$"):
        Decoder.of(model_of(("conv", {})), flush=16, state_dtype="int8")


@pytest.mark.long
def test_a_prefix_that_is_read_in_no_order_comes_in_one_chunk():
    """It is longer than the chunks asked for."""
    model = model_of(("prefix", {**SMALL["prefix"], "enc_length": 30}))
    decoder, prompts = Decoder.of(model), PROMPTS[2:]
    new = continued(decoder, prompts)
    assert new == best(model, prompts, new)
    with pytest.raises(UserError, match=r"^A prompt has 5 tokens; the model reads the first 30 in no order, so that"):
        Request(PROMPTS[1], NEW).checked(decoder, 64)


def test_stacked_layers_and_narrow_weights_change_nothing():
    """A decoder computes as its model: in bf16 too, where kernels are rounded once instead of at each use."""
    layers = (("conv", {}), ("taylor", SMALL["taylor"])) * 2
    stacked = model_of(*layers, scan_layers=True, dtype="bfloat16", remat="dots")
    decoder = Decoder.of(stacked)
    hidden, _ = nnx.jit(lambda model: model.step(jnp.asarray([3]), model.init_cache(1, 8)))(stacked)
    model = decoder.layout.model(decoder.params)
    found, _ = nnx.jit(lambda model: model.step(jnp.asarray([3]), model.init_cache(1, 8)))(model)
    assert np.array_equal(found, hidden)
    assert np.array_equal(model.logits(found), stacked.logits(hidden))
    assert [stack.repeats for stack in model.stacks] == [1] * 4
    assert model.stacks[3].blocks[0].mixer.proj_q.kernel[...].dtype == jnp.bfloat16
    assert Decoder.of(stacked, "float32").config.dtype == "float32"
