"""Several processes train what one trains on the same mesh, and end, stop and go on together."""

import re
import signal

import pytest

from tests.helpers.processes import BASE, Processes, losses_of_one_process


@pytest.fixture
def start(tmp_path):
    """Return `(config, processes, ...) -> Processes` in the test's folder; none outlives the test."""
    begun = []

    def begin(config, processes, folder=tmp_path, **options):
        begun.append(Processes(folder, config, processes, **options))
        return begun[-1]

    yield begin
    for run in begun:
        run.kill()


@pytest.mark.parametrize(
    "mesh, processes, devices",
    [
        ({"tensor": 2}, 2, 1),
        pytest.param({"fsdp": 2}, 2, 1, marks=pytest.mark.long),
        pytest.param({"sequence": 2}, 2, 1, marks=pytest.mark.long),
        pytest.param({"fsdp": 2, "tensor": 2}, 2, 2, marks=pytest.mark.long),
        pytest.param({"data": 2, "tensor": 2}, 4, 1, marks=pytest.mark.long),
    ],
)
def test_processes_train_what_one_trains(start, mesh, processes, devices):
    config = BASE | {"steps": 3, "mesh": mesh}
    run = start(config, processes, devices=devices)
    assert [code for code, _ in run.ends()] == [0] * processes
    assert run.losses() == pytest.approx(losses_of_one_process(config, processes * devices), rel=1e-5)
    assert "step 3/3" in run.said[0][0]
    assert not any("step" in stdout for stdout, _ in run.said[1:])


@pytest.mark.long
def test_processes_evaluate_what_one_evaluates(start):
    run = start(BASE | {"steps": 2, "mesh": {"data": 2}}, 2)
    run.ends()
    several = start(BASE, 2, command="eval")
    one = start(BASE, 1, command="eval")
    assert [code for code, _ in several.ends() + one.ends()] == [0] * 3
    found, wanted = (re.findall(r"^(\S+) +([\d.]+)$", run.said[0][0], re.MULTILINE) for run in (several, one))
    assert found == wanted and dict(found)["loss"]


@pytest.mark.long
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_others_with_a_sentence_and_all_go_on_bitwise(start, tmp_path, victim):
    config = BASE | {"steps": 400, "mesh": {"data": 2}, "checkpoint": {"every": 20, "keep": 3}}
    run = start(config, 2)
    run.wait_for_step(70)
    run.all[victim].kill()
    ends = run.ends()
    assert ends[victim][0] == -signal.SIGKILL
    sentence = f"Error: Process {victim} of 2 is gone, and this one stops; begin all again to continue."
    assert ends[1 - victim] == (1, sentence)

    again = start(config, 2)
    assert [code for code, _ in again.ends()] == [0, 0]
    assert "continuing from step" in again.said[0][0]
    (tmp_path / "whole").mkdir()
    whole = start(config, 2, tmp_path / "whole")
    assert [code for code, _ in whole.ends()] == [0, 0]
    assert again.losses() == whole.losses()


@pytest.mark.long
def test_a_run_goes_on_with_fewer_processes_and_on_another_mesh(start):
    config = BASE | {"steps": 60, "mesh": {"data": 4}, "checkpoint": {"every": 20}}
    run = start(config, 4)
    run.wait_for_step(21)
    run.all[3].kill()
    run.ends()
    smaller = start(config | {"mesh": {"fsdp": 2}}, 2)
    assert [code for code, _ in smaller.ends()] == [0, 0]
    assert smaller.losses() == pytest.approx(losses_of_one_process(config, 4), rel=1e-3)


@pytest.mark.long
def test_a_signal_to_one_process_stops_all_and_they_go_on(start):
    config = BASE | {"steps": 4000, "mesh": {"data": 2}}
    step = 0
    for heard, victim, code in ((signal.SIGTERM, 1, 0), (signal.SIGINT, 0, 130), (signal.SIGTERM, 0, 0)):
        run = start(config, 2)
        run.wait_for_step(step + 5)
        run.all[victim].send_signal(heard)
        ends = run.ends()
        assert (ends[victim][0], ends[1 - victim][0]) == (code, 0)
        step = run.rows()[-1]["step"]
    assert run.losses()[:30] == pytest.approx(losses_of_one_process(config, 2, steps=min(step, 30)), rel=1e-3)


@pytest.mark.long
def test_one_process_that_is_wrong_is_told_by_all(start):
    ends = start(BASE | {"mesh": {"data": 3}}, 2).ends()
    assert {code for code, _ in ends} == {2} and all("needs 3 devices; there are 2" in line for _, line in ends)


@pytest.mark.long
@pytest.mark.parametrize("more, word", [("--config.optim.lr=0.5", "optim.lr"), ("--workdir=elsewhere", "workdir")])
def test_processes_that_were_given_something_else_are_refused(start, tmp_path, more, word):
    ends = start(BASE, 2, more=(more,)).ends()
    assert [code for code, _ in ends] == [1, 2]
    assert all(re.search(f"{word} is .* in process 0 and .* in process 1; all processes", line) for _, line in ends)
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_a_run_of_several_processes_is_alone_in_its_workdir(start):
    config = BASE | {"steps": 4000, "mesh": {"data": 2}}
    first = start(config, 2)
    first.wait_for_step(1)
    alone, several = start(config | {"mesh": {}}, 1), start(config, 2)
    for code, line in alone.ends() + several.ends():
        assert code in (1, 2) and "is trained in by" in line
    first.all[0].send_signal(signal.SIGTERM)
    assert [code for code, _ in first.ends()] == [0, 0]
