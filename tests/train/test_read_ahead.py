"""Batches that are read ahead: the same ones in the same order, few of them, and no thread once they are done with."""

import threading
import time

import pytest

from based_jax.data.segments import SegmentSource
from based_jax.errors import UserError
from based_jax.train.loop import train
from based_jax.train.read_ahead import BATCHES_AHEAD, read_ahead
from tests.helpers.tiny_runs import losses, make_config, parameters, saved_steps


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


def test_a_run_whose_data_fail_ends_there_and_goes_on_later(whole, tmp_path, monkeypatch):
    read = SegmentSource.batch

    def damaged(self, step):
        if step >= 6:
            raise UserError("The data are damaged.")
        return read(self, step)

    with monkeypatch.context() as patch, pytest.raises(UserError, match="The data are damaged"):
        patch.setattr(SegmentSource, "batch", damaged)
        train(make_config(), tmp_path)
    assert losses(tmp_path) == losses(whole)[:5] and saved_steps(tmp_path) == [4] and names_of_threads() == []
    train(make_config(), tmp_path)
    assert parameters(tmp_path) == parameters(whole)
