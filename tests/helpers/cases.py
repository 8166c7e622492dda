"""Which cases of a test are those of the ordinary suite."""

from collections.abc import Collection, Iterable

import pytest


def parametrize_some(names: str, cases: Iterable, ordinary: Collection, ids=None) -> pytest.MarkDecorator:
    """Return the parametrisation over all cases, of which the ordinary suite runs those given, and `long` the rest."""
    cases = list(cases)
    assert all(case in cases for case in ordinary), "an ordinary case is none of the cases"
    params = [
        pytest.param(*(case if "," in names else (case,)), marks=() if case in ordinary else pytest.mark.long)
        for case in cases
    ]
    return pytest.mark.parametrize(names, params, ids=ids)
