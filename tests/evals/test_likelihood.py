import numpy as np
import pytest
from flax import nnx
from helpers.cases import parametrize_some

from based_jax.data.tokenizer import ByteTokenizer
from based_jax.errors import UserError
from based_jax.evals import choices, harness
from based_jax.evals.choices import choices_of, encoded, likelihoods_of, scores_of
from based_jax.evals.harness import HarnessModel
from based_jax.evals.likelihood import Continuation, Judge, Likelihood, likelihoods, strided
from based_jax.generate import Sampling
from based_jax.nn.lm import LM, LMConfig

LAYERS = {
    "conv": (("conv", {}),),
    "based": (("conv", {}), ("taylor", {"num_heads": 2, "feature_dim": 4}), ("window", {"num_heads": 2, "window": 8})),
    "prefix": (("prefix", {"num_heads": 2, "feature_dim": 4, "enc_length": 4}),),
}


def small(layers):
    config = LMConfig(layers=layers, d_model=16, vocab_size=257, dtype="float32", init_std=0.5)
    return nnx.jit(lambda: LM(config, rngs=nnx.Rngs(0)))()


@pytest.fixture(scope="module")
def model():
    return small(LAYERS["conv"])


@nnx.jit
def logits_of(model, ids):
    return model(ids)


def next_logits(model, tokens):
    """Return the logits behind each token, padded so that one program serves all."""
    ids = np.zeros((1, 64), np.int32)
    ids[0, : len(tokens)] = tokens
    return np.asarray(logits_of(model, ids), np.float64)[0, : len(tokens)]


def by_hand(model, context, ids):
    """Return the log-probability of ids behind others and whether they are greedy, from the logits in numpy."""
    logits = next_logits(model, [*context, *ids][:-1])[len(context) - 1 :]
    logits -= logits.max(-1, keepdims=True)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return log_probs[np.arange(len(ids)), ids].sum(), bool((logits.argmax(-1) == ids).all())


def greedy(model, tokens, count):
    """Return the likeliest next tokens, one after the other."""
    found = list(tokens)
    for _ in range(count):
        found.append(int(next_logits(model, found)[-1].argmax()))
    return found[len(tokens) :]


@parametrize_some("name", LAYERS, ["conv"])
def test_likelihoods_are_those_of_the_logits(name, rng):
    """Of rows of several lengths in two batches, and in one each."""
    model = small(LAYERS[name])
    sizes = [(5, 3), (52, 9), (1, 60), (6, 1)] * 4
    pairs = [Continuation(*(rng.integers(0, 257, size).tolist() for size in both)) for both in sizes]
    for batch_tokens in (1000,) if name == "conv" else (1, 1000):
        found = dict(likelihoods(Judge(model, batch_tokens), pairs, 100))
        for place, pair in enumerate(pairs):
            expected, is_greedy = by_hand(model, *pair)
            assert found[place].log_prob == pytest.approx(expected, rel=1e-5, abs=1e-4)
            assert found[place].is_greedy == is_greedy


def test_what_the_model_would_say_is_greedy_and_what_is_long_loses_its_beginning(model):
    said = greedy(model, [1, 2, 3], 5)
    judge, pair = Judge(model, 1000), Continuation([9] * 20 + [1, 2, 3], said)
    ((_, found),) = likelihoods(judge, [pair], 7)
    assert found.is_greedy
    assert found.log_prob == pytest.approx(by_hand(model, [1, 2, 3], said)[0], rel=1e-5)
    wrong = Continuation([1, 2, 3], [*said[:-1], (said[-1] + 1) % 257])
    ((_, found),) = likelihoods(judge, [wrong], 7)
    assert not found.is_greedy


