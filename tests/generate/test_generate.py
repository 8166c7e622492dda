from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from based_jax.errors import UserError
from based_jax.generate import Sampling, generate
from based_jax.generate.prefill import CHUNK_TOKENS
from based_jax.generate.sampling import GREEDY, Draws, draw
from based_jax.nn.lm import LM, LMConfig

VOCAB = 50
LAYERS = (("conv", {}), ("taylor", {"num_heads": 2, "feature_dim": 4}), ("window", {"num_heads": 2, "window": 4}))
PROMPTS = [[7], [3, 1, 4, 1, 5], list(range(20))]

LOGITS = np.array([2.0, -1.0, 0.5, 1.5, -3.0, 1.0, 0.0, 0.25])
DRAWS = 20_000


@pytest.fixture(scope="module")
def model():
    config = LMConfig(layers=LAYERS, d_model=16, vocab_size=VOCAB, dtype="float32", init_std=0.5)
    return nnx.jit(lambda: LM(config, rngs=nnx.Rngs(1)))()


@pytest.fixture(scope="module")
def greedy(model):
    """Return the greedy continuations of the ragged prompts."""
    return generate(model, PROMPTS, 8)


def test_greedy_is_the_argmax_of_the_full_forward_pass_for_ragged_prompts(model, greedy):
    longest = max(map(len, PROMPTS)) + 8
    texts = [prompt + new.tolist() for prompt, new in zip(PROMPTS, greedy, strict=True)]
    ids = jnp.asarray([text + [0] * (longest - len(text)) for text in texts], jnp.int32)  # causal: the end is not seen
    best = np.asarray(nnx.jit(model)(ids)[..., :VOCAB].argmax(-1))
    for row, (prompt, new) in enumerate(zip(PROMPTS, greedy, strict=True)):
        assert new.tolist() == best[row, len(prompt) - 1 : len(prompt) + 7].tolist()
    assert len({tuple(new) for new in greedy}) == len(PROMPTS)


def test_prompts_of_a_batch_do_not_see_each_other(model, greedy):
    reordered = generate(model, PROMPTS[::-1], 8)
    other_company = generate(model, [[11, 12], PROMPTS[1], [13]], 8)
    assert [new.tolist() for new in reordered[::-1]] == [new.tolist() for new in greedy]
    assert other_company[1].tolist() == greedy[1].tolist()


@pytest.fixture(scope="module")
def bounded_model():
    """Return a model whose mixers keep every token, 40 at most."""
    layers = (("hyena", {"l_max": 40, "filter_order": 4}), ("attention", {"num_heads": 2}), ("mamba", {"d_state": 4}))
    config = LMConfig(layers=layers, d_model=16, vocab_size=VOCAB, dtype="float32", init_std=0.5)
    return nnx.jit(lambda: LM(config, rngs=nnx.Rngs(1)))()


def test_a_model_that_reads_less_than_a_bucket_continues_each_prompt_as_alone(bounded_model):
    """The longest prompt leaves no room beside its continuation."""
    prompts = [[i * 7 % VOCAB for i in range(length)] for length in (36, 1, 9)]
    together = generate(bounded_model, prompts, 4)
    text = jnp.asarray([prompts[0] + together[0].tolist()], jnp.int32)
    best = nnx.jit(bounded_model)(text)[0, 35:39, :VOCAB].argmax(-1)
    assert together[0].tolist() == best.tolist()
    for prompt, new in zip(prompts[1:], together[1:], strict=True):
        assert generate(bounded_model, [prompt] * 3, 4)[0].tolist() == new.tolist()


def test_more_tokens_than_the_model_reads_are_refused(bounded_model):
    with pytest.raises(
        UserError, match=r"^max_new_tokens is 5; the model reads 40 tokens, so that behind 36 .* at most 4"
    ):
        generate(bounded_model, [[1], [2] * 36], 5)
    with pytest.raises(UserError, match=r"^A prompt has 40 tokens; with one more it is at most the 40 that"):
        generate(bounded_model, [[2] * 40], 1)


