"""Batches that are read ahead: the same ones in the same order, few of them, and no thread once they are done with."""

import itertools
import threading
import time
from types import SimpleNamespace

import pytest

from based_jax.data.segments import SegmentSource
from based_jax.errors import UserError
from based_jax.train import loop
from based_jax.train.loop import train
from based_jax.train.read_ahead import BATCHES_AHEAD, read_ahead
from tests.helpers.tiny_runs import assert_same_run, losses, make_config, saved_steps


def names_of_threads():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("read_ahead")]


def wait_until(happened, seconds=5.0):
    end = time.monotonic() + seconds
    while not happened() and time.monotonic() < end:
        time.sleep(0.001)
    assert happened()


def test_batches_come_in_the_order_of_the_steps():
    with read_ahead(lambda step: step**2, range(3, 20)) as batches:
        assert list(batches) == [step**2 for step in range(3, 20)]
    with read_ahead(lambda step: step, ()) as batches:
        assert list(batches) == []
    assert names_of_threads() == []


def test_no_more_than_a_few_are_read_before_they_are_asked_for():
    read = []
    with read_ahead(read.append, range(100)) as batches:
        for taken in range(1, 6):
            next(batches)
            wait_until(lambda taken=taken: len(read) == taken + BATCHES_AHEAD)
            time.sleep(0.01)
            assert read == list(range(taken + BATCHES_AHEAD))
    assert read == list(range(5 + BATCHES_AHEAD)) and names_of_threads() == []


def test_the_next_is_read_while_one_is_used():
    asked = threading.Event()
    with read_ahead(lambda step: step == 0 or asked.set(), range(2)) as batches:
        assert next(batches) and asked.wait(5.0)


def test_an_error_is_raised_where_its_batch_is_asked_for():
    def read(step):
        if step == 2:
            raise ValueError("step 2 is damaged")
        return step

    with pytest.raises(ValueError, match="step 2 is damaged"), read_ahead(read, range(9)) as batches:
        assert [next(batches), next(batches)] == [0, 1]
        next(batches)
    assert names_of_threads() == []


def test_leaving_early_waits_for_the_one_that_is_read_and_reads_no_other():
    begun, read = threading.Event(), []

    def slow(step):
        if step == 1:
            begun.set()
            time.sleep(0.05)
        read.append(step)

    with read_ahead(slow, range(9)) as batches:
        next(batches)
        assert begun.wait(5.0) and read == [0]
    assert read == [0, 1] and names_of_threads() == []


@pytest.mark.parametrize(
    "error, told",
    [
        (UserError("The data are damaged."), "The data are damaged; step 6"),
        (OSError(5, "Input/output error"), "The data cannot be read: Input/output error; step 6"),
    ],
    ids=["damaged data", "a disk that fails"],
)
def test_a_run_whose_data_fail_saves_its_state_and_goes_on_later(whole, tmp_path, monkeypatch, error, told):
    read = SegmentSource.batch

    def fail(self, step):
        if step >= 6:
            raise error
        return read(self, step)

    with monkeypatch.context() as patch, pytest.raises(UserError, match=told) as raised:
        patch.setattr(SegmentSource, "batch", fail)
        train(make_config(), tmp_path)
    assert str(raised.value).endswith("; step 6 is saved, and the same command continues from it.")
    assert losses(tmp_path) == losses(whole)[:6] and saved_steps(tmp_path) == [4, 6] and names_of_threads() == []
    train(make_config(), tmp_path)
    assert_same_run(tmp_path, whole)


def damaged_from_call(method, first):
    """Return a method of a source that fails from its call number `first`, from 0, on."""
    calls = itertools.count()

    def call(self, what):
        if next(calls) >= first:
            raise UserError("The data are damaged.")
        return method(self, what)

    return call


@pytest.mark.parametrize(
    "method, calls, told, saved",
    [
        ("batch", 1, "no step is saved", []),  # call 0 is of the check before anything is written
        ("eval_batches", 0, "step 3 is saved, and the same command continues from it", [3]),
    ],
)
def test_a_first_batch_or_an_evaluation_that_fails_tells_what_is_saved(
    tmp_path, monkeypatch, method, calls, told, saved
):
    monkeypatch.setattr(SegmentSource, method, damaged_from_call(getattr(SegmentSource, method), calls))
    with pytest.raises(UserError, match=f"^The data are damaged; {told}.$"):
        train(make_config(eval_every=3), tmp_path)
    assert saved_steps(tmp_path) == saved


@pytest.mark.parametrize("latest, told", [(4, "step 4 is saved, and the same"), (None, "no step is saved")])
def test_of_several_processes_one_whose_data_fail_names_the_checkpoint_before(monkeypatch, latest, told):
    monkeypatch.setattr(loop.jax, "process_count", lambda: 2)
    checkpoints = SimpleNamespace(latest=lambda: latest)  # `save` would wait for the others for ever
    assert told in str(loop._saved_in_spite_of(UserError("The data are damaged."), checkpoints, 6, None))
