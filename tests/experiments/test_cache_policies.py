"""The experiment on policies of attention's cache: its committed rows, and how models are given caches."""

import collections
import json

import numpy as np
import pytest

from based_jax.sweep.trial import load_sweep
from experiments.cache_policies.__main__ import (
    BUDGETS,
    POLICIES,
    RESULTS,
    TRAINED,
    main,
    recall,
    state_bytes,
    with_cache,
)

SWEEP = "experiments/cache_policies/sweep.py"


@pytest.fixture(scope="module")
def rows():
    return [json.loads(line) for line in (RESULTS / "policies.jsonl").read_text("utf-8").splitlines()]


def test_each_point_of_the_sweep_has_its_rows(rows):
    found = collections.Counter(row["run"] for row in rows)
    trials = [trial for _, trial in load_sweep(SWEEP).trials()]
    assert len(found) == len(trials)
    caches = {"attention": 1 + len(POLICIES) * len(BUDGETS)}
    expected = [caches.get(trial.model.layers[-1][0], 1) for trial in trials]
    assert sorted(found.values()) == sorted(expected)


def test_bytes_are_those_of_the_models(rows):
    (_, trial), *_ = load_sweep(SWEEP).trials()
    found = {(row["policy"], row["budget"]): row["state_bytes"] for row in rows if row["budget"] in (BUDGETS[0], 64)}
    assert found == {cache: state_bytes(with_cache(trial.model, *cache), 64) for cache in found}


def test_a_budget_of_all_tokens_recalls_what_attention_does(rows):
    full = {row["run"]: row["accuracy"] for row in rows if row["policy"] == TRAINED}
    whole = [row for row in rows if row["budget"] == 64]
    assert len(whole) == 2 * len(POLICIES) and all(row["accuracy"] == full[row["run"]] for row in whole)


def test_a_store_without_rows_is_said(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["cache_policies", "measure", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert f"'{tmp_path}' has no row of a sweep; `python -m based_jax sweep run` fills it" in capsys.readouterr().err


def test_recall_counts_what_is_labelled():
    """Of a model that knows nothing about one in 256 is right; of labels that it predicts all are."""
    import jax
    from flax import nnx

    from based_jax.nn.lm import LM

    [*_, (_, trial)] = load_sweep(SWEEP).trials()
    model = nnx.jit(lambda: LM(trial.model, rngs=nnx.Rngs(0)))()
    ids = np.random.default_rng(0).integers(0, 256, (4, 12)).astype(np.int32)
    predicted = np.asarray(jax.jit(lambda model, ids: model(ids)[..., :256].argmax(axis=-1))(model, ids))
    labels = np.where(np.arange(12) % 3 == 0, predicted, -1)
    labels[0, 0] = (predicted[0, 0] + 1) % 256
    assert recall(trial.model, nnx.state(model), [{"inputs": ids, "labels": labels}]) == 15 / 16