def test_a_prompt_longer_than_a_chunk_is_read_whole(model):
    prompt = [i * 7 % VOCAB for i in range(CHUNK_TOKENS + 3)]
    (new,) = generate(model, [prompt], 1)
    assert new.tolist() == [int(nnx.jit(model)(jnp.asarray([prompt], jnp.int32))[0, -1, :VOCAB].argmax())]


def test_the_stop_id_ends_a_continuation_and_is_left_out(model, greedy):
    stop = int(greedy[1][3])
    for new, whole in zip(generate(model, PROMPTS, 8, stop=stop), greedy, strict=True):
        whole = whole.tolist()
        assert new.tolist() == (whole[: whole.index(stop)] if stop in whole else whole)
    assert len(generate(model, PROMPTS, 8, stop=int(greedy[0][0]))[0]) == 0


def test_the_seed_determines_the_text(model):
    hot = Sampling(temperature=2.0)
    first, again, other = (generate(model, [[1, 2]] * 4, 8, hot, seed=seed) for seed in (5, 5, 6))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert len({tuple(row) for row in first}) == 4
    assert np.max(first) < VOCAB  # not from the padding of the vocabulary


def test_a_row_draws_the_same_in_any_company(model):
    """By its id and its place in its own text: alone, in another row, beside longer prompts, and continued."""
    hot = Sampling(temperature=2.0, top_p=0.9)
    alone = generate(model, [[3, 1, 4]], 8, hot, seed=2**40 + 5, row_ids=[7])[0].tolist()
    company = generate(
        model, [[9], list(range(20)), [3, 1, 4], [3, 1, 4]], 8, hot, seed=[1, 2, 2**40 + 5, 5], row_ids=[0, 1, 7, 7]
    )
    assert company[2].tolist() == alone != company[3].tolist()
    first = generate(model, [[3, 1, 4]], 3, hot, seed=2**40 + 5, row_ids=[7])[0].tolist()
    (rest,) = generate(model, [[3, 1, 4, *first]], 5, hot, seed=2**40 + 5, row_ids=[7])
    assert first + rest.tolist() == alone


def test_arrays_are_prompts(model, greedy):
    expected = [greedy[1].tolist()] * 2
    for prompts in (
        np.asarray([PROMPTS[1]] * 2),
        jnp.asarray([PROMPTS[1]] * 2),
        [np.asarray(PROMPTS[1], np.uint8)] * 2,
    ):
        assert [new.tolist() for new in generate(model, prompts, np.int64(8))] == expected


def sample(logits, sampling, seed):
    """Return a token of each row, drawn alike from its logits."""
    rows = len(logits)
    draws = Draws.of([sampling] * rows, [np.asarray((0, seed, row), np.uint32) for row in range(rows)])
    return jax.jit(draw)(logits, draws, jnp.zeros(rows, jnp.int32))[0]


def softmax(logits):
    p = np.exp(logits - logits.max())
    return p / p.sum()


def kept(p, tokens):
    """Return a distribution with all but these tokens cut."""
    cut = np.where(np.isin(np.arange(len(p)), tokens), p, 0)
    return cut / cut.sum()


def nucleus(p, top_p):
    """Return the fewest most likely tokens that hold top_p together."""
    order = np.argsort(-p)
    return order[: np.searchsorted(np.cumsum(p[order]), top_p) + 1]