@pytest.mark.parametrize(("length", "stride"), [(4, None), (4, 1), (4, 3), (9, 5), (40, 40)])
def test_windows_judge_each_token_once_with_as_much_before_it_as_there_is_room_for(length, stride):
    tokens = list(range(24))
    windows = list(strided(tokens, length, stride))
    assert [token for window in windows for token in window.ids] == tokens[1:]
    for context, ids in windows:
        assert list(context) == list(range(ids[0] - len(context), ids[0]))
        assert len(context) + len(ids) - 1 <= length
    assert all(len(context) + len(ids) - 1 == min(length, 23) for context, ids in windows[:1])
    assert all(len(ids) == (stride or length) for _, ids in windows[1:-1])
    assert all(len(context) + len(ids) - 1 == length for context, ids in windows[1:])
    assert list(strided([1], 4)) == []


def test_texts_of_windows_are_the_sum_of_their_tokens(model):
    text = "The cat sat on the mat, and the dog lay by the door."
    asked = HarnessModel(model, ByteTokenizer(), batch_size=15, max_length=64)
    ids = ByteTokenizer().encode(text)
    assert asked.whole_texts([text, "", "a"])[0] == pytest.approx(by_hand(model, [256], ids)[0], rel=1e-5)
    short = HarnessModel(model, ByteTokenizer(), batch_size=48, max_length=20)
    expected = sum(by_hand(model, *pair)[0] for pair in strided([256, *ids], 20))
    assert short.whole_texts([text]) == pytest.approx([expected], rel=1e-5)


def test_answers_end_before_a_stop_and_keep_the_end_of_a_prompt(model, monkeypatch):
    asked = HarnessModel(model, ByteTokenizer(), batch_size=2, max_length=16)
    seen = []

    def answered(decoder, requests, batch_size):
        seen.extend(requests)
        return ((place, list(b"one. two")) for place in reversed(range(len(requests))))

    monkeypatch.setattr(harness, "answered", answered)
    drawn = {"do_sample": True, "temperature": 0.5, "top_k": 3, "max_gen_toks": 4}
    found = dict(asked.answers([("the long prompt", {"max_gen_toks": 8, "until": [".", ""]}), ("a", drawn)]))
    assert found == {0: "one", 1: "one. two"}
    assert [bytes(x.prompt) for x in seen] == [b"g prompt", b"a"]
    assert [(x.max_new_tokens, x.sampling, x.stop_ids) for x in seen] == [
        (8, Sampling(), (256, ord("."))),
        (4, Sampling(0.5, 3), (256,)),
    ]
    greedily = [("a", {"do_sample": False, "temperature": 0.9, "max_gen_toks": 4})]
    assert list(asked.answers(greedily)) and seen[-1].sampling == Sampling()
    with pytest.raises(UserError, match="Option 'beams' of generation is unknown; there are until, max_gen_toks"):
        list(asked.answers([("a", {"beams": 3})]))
    with pytest.raises(UserError, match="max_gen_toks is 16; it is less than max_length, 16"):
        list(asked.answers([("a", {"max_gen_toks": 16})]))


ROWS = {
    "lambada": ({"context": "He said", "target": "no"}, [("He said", " no")], 0),
    "arc_easy": (
        {"question": "Why?", "choices": ["a", "bb"], "label": 1},
        [("Question: Why?\nAnswer:", " a"), ("Question: Why?\nAnswer:", " bb")],
        1,
    ),
    "arc_challenge": (
        {"question": "Why?", "choices": ["a", "b"], "label": 0},
        [("Question: Why?\nAnswer:", " a"), ("Question: Why?\nAnswer:", " b")],
        0,
    ),
    "piqa": (
        {"goal": "Open it", "sol1": "pull", "sol2": "push", "label": 1},
        [("Question: Open it\nAnswer:", " pull"), ("Question: Open it\nAnswer:", " push")],
        1,
    ),
    "hellaswag": (
        {"activity_label": "Baking", "ctx_a": "A man [header] stands.", "ctx_b": "he", "endings": ["a [title] b", "c"]}
        | {"label": 0},
        [("Baking: A man stands. He", " a. b"), ("Baking: A man stands. He", " c")],
        0,
    ),
    "winogrande": (
        {"sentence": "Ann met Bob, and _ was late.", "option1": "Ann", "option2": "Bob", "answer": "2"},
        [("Ann met Bob, and Ann", " was late."), ("Ann met Bob, and Bob", " was late.")],
        1,
    ),
}


