"""lm-eval itself, which the extra `eval` brings: its numbers are our own, on the rows that come with the package."""

import os
import sys

import pytest
import tokenizers
from flax import nnx

from based_jax.convert import load_hf
from based_jax.convert.tokenizers import folder_tokenizer
from based_jax.data.tokenizer import END_OF_TEXT, ByteTokenizer
from based_jax.errors import UserError
from based_jax.evals import choices, harness
from based_jax.evals.likelihood import Judge
from based_jax.nn.lm import LM, LMConfig

TASKS = os.path.join(os.path.dirname(harness.__file__), "lm_eval_tasks")
ROWS = 12
WHY = "the extra `eval` brings lm-eval: pip install -e '.[eval]'"


@pytest.fixture(scope="module")
def model():
    layers = (("conv", {}), ("taylor", {"num_heads": 2, "feature_dim": 4}), ("window", {"num_heads": 2, "window": 8}))
    config = LMConfig(layers=layers, d_model=16, vocab_size=257, dtype="float32", init_std=0.5)
    return nnx.jit(lambda: LM(config, rngs=nnx.Rngs(0)))()


@pytest.fixture
def lm_eval(monkeypatch):
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    return pytest.importorskip("lm_eval", reason=WHY)


def test_without_lm_eval_one_sentence_says_what_brings_it(monkeypatch):
    for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model", "lm_eval.api.registry"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        UserError, match=r"lm-eval is not installed \(.*\); pip install -e '\.\[eval\]' in the checkout brings it\."
    ):
        harness.register(lambda: None)


@pytest.mark.long
def test_lm_eval_s_numbers_are_our_own(lm_eval, model):
    from lm_eval.tasks import TaskManager

    asked = harness.register(lambda: (model, ByteTokenizer()))(batch_size=4, max_length=500)
    tasks = ["local_lambada", "local_arc_easy"]
    manager = TaskManager(include_path=TASKS)
    found = lm_eval.simple_evaluate(asked, tasks=tasks, limit=ROWS, task_manager=manager, bootstrap_iters=0)
    for name in ("lambada", "arc_easy"):
        rows = choices.choices_of(name, limit=ROWS)
        own = choices.likelihoods_of(Judge(model), ByteTokenizer(), rows, 500)
        theirs = [sample["resps"] for sample in found["samples"][f"local_{name}"]]
        for (ours, said), row in zip(zip(own, theirs, strict=True), rows, strict=True):
            assert [x[0][0] for x in said] == pytest.approx([x.log_prob for x in ours], abs=1e-4)
            assert len(said) == len(row.pairs)
        results = found["results"][f"local_{name}"]
        for metric, value in choices.scores_of(rows, own).items():
            assert results[f"{metric},none"] == pytest.approx(getattr(value, "value", value), rel=1e-4)


@pytest.mark.long
def test_lm_eval_s_other_requests(lm_eval, model):
    from lm_eval.api.instance import Instance

    asked = harness.register(lambda: (model, ByteTokenizer()))(batch_size=2, max_length=64)
    own = harness.HarnessModel(model, ByteTokenizer(), 2, 64)
    texts = ["The cat sat on the mat. " * 8, "A dog"]
    requests = [Instance("loglikelihood_rolling", {}, (text,), place) for place, text in enumerate(texts)]
    assert asked.loglikelihood_rolling(requests) == pytest.approx(own.whole_texts(texts))
    options = {"until": ["e"], "max_gen_toks": 12, "do_sample": False}
    requests = [Instance("generate_until", {}, (text, options), place) for place, text in enumerate(texts)]
    assert asked.generate_until(requests) == [x for _, x in sorted(own.answers([(text, options) for text in texts]))]
    (empty,) = asked.loglikelihood([Instance("loglikelihood", {}, ("", "cat"), 0)])
    assert empty[0] == pytest.approx(own.whole_texts(["cat"])[0])


@pytest.mark.long
@pytest.mark.parametrize("begins", [False, True], ids=["bare texts", "texts with a beginning"])
def test_lm_eval_s_model_of_transformers_finds_the_same(begins, lm_eval, tmp_path):
    """A random Llama, written by transformers and read by `load_hf`."""
    torch = pytest.importorskip("torch", reason="transformers' models need torch")
    transformers = pytest.importorskip("transformers", reason="a model to compare with")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    torch.manual_seed(0)
    tokenizer = byte_level_tokenizer(transformers, tmp_path, begins)
    config = transformers.LlamaConfig(
        vocab_size=264,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.4,
        eos_token_id=tokenizer.eos_token_id,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    theirs = HFLM(pretrained=str(tmp_path), tokenizer=tokenizer, dtype="float32", device="cpu", max_length=128)
    ours = harness.register(lambda: (load_hf(tmp_path, dtype="float32"), folder_tokenizer(tmp_path)))
    ours = ours(batch_size=2, max_length=128)
    pairs = [("The cat sat on", " the mat"), ("A ", "dog"), ("Why? " * 30, "Because."), ("", "cat")]
    requests = [Instance("loglikelihood", {}, pair, place) for place, pair in enumerate(pairs)]
    for (a, greedy_a), (b, greedy_b) in zip(ours.loglikelihood(requests), theirs.loglikelihood(requests), strict=True):
        assert a == pytest.approx(b, abs=1e-4) and greedy_a == greedy_b
    options = {"until": ["\n"], "max_gen_toks": 12, "do_sample": False}
    requests = [Instance("generate_until", {}, (prompt, options), place) for place, (prompt, _) in enumerate(pairs[:3])]
    assert ours.generate_until(requests) == theirs.generate_until(requests)


def byte_level_tokenizer(transformers, folder, begins):
    """Write a tokenizer of single bytes, which may put an id before each text; return it as transformers reads it."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: place for place, letter in enumerate([*alphabet, END_OF_TEXT, "<s>"])}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    made.add_special_tokens([END_OF_TEXT, "<s>"])
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    special = {"eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT}
    if begins:
        template = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", vocab["<s>"])])
        made.post_processor, special["bos_token"] = template, "<s>"
    made.save(str(folder / "tokenizer.json"))
    return transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **special)