P = softmax(LOGITS)
HOT, COLD = softmax(LOGITS / 2), softmax(LOGITS / 0.5)


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(temperature=1.0), P),
        (Sampling(temperature=2.0), HOT),
        (Sampling(temperature=0.5), COLD),
        (Sampling(temperature=1.0, top_k=1), kept(P, [0])),
        (Sampling(temperature=1.0, top_k=3), kept(P, [0, 3, 5])),
        (Sampling(temperature=1.0, top_k=99), P),
        (Sampling(temperature=1.0, top_p=0.01), kept(P, [0])),
        (Sampling(temperature=1.0, top_p=0.7), kept(P, nucleus(P, 0.7))),
        (Sampling(temperature=2.0, top_p=0.7), kept(HOT, nucleus(HOT, 0.7))),
        (Sampling(temperature=1.0, top_k=4, top_p=0.8), kept(P, nucleus(kept(P, [0, 3, 5, 2]), 0.8))),
    ],
    ids=str,
)
def test_draws_follow_the_distribution(sampling, expected):
    logits = jnp.broadcast_to(jnp.asarray(LOGITS, jnp.float32), (DRAWS, len(LOGITS)))
    drawn = np.asarray(sample(logits, sampling, 0))
    frequency = np.bincount(drawn, minlength=len(LOGITS)) / DRAWS
    assert not frequency[expected == 0].any()
    deviation = np.sqrt(expected * (1 - expected) / DRAWS)
    assert (np.abs(frequency - expected) <= 4.5 * deviation).all()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("temperature", [1e-320, 1e-99, 1e99])
def test_the_ends_of_temperature_are_greedy_and_even(temperature):
    logits = jnp.broadcast_to(jnp.asarray(LOGITS, jnp.float32), (512, len(LOGITS)))
    drawn = np.asarray(sample(logits, Sampling(temperature), 0))
    counts = np.bincount(drawn, minlength=len(LOGITS))
    assert counts[0] == 512 if temperature < 1 else counts.min() > 256 / len(LOGITS)


def test_cuts_differ_from_row_to_row():
    logits = jnp.asarray([[0.0, 5.0, 1.0], [5.0, 0.0, 1.0]])
    for sampling in (Sampling(1.0, top_k=1), Sampling(1.0, top_p=0.5), GREEDY):
        assert sample(logits, sampling, 3).tolist() == [1, 0]


def test_what_fp32_does_not_have_draws_as_what_is_near():
    """The largest logit is neither the first nor the only one above 0."""
    logits = jnp.asarray([[0.0, 1.0, 5.0, 4.0]])
    for sampling in (Sampling(1e-37), Sampling(5e-324), Sampling(1, top_p=5e-324), Sampling(1, top_p=Fraction(1, 3))):
        assert sample(logits, sampling, 3).item() == 2, sampling
    hottest = sample(logits, Sampling(1e30), 3).item()
    assert {sample(logits, Sampling(t), 3).item() for t in (2**63, 10**400, 1e300)} == {hottest}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.5}, r"^temperature is -0\.5; it is 0 for greedy, or above\.$"),
        ({"temperature": float("nan")}, r"^temperature is nan; it is 0 for greedy, or above\.$"),
        ({"top_k": -1}, r"^top_k is -1; it is 0 for all tokens, or the number kept\.$"),
        ({"top_p": 0.0}, r"^top_p is 0\.0; it is above 0 and at most 1\.$"),
        ({"top_p": 1.5}, r"^top_p is 1\.5; it is above 0 and at most 1\.$"),
    ],
)
def test_impossible_sampling_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        Sampling(**options)


@pytest.mark.parametrize(
    ("prompts", "steps", "message"),
    [
        ([], 1, r"^There is no prompt; give at least one\.$"),
        ([[1], []], 1, r"^Prompt 1 is empty; it needs at least one token\.$"),
        ([[1, VOCAB]], 1, rf"^Prompt 0 has id {VOCAB}; the model knows ids 0 to {VOCAB - 1}\.$"),
        ([[1], [4, -2, 3]], 1, rf"^Prompt 1 has id -2; the model knows ids 0 to {VOCAB - 1}\.$"),
        ([[1]], 0, r"^max_new_tokens is 0; it is at least 1\.$"),
    ],
)
def test_impossible_requests_are_refused(model, prompts, steps, message):
    with pytest.raises(UserError, match=message):
        generate(model, prompts, steps)
