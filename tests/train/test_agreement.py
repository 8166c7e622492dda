"""Processes that were given other values than process 0 say so before they compute with it."""

import json

import jax
import numpy as np
import pytest

from based_jax.errors import UserError
from based_jax.train import agreement, continuation
from based_jax.train.agreement import check_alike
from based_jax.train.run import load_config
from tests.helpers.processes import BASE


@pytest.fixture
def in_process_1(monkeypatch):
    """Return what lets this process be the second of two, of which the first has some values."""

    def begin(values):
        letters = np.frombuffer(json.dumps(values).encode(), np.uint8)
        sent = iter([np.int32(letters.size), letters])
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        monkeypatch.setattr(jax, "process_index", lambda: 1)
        monkeypatch.setattr(agreement.multihost_utils, "broadcast_one_to_all", lambda own: next(sent))

    return begin


def test_values_that_differ_are_named(in_process_1):
    first = {"steps": 10, "model.layers": [["conv", {}]], "gone": 1}
    in_process_1(first)
    check_alike({"gone": 1, "model.layers": (("conv", {}),), "steps": 10})
    in_process_1(first)
    with pytest.raises(UserError) as error:
        check_alike({"steps": 20, "model.layers": [["conv", {}]]})
    assert str(error.value) == (
        "gone is 1 in process 0 and None in process 1, steps is 10 in process 0 and 20 in process 1;"
        " all processes of a run have the same."
    )
    in_process_1({})
    with pytest.raises(UserError, match="and 6 more differ; all processes"):
        check_alike(dict.fromkeys("abcdefghi", 1))


def test_one_process_is_asked_nothing(monkeypatch):
    monkeypatch.setattr(agreement, "_of_process_0", None)
    check_alike({"steps": 1})


def test_a_host_may_have_its_text_elsewhere():
    text = BASE | {"data": {"kind": "text", "tokenizer": "bytes"}, "model": BASE["model"] | {"vocab_size": 264}}
    here, there, other = (
        continuation.values_of_all(load_config(text, changes))
        for changes in (
            {"data.path": "/a", "data.cache_dir": "/b"},
            {"data.path": "/c", "data.processes": 2},
            {"optim.lr": 3e-3},
        )
    )
    assert here == there
    assert {key for key in here if here[key] != other[key]} == {"optim.lr"}
    assert {"optim.name", "rows_per_device", "data.seq_len"} <= set(here)
