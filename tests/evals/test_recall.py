import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx
from helpers import pictures

from based_jax.data.tokenizer import ByteTokenizer
from based_jax.errors import UserError
from based_jax.evals import answering, recall
from based_jax.evals.recall_tasks import NEW_TOKENS, Part, Selection
from based_jax.generate import Decoder, Request, generate
from based_jax.nn.lm import LM, LMConfig
from based_jax.pictures.recall import recall_figure
from based_jax.store import Store


@pytest.fixture(scope="module")
def model():
    config = LMConfig(layers=(("conv", {}),), d_model=16, vocab_size=257, dtype="float32", init_std=0.5)
    return nnx.jit(lambda: LM(config, rngs=nnx.Rngs(0)))()


@pytest.fixture(scope="module")
def asked(model):
    return recall.Asked("tiny", Decoder.of(model), ByteTokenizer(), batch_size=3)


@pytest.fixture
def parrot(monkeypatch):
    """Let a model say what `words` gives for the text of a prompt, and count the prompts."""
    seen = []

    def install(words):
        def answered(decoder, requests, batch_size):
            for place, request in enumerate(requests):
                seen.append(ByteTokenizer().decode(request.prompt))
                yield place, ByteTokenizer().encode(words(seen[-1]))

        monkeypatch.setattr(recall, "answered", answered)
        return seen

    return install


def test_the_engine_answers_each_as_in_any_company_the_longest_first(model):
    lengths = (5, 40, 37, 1)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 257, length).tolist() for length in lengths]
    news = (4, 7, 6, 5)
    requests = [Request(ids, new, stop_ids=(10,)) for ids, new in zip(prompts, news, strict=True)]
    found = list(answering.answered(Decoder.of(model), requests, batch_size=2))
    assert [place for place, _ in found] == [1, 2, 0, 3]
    together = [*generate(model, prompts[:2], max(news), stop=10), *generate(model, prompts[2:], max(news), stop=10)]
    assert all(ids == together[place][: news[place]].tolist() for place, ids in found)


def test_what_is_said_ends_at_the_first_newline():
    assert answering.text_until("a\nb\n", ("\n",)) == "a"
    assert answering.text_until("ab. c", ("\n", ". ")) == "ab"
    assert answering.text_until("abc", ("\n",)) == "abc"
    assert answering.stop_ids(ByteTokenizer(), ("\n",)) == (256, 10)


def test_a_row_says_what_was_asked_and_what_it_scores(asked, parrot, tmp_path):
    rows_file = tmp_path / "fda.jsonl"
    row = {"text": "Kind: saw. Maker: ACME Inc. Maker:", "key": "Maker", "value": "Acme"}
    rows_file.write_text("".join(json.dumps(row | {"value": value}) + "\n" for value in ("Acme", "Bolt", " ")))
    seen = parrot(lambda prompt: " the ACME inc\nAcme")
    store = Store(tmp_path / "rows")
    recall.run_part(asked, Part("fda"), Selection(ByteTokenizer(), {"fda": str(rows_file)}), store)
    assert seen == [row["text"]] * 2
    first, second = store.rows()
    assert first["said"] == " the ACME inc" and first["answers"] == ["Acme"]
    assert [first[name] for name in ("contains", "f1", "exact")] == [1.0, pytest.approx(2 / 3), 0.0]
    assert [second[name] for name in ("contains", "f1", "exact")] == [0.0, 0.0, 0.0]
    assert (first["source"], first["prompt_tokens"], first["left_out"]) == (str(rows_file), len(row["text"]), 0)
    (summary,) = recall.summaries(store.rows())
    assert summary.scores["contains"].value == 0.5 and summary.examples == 2
    assert recall.table([summary])["contains"][0] == "0.500 [0.500, 0.500]*"  # one document, so nothing to draw


