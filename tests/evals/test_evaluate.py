import itertools

import jax
import numpy as np
import pytest
from flax import nnx

from based_jax.evals.evaluate import evaluate, make_eval_step, model_sums
from based_jax.labels import NO_LABEL
from based_jax.nn.lm import LM, LMConfig
from based_jax.train.tasks import TASKS


@pytest.fixture(scope="module")
def model():
    config = LMConfig(layers=(("conv", {}),), d_model=16, vocab_size=64, dtype="float32", init_std=0.3)
    return nnx.jit(lambda: LM(config, rngs=nnx.Rngs(0)))()


def by_hand(model, batches):
    """Return (mean loss, accuracy, labels) over batches, in numpy from the logits."""
    losses, correct = [], []
    for batch in batches:
        logits = np.asarray(nnx.jit(model)(jax.numpy.asarray(batch["inputs"])), np.float64)
        labelled = batch["labels"] != NO_LABEL
        picked, labels = logits[labelled], batch["labels"][labelled]
        losses.append(np.log(np.exp(picked).sum(-1)) - picked[np.arange(len(labels)), labels])
        correct.append(picked.argmax(-1) == labels)
    losses, correct = np.concatenate(losses), np.concatenate(correct)
    return losses.mean(), correct.mean(), len(losses)


def answered(model, batches, every):
    """Return batches whose every n-th row is labelled with the model's own answers."""
    for batch in batches:
        answers = np.asarray(nnx.jit(model)(jax.numpy.asarray(batch["inputs"])).argmax(-1))
        rows = np.arange(len(answers))[:, None] % every == 0
        yield batch | {"labels": np.where(rows & (batch["labels"] != NO_LABEL), answers, batch["labels"])}


@pytest.fixture(scope="module")
def segments(model):
    """Return test batches per segment, of different lengths, label counts and accuracies."""
    source = TASKS["mqar"](preset="tiny").open(8)
    steps = zip(source.eval_names, (2, 4), strict=True)
    return {name: list(answered(model, source.eval_batches(name), every)) for name, every in steps}


def test_metrics_per_segment_and_over_all_labels(model, segments):
    found = evaluate(model_sums(model), [(name, batch) for name, batches in segments.items() for batch in batches])
    expected = {name: by_hand(model, batches) for name, batches in segments.items()}
    for name, (loss, accuracy, _) in expected.items():
        assert found[f"{name}/loss"] == pytest.approx(loss, rel=1e-5)
        assert found[f"{name}/accuracy"] == pytest.approx(accuracy)
    accuracies = [accuracy for _, accuracy, _ in expected.values()]
    assert accuracies[0] > accuracies[1] > 0.1
    loss, accuracy, count = by_hand(model, itertools.chain(*segments.values()))
    assert count == 10 * 2 + 11 * 4
    assert found["loss"] == pytest.approx(loss, rel=1e-5)
    assert found["perplexity"] == pytest.approx(np.exp(loss), rel=1e-4)
    assert found["accuracy"] == pytest.approx(accuracy)
    assert found["accuracy_by_segment"] == pytest.approx(np.mean(accuracies))
    assert found["accuracy"] != pytest.approx(found["accuracy_by_segment"], abs=1e-3)


def test_one_segment_has_no_metrics_of_its_own(model, segments):
    found = evaluate(model_sums(model), [("16x2", batch) for batch in segments["16x2"]])
    assert set(found) == {"loss", "perplexity", "accuracy"}


def test_sums_are_taken_per_segment_whatever_the_order():
    def sums(batch):
        return {"loss": 2.0 * batch["n"], "correct": batch["right"], "count": batch["n"]}

    a, b, c = {"n": 3.0, "right": 3.0}, {"n": 5.0, "right": 0.0}, {"n": 1.0, "right": 1.0}
    found = evaluate(sums, [("x", a), ("y", b), ("x", c)])
    assert found["x/accuracy"] == 1 and found["y/accuracy"] == 0
    assert found["accuracy"] == pytest.approx(4 / 9)
    assert found["accuracy_by_segment"] == pytest.approx(0.5)


def test_a_huge_loss_and_no_labels_stay_finite():
    def sums(loss, count):
        return lambda _: {"loss": loss, "correct": 0.0, "count": count}

    assert np.isfinite(evaluate(sums(1e9, 1.0), [("x", {})])["perplexity"])
    assert evaluate(sums(0.0, 0.0), [("x", {})]) == {"loss": 0, "perplexity": 1, "accuracy": 0}


def test_the_eval_step_compiles_once_per_shape(model, segments):
    graphdef, params = nnx.split(model)
    step = make_eval_step(graphdef)
    for batches in segments.values():
        for batch in batches:
            step(params, batch)
    assert step._cache_size() == len(segments)
