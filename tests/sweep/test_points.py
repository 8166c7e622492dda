"""Spaces of points are lists of flat dicts, combined as the words say."""

import pytest

from based_jax.errors import UserError
from based_jax.sweep import chain, param, product, zipped

A, B = param("a", [1, 2]), param("b.c", ["x", "y", "z"])


def test_a_product_has_every_combination_and_its_last_space_varies_fastest():
    assert product(A, B)[:4] == [{"a": 1, "b.c": "x"}, {"a": 1, "b.c": "y"}, {"a": 1, "b.c": "z"}, {"a": 2, "b.c": "x"}]
    assert len(product(A, B, param("d", [0]))) == 6
    assert product() == [{}]


def test_a_chain_has_one_space_after_the_other():
    assert chain(A, B) == [{"a": 1}, {"a": 2}, {"b.c": "x"}, {"b.c": "y"}, {"b.c": "z"}]


def test_zipped_spaces_go_together():
    assert zipped(A, B[:2]) == [{"a": 1, "b.c": "x"}, {"a": 2, "b.c": "y"}]


def test_spaces_are_not_shared():
    joined = chain(A)
    joined[0]["a"] = 7
    assert A[0] == {"a": 1}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: product(A, param("a", [3])), "'a' is set by two"),
        (lambda: zipped(A, B), "one length, not of 2, 3"),
        (lambda: param("optim.lr", []), "'optim.lr' has no values"),
    ],
)
def test_what_is_impossible_is_said(make, words):
    with pytest.raises(UserError, match=words):
        make()
