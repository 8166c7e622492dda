"""Mixtures: rows of corpora by their weights, each as it would come alone, and evaluated by name."""

import itertools

import numpy as np
import pytest

from based_jax.data.text import TextSource
from based_jax.data.text_checks import TextPart
from based_jax.train import data_record


@pytest.fixture
def folders(tmp_path):
    """Return folders of texts in which each letter is of one corpus."""
    for letter, words in {"a": 300, "b": 900, "c": 100}.items():
        (tmp_path / letter).mkdir()
        for number in range(4):
            text = " ".join(letter * (1 + (word * number) % 7) for word in range(words))
            (tmp_path / letter / f"{number}.txt").write_text(text)
    return tmp_path


def source(folders, weights, batch_size=8, **options):
    mixture = {name: TextPart(str(folders / name), weight) for name, weight in weights.items()}
    return TextSource(None, "bytes", 16, batch_size, mixture=mixture, cache_dir=folders / "cache", **options)


def letters(batch):
    """Return the letter of each row."""
    found = [{chr(id) for id in row if chr(id) in "abc"} for row in batch["inputs"]]
    assert all(len(of_row) == 1 for of_row in found)
    return ["".join(of_row) for of_row in found]


@pytest.mark.parametrize("weights", [{"a": 3.0, "b": 1.0}, {"a": 1.0, "b": 2.5, "c": 0.5}, {"b": 7.0}])
def test_rows_are_shared_by_weight(folders, weights):
    mixed = source(folders, weights)
    rows = [letter for step in range(50) for letter in letters(mixed.batch(step))]
    for name, weight in weights.items():
        assert abs(rows.count(name) - 400 * weight / sum(weights.values())) <= 2
    for name, weight in weights.items():  # in every stretch of rows too
        share = weight / sum(weights.values())
        assert all(abs(part.count(name) - 40 * share) <= 2 for part in itertools.batched(rows, 40))


def test_each_corpus_comes_in_its_own_order(folders):
    mixed = source(folders, {"a": 1.0, "b": 2.0})
    alone = {name: TextSource(folders / name, "bytes", 16, 1, cache_dir=folders / "cache") for name in "ab"}
    taken = dict.fromkeys("ab", 0)
    for step in range(30):
        batch = mixed.batch(step)
        for row, letter in enumerate(letters(batch)):
            expected = alone[letter].batch(taken[letter])
            taken[letter] += 1
            for name, rows in expected.items():
                np.testing.assert_array_equal(batch[name][row], rows[0])


def test_a_batch_is_a_function_of_the_step_and_of_no_order_of_keys(folders):
    weights = {"a": 1.0, "b": 2.0, "c": 1.0}
    first, again = source(folders, weights), source(folders, dict(reversed(weights.items())))
    own = source(folders, weights, rows=[1, 6])
    for step in (900, 0, 17):
        for name, rows in first.batch(step).items():
            np.testing.assert_array_equal(again.batch(step)[name], rows)
            np.testing.assert_array_equal(own.batch(step)[name], rows[[1, 6]])
    other = source(folders, weights | {"a": 5.0})
    assert letters(other.batch(0)) != letters(first.batch(0))


def test_validation_is_by_name(folders):
    mixed = source(folders, {"b": 1.0, "a": 2.0})
    assert mixed.eval_names == ("a", "b")
    for name in mixed.eval_names:
        alone = TextSource(folders / name, "bytes", 16, 8, cache_dir=folders / "cache")
        pairs = zip(mixed.eval_batches(name), alone.eval_batches("validation"), strict=True)
        assert all((ours["inputs"] == theirs["inputs"]).all() for ours, theirs in pairs)


def test_sizes_and_shares_are_said(folders):
    said = source(folders, {"a": 3.0, "b": 1.0}).summary
    assert said[0] == "rows of a batch: a 75.0%, b 25.0%"
    assert [line.split(":")[0] for line in said[1:]] == ["a/train", "a/validation", "b/train", "b/validation"]


def test_a_change_in_any_part_is_named(folders):
    data_record.save(source(folders, {"a": 1.0, "b": 1.0}), folders)
    assert data_record.changed_since(source(folders, {"a": 1.0, "b": 1.0}), folders) is None
    (folders / "b" / "2.txt").write_text("b b b " * 99)
    change = data_record.changed_since(source(folders, {"a": 1.0, "b": 1.0}), folders)
    assert change.endswith(
        f"'{folders / 'a'}, {folders / 'b'}' is not what the run in '{folders}' began with: b/2.txt has changed"
    )
