"""Of all commands on one store one trains a group at a time, and the claims of the dead are taken over."""

import os
import random
import signal
import time

import pytest

from based_jax.store import Store, StoreError
from based_jax.sweep import claims, schedule
from based_jax.sweep.claims import Claims
from based_jax.sweep.schedule import Progress, SweepFailedError, Todo, work_off
from based_jax.train.run import TrainConfig
from tests.helpers.claims import ELSEWHERE, SAID, TRAINED, groups, start


def held(store):
    """Return the names that are claimed."""
    return sorted(path.stem for path in (store.path / "claims").glob("*.lock"))


def wait_for_claims(store, process):
    """Return the names that are claimed as soon as there are any, and their owner is known."""
    while not (names := held(store)) or not (store.path / "claims" / f"{names[0]}.lock").stat().st_size:
        assert process.is_alive()
        time.sleep(0.005)
    return names


def trained(store):
    """Return the names that were trained to their end, in no order, each as often as that was."""
    return sorted((store.path / TRAINED).read_text().split())


def test_a_name_is_claimed_once_until_it_is_given_back(tmp_path):
    store = Store(tmp_path)
    with Claims(store) as mine, Claims(store) as others:
        assert mine.take("a") and mine.take("b")
        assert not others.take("a") and not mine.take("a") and others.take("c")
        mine.give_back("a")
        assert others.take("a") and held(store) == ["a", "b", "c"]
    assert not mine.take("d") and not list(tmp_path.iterdir())


def test_the_claim_of_a_process_that_was_killed_counts_no_more(tmp_path):
    store = Store(tmp_path)
    process = start(store, 1, 60)
    [name] = wait_for_claims(store, process)
    with Claims(store) as mine:
        assert not mine.take(name)
        process.kill()
        process.join()
        assert held(store) == [name] and mine.take(name)
    assert not held(store)


def test_the_claim_of_another_host_is_taken_over_once_it_was_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "CLAIM_SECONDS", 0.3)
    store = Store(tmp_path)
    (tmp_path / "claims").mkdir()
    claim = tmp_path / "claims" / "a.lock"
    claim.write_text(ELSEWHERE)
    with Claims(store) as mine:
        for _ in range(5):  # its owner is alive
            assert not mine.take("a")
            time.sleep(0.1)
            claim.touch()
        begin = time.monotonic()
        while not mine.take("a"):
            time.sleep(0.02)
        assert 0.2 < time.monotonic() - begin < 2


@pytest.mark.parametrize(
    "make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("none"), lambda path: path.symlink_to("/dev/zero")]
)
def test_a_claim_that_is_no_file_is_one_sentence(tmp_path, make):
    (tmp_path / "claims").mkdir()
    make(tmp_path / "claims" / "a.lock")
    with Claims(Store(tmp_path)) as mine, pytest.raises(StoreError, match=r"^Claim '.*/a\.lock' cannot be written: I"):
        mine.take("a")
    assert os.path.lexists(tmp_path / "claims" / "a.lock")


def test_the_claim_of_who_was_killed_before_writing_it_is_taken_over(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "UNWRITTEN_SECONDS", 0.1)
    (tmp_path / "claims").mkdir()
    claim = tmp_path / "claims" / "a.lock"
    claim.touch()
    with Claims(Store(tmp_path)) as mine, Claims(Store(tmp_path)) as others:
        assert not mine.take("a") and not others.take("a")
        time.sleep(0.15)
        assert not mine.take("a") and mine.take("a")  # which it removes first
        written = claim.read_text()
        unwritten = others._unwritten["a"]
        unwritten.remove(claim)  # too late: it puts back what it finds
        assert claim.read_text() == written and not others.take("a") and not others.take("a")
    assert not list(tmp_path.iterdir())


def fill(store, train, count=3, said=None):
    """Work off some groups in this process."""
    progress = Progress(Todo(groups(count), store), store, (said if said is not None else []).append)
    work_off(progress, [lambda group: train(progress, group)])
    return progress.count


def finish(progress, group):
    [(_, config)] = group
    progress.finish({"id": config.id, "seconds": 1.0}, config.id)