@pytest.mark.parametrize("name", choices.TASKS)
def test_a_row_of_each_task_by_hand(name):
    row, pairs, label = ROWS[name]
    assert set(choices.TASKS[name].fields) <= row.keys()
    assert choices.TASKS[name].choice(row)[:2] == (pairs, label)


def test_a_text_behind_a_context_is_divided_as_lm_eval_does():
    assert encoded(ByteTokenizer(), "ab", " c") == (list(b"ab"), list(b" c"))
    assert encoded(ByteTokenizer(), "ab  ", "c") == (list(b"ab"), list(b"  c"))
    assert encoded(ByteTokenizer(), "", "c") == ([256], list(b"c"))


class BegunBytes(ByteTokenizer):
    """Bytes of a model whose texts begin with an id."""

    beginning = (7,)


def test_what_begins_a_text_stands_before_its_context(model):
    assert encoded(BegunBytes(), "ab", " c") == ([7, *b"ab"], list(b" c"))
    assert encoded(BegunBytes(), "", "c") == ([7], list(b"c"))
    asked = HarnessModel(model, BegunBytes(), batch_size=15, max_length=64)
    assert asked.whole_texts(["cat"]) == pytest.approx([by_hand(model, [7], list(b"cat"))[0]], rel=1e-5)


def test_metrics_by_hand():
    several = [choices.of_arc({"question": "q", "choices": ["a", "bbbb"], "label": x}) for x in (0, 1)]
    found = [[Likelihood(-1.0, False), Likelihood(-2.0, False)]] * 2  # the second is likelier by the character
    assert {name: mean.value for name, mean in scores_of(several, found).items()} == {"acc": 0.5, "acc_norm": 0.5}
    one = [choices.of_lambada({"context": "a", "target": "b"})] * 2
    scores = scores_of(one, [[Likelihood(-1.0, True)], [Likelihood(-3.0, False)]])
    assert scores["acc"].value == 0.5 and scores["perplexity"] == pytest.approx(np.exp(2.0))


def test_samples_have_their_rows_and_others_are_asked_for(model):
    assert [len(choices_of(name)) for name in ("lambada", "arc_easy")] == [199, 198]
    rows = choices_of("arc_easy", limit=2)
    found = likelihoods_of(Judge(model, 1000), ByteTokenizer(), rows, 63)
    assert [len(x) for x in found] == [len(row.pairs) for row in rows]
    context, text = (ByteTokenizer().encode(x) for x in rows[1].pairs[2])
    pair = context[-(64 - len(text)) :], text
    assert found[1][2].log_prob == pytest.approx(by_hand(model, *pair)[0], rel=1e-5)
    with pytest.raises(UserError, match="'piqa' has no rows here; give them by --data=piqa=FILE"):
        choices_of("piqa")


def test_what_cannot_be_judged_is_refused(model):
    for pair, told in (
        (Continuation([], [1]), "Continuation 0 has 1 ids behind 0; both are at least 1"),
        (Continuation([1], []), "Continuation 0 has 0 ids behind 1"),
        (Continuation([1], [2] * 5), "Continuation 0 has 5 ids; the model reads 4"),
        (Continuation([1], [2, 257]), "Row 0 has id 257; the model knows ids 0 to 256"),
        (Continuation([300, 1], [2]), "Row 0 has id 300; the model knows ids 0 to 256"),
    ):
        with pytest.raises(UserError, match=told):
            list(likelihoods(Judge(model), [pair], 4))