def test_a_prompt_loses_its_beginning(asked, parrot, tmp_path):
    seen = parrot(lambda prompt: "")
    short = recall.Asked("tiny", asked.decoder, asked.tokenizer, max_length=NEW_TOKENS + 9)
    recall.run_part(short, Part("extraction"), Selection(ByteTokenizer(), limit=3), Store(tmp_path))
    whole = parrot(lambda prompt: "")
    recall.run_part(asked, Part("extraction", 8000), Selection(ByteTokenizer(), limit=3), Store(tmp_path))
    assert [len(x.encode()) for x in seen[:3]] == [9, 9, 9]
    assert [x[-9:] for x in seen[3:]] == seen[:3] and whole is seen
    left_out = {row["length"]: row["left_out"] for row in Store(tmp_path).rows()}
    assert left_out[None] > 0 and left_out[8000] == 0


def test_what_was_stopped_goes_on_where_it_was(asked, parrot, tmp_path):
    """Rows that are there are not asked again; those of other weights or another seed are others."""

    def stopped(prompt):
        if len(seen) == 3:
            raise KeyboardInterrupt
        return "x"

    part, selection = Part("niah_single_1", 500), Selection(ByteTokenizer(), limit=5)
    seen = parrot(stopped)
    with pytest.raises(KeyboardInterrupt):
        recall.run_part(asked, part, selection, Store(tmp_path))
    (file,) = tmp_path.glob("*.jsonl")
    file.write_bytes(file.read_bytes()[:-20])  # killed while it wrote the second
    seen.clear()
    parrot(lambda prompt: "x")
    recall.run_part(asked, part, selection, Store(tmp_path))
    assert len(seen) == 4 and len({row["example"] for row in Store(tmp_path).rows()}) == 5
    recall.run_part(asked, part, selection, Store(tmp_path))
    assert len(seen) == 4
    recall.run_part(asked, part, Selection(ByteTokenizer(), limit=5, seed=1), Store(tmp_path))
    assert len(seen) == 9
    assert [summary.examples for summary in recall.summaries(Store(tmp_path).rows())] == [5, 5]


def test_a_model_that_reads_less_is_refused(tmp_path):
    asked = recall.Asked("short", SimpleNamespace(max_len=64), ByteTokenizer())
    with pytest.raises(UserError, match="'phonebook@400' has 400 tokens, and the model reads 64"):
        recall.run_part(asked, Part("phonebook", 400), Selection(ByteTokenizer()), Store(tmp_path))


LENGTHS = (512, 1024, 2048, 4096, 8192)


def summary(model, part, value, metric="contains"):
    mean = recall.scores.Mean(value, value - 0.05, value + 0.04)
    return recall.Summary(model, part, "somewhere", metric, 10, dict.fromkeys(recall.scores.SCORES, mean))


def test_a_picture_of_several_models():
    parts = [Part("extraction"), Part("squad_questions", 512, 2)]
    needles = [Part(task, length) for task in ("niah_single_1", "phonebook") for length in LENGTHS]
    found = [
        summary(model, part, 0.1 * i + 0.05 * j, "f1" if part.task.startswith("squad") else "contains")
        for i, model in enumerate(("Based", "Mamba"))
        for j, part in enumerate((*parts, *needles))
    ]
    figure = recall_figure(found)
    told = [text.get_text() for text in pictures.shown_texts(figure)]
    assert {"Based", "Mamba", "extraction", "squad_questions@512 twice (F1)", "niah_single_1", "8,192"} <= set(told)
    assert pictures.faults(figure)["cut off"] == []
    lines = [line.get_ydata().tolist() for line in figure.axes[1].get_lines() if len(line.get_ydata()) == 5]
    assert lines[0] == pytest.approx([0.1, 0.15, 0.2, 0.25, 0.3])
    with pytest.raises(UserError, match="no rows of recall to draw"):
        recall_figure([])


def test_devices_are_named(asked, parrot, tmp_path):
    parrot(lambda prompt: "x")
    recall.run_part(asked, Part("phonebook", 300), Selection(ByteTokenizer(), limit=1), Store(tmp_path))
    (row,) = Store(tmp_path).rows()
    assert row["device"] == jax.devices()[0].device_kind and row["model"] == "tiny"