def test_no_claim_stays_when_groups_fail_or_a_command_is_interrupted(tmp_path):
    store = Store(tmp_path)

    def end_of(error):
        def train(progress, group):
            assert len(held(store)) == 1
            raise error

        return train

    with pytest.raises(SweepFailedError, match=r"3 of 3 groups failed: .*KeyError"):
        fill(store, end_of(KeyError("x")))
    assert not held(store)
    with pytest.raises(KeyboardInterrupt):
        fill(store, end_of(KeyboardInterrupt()))
    assert not held(store) and not store.rows()
    assert fill(store, finish) == 3 and not held(store)


def test_after_an_interrupt_no_row_is_written_of_what_others_may_train_now(tmp_path):
    store = Store(tmp_path)
    progress = Progress(Todo(groups(1), store), store, lambda text: None)
    progress.stop()
    finish(progress, progress.todo.groups[0])
    assert not store.rows()


def test_a_sweep_waits_for_what_others_train_and_takes_what_they_leave(tmp_path, monkeypatch):
    monkeypatch.setattr(schedule, "SECONDS_BETWEEN_LOOKS", 0.05)
    store, said = Store(tmp_path), []
    [[(_, first)], [(_, second)], _] = groups(3)
    with Claims(store) as others:
        assert others.take(first.id) and others.take(second.id)

        def train(progress, group):
            if len(store.rows()) == 0:
                finish(progress, group)  # the third; the others finish the first one, and leave the second
                Store(tmp_path).append({"id": first.id})
                for name in (first.id, second.id):
                    others.give_back(name)
            else:
                assert group == [({"seed": 1}, second)]
                finish(progress, group)

        assert fill(store, train, said=said) == 2
    assert len(store.rows()) == 3 and [text[:5] for text in said] == ["[1/3,", "[3/3,"]


def test_waiting_is_told_once(tmp_path, monkeypatch):
    monkeypatch.setattr(schedule, "SECONDS_BETWEEN_LOOKS", 0.02)
    store, said = Store(tmp_path), []
    process = start(store, 1, 0.3)
    wait_for_claims(store, process)
    assert fill(store, finish, 1, said) == 0
    assert said == ["All that is left is claimed by other commands on this store; waiting for them."]
    process.join()
    assert process.exitcode == 0


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_command_that_is_interrupted_leaves_no_claim(how, tmp_path):
    store = Store(tmp_path)
    process = start(store, 3, 60)
    wait_for_claims(store, process)
    os.kill(process.pid, how)
    process.join(timeout=20)
    assert process.exitcode == 130 and "the same command goes on" in (tmp_path / SAID).read_text()
    assert not held(store) and not store.rows()


NUMBER = 60


def ids():
    """Return the names of `NUMBER` groups, in order."""
    return sorted(config.id for [(_, config)] in groups(NUMBER))


def work_off_by_two(store):
    """Let two commands train what is left, to its end."""
    commands = [start(store, NUMBER, 0.005) for _ in range(2)]
    for command in commands:
        command.join()
    assert [command.exitcode for command in commands] == [0, 0] and not held(store)
    lines = [line for path in store.path.glob("*.jsonl") for line in path.read_text().splitlines()]
    assert len(lines) == NUMBER and sorted(store.ids()) == ids()


def test_two_commands_train_each_group_once(tmp_path):
    store = Store(tmp_path)
    work_off_by_two(store)
    assert trained(store) == ids() and len(list(tmp_path.glob("*.jsonl"))) == 2


def test_after_commands_were_killed_at_random_each_group_has_one_row(tmp_path):
    store, chance = Store(tmp_path), random.Random(0)
    for _ in range(4):
        commands = [start(store, NUMBER, 0.15) for _ in range(2)]
        wanted = len(store.rows()) + chance.randint(0, 4)
        while len(store.rows()) < wanted:
            assert all(command.is_alive() for command in commands)
            time.sleep(0.005)
        for command in commands:
            time.sleep(chance.uniform(0, 0.05))
            os.kill(command.pid, chance.choice([signal.SIGKILL, signal.SIGINT, signal.SIGTERM]))
        for command in commands:
            command.join()
            assert command.exitcode != 0
    assert 0 < len(store.rows()) < NUMBER
    work_off_by_two(store)
    assert sorted(set(trained(store))) == ids()


def test_a_claim_is_of_what_trains_together():
    [[(_, config)]] = groups(1)
    assert isinstance(config, TrainConfig) and schedule.claim_name(groups(1)[0]) == config.id
