"""Many processes as one run: how they meet, what each feeds, and how all end."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import jax
import pytest

from based_jax import parallel
from based_jax.errors import UserError
from based_jax.train import hosts
from based_jax.train.compile import train_program
from based_jax.train.hosts import Place, found_place, given_place
from based_jax.train.run import TrainConfig

CONFIG = """
CONFIG = {
    "model": {"layers": (("conv", {}), ("attention", {"num_heads": 2})), "d_model": 16, "vocab_size": 64,
              "dtype": "float32"},
    "data": {"kind": "mqar", "preset": "tiny"},
    "optim": {"warmup_steps": 0, "lr": 1e-2},
    "steps": %d, "batch_size": 8, "log_every": 1, "seed": 3, "mesh": %r,
}


def get_config():
    return CONFIG
"""
TORCHRUN = {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "29500", "WORLD_SIZE": "16", "RANK": "9"}


def free_port():
    with hosts.socket.create_server(("localhost", 0)) as server:
        return server.getsockname()[1]


@pytest.mark.parametrize(
    "coordinator, count, number, words",
    [
        ("10.0.0.1", 2, 0, "The coordinator is '10.0.0.1'; it is HOST:PORT"),
        (":80", 2, 0, "it is HOST:PORT"),
        ("a:b", 2, 0, "it is HOST:PORT"),
        ("a:70000", 2, 0, "it is HOST:PORT"),
        ("a:80", 2, 2, "number is 2; it is at least 0 and below 2"),
        ("a:80", 2, -1, "number is -1; it is at least 0 and below 2"),
    ],
)
def test_an_impossible_place_is_named(coordinator, count, number, words):
    with pytest.raises(UserError, match=words):
        given_place(coordinator, count, number)


def test_a_place_is_found_in_the_environment(monkeypatch):
    assert given_place("[fd00::1]:80", 2, 1) == Place("fd00::1", 80, 1, 2)
    assert found_place(TORCHRUN) == Place("10.0.0.7", 29501, 9, 16)
    several = TORCHRUN | {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8"}
    assert found_place(several).local_devices == (1,)
    with pytest.raises(UserError, match="must be whole numbers"):
        found_place(TORCHRUN | {"RANK": "first"})
    slurm = {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "node[3-4]", "SLURM_NTASKS": "2", "SLURM_PROCID": "1"}
    for name, value in (slurm | {"SLURM_LOCALID": "0", "SLURM_STEP_NUM_NODES": "2"}).items():
        monkeypatch.setenv(name, value)
    assert (found_place({}).host, *found_place({})[2:4]) == ("node3", 1, 2)
    for name in slurm:
        monkeypatch.delenv(name)
    with pytest.raises(UserError, match="There is no cluster around this process"):
        found_place({})


def met(*places, timeout=5.0):
    """Return what each process has of a meeting: the port for JAX, or its sentence."""
    found = [None] * len(places)

    def meet(which):
        try:
            found[which] = hosts._meet(places[which], timeout)
        except UserError as error:
            found[which] = str(error)

    threads = [threading.Thread(target=meet, args=(which,)) for which in range(len(places))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_processes_meet_whichever_comes_first():
    port = free_port()
    first, *others = met(*(Place("localhost", port, number, 3) for number in range(3)))
    assert sorted(first[0]) == [1, 2] and first[1] not in (0, port)
    assert all(list(connections) == [0] and jax_port == first[1] for connections, jax_port in others)
    assert hosts._meet(Place("localhost", port, 0, 1), 1.0) == ({}, 0)


def test_who_does_not_come_is_named():
    port = free_port()
    where = f"localhost:{port} within 0.5 s"
    zero, two = met(Place("localhost", port, 0, 4), Place("localhost", port, 2, 4), timeout=0.5)
    assert zero == two == f"Of 4 processes, processes 1, 3 did not come to {where}."
    (alone,) = met(Place("localhost", port, 1, 2), timeout=0.5)
    assert alone.startswith(f"Process 1 of 2 found nobody at {where}, where process 0 listens: ")


def test_processes_that_were_told_otherwise_are_refused():
    port = free_port()
    one = Place("localhost", port, 1, 3)
    assert met(Place("localhost", port, 0, 3), one, one) == ["Two processes have the number 1."] * 3
    other = one._replace(num_processes=2)
    assert met(Place("localhost", port, 0, 3), other) == ["Process 1 was told of 2 processes, and process 0 of 3."] * 2


class Processes:
    """A training of several processes with so many CPU devices each."""

    def __init__(self, folder, steps, mesh, processes, devices=1):
        (folder / "config.py").write_text(CONFIG % (steps, mesh))
        self.workdir, port = folder / "run", free_port()
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
        command = [sys.executable, "-m", "based_jax", "train", f"--config={folder / 'config.py'}"]
        command += [f"--workdir={self.workdir}", f"--coordinator=localhost:{port}", f"--num-processes={processes}"]
        self.all = [
            subprocess.Popen([*command, f"--process-id={number}"], env=environment, stderr=subprocess.PIPE, text=True)
            for number in range(processes)
        ]

    def rows(self):
        """Return the rows of training steps."""
        path = self.workdir / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [row for row in map(json.loads, lines) if "loss" in row]

    def ends(self):
        """Return exit codes and last lines of all."""
        said = [process.communicate(timeout=120)[1].splitlines() for process in self.all]
        return [(process.returncode, lines[-1] if lines else "") for process, lines in zip(self.all, said, strict=True)]

    def wait_for_step(self, step):
        while not any(row["step"] >= step for row in self.rows()):
            assert all(process.poll() is None for process in self.all)
            time.sleep(0.1)


def losses_of_one_process(folder, steps, mesh, devices):
    """Return what the same config makes of the same mesh in this process."""
    from based_jax import config as configs

    (folder / "config.py").write_text(CONFIG % (steps, mesh))
    config = configs.build(TrainConfig, configs.load(str(folder / "config.py"), []))
    program = train_program(config, parallel.make_mesh(mesh, jax.devices()[:devices]))
    source, feed = config.data.open(8), parallel.Feed(program.mesh, 8)
    state, losses = program.initial_state(), []
    for step in range(steps):
        state, metrics = program.step(state, feed.arrays(source.batch(step)))
        losses.append(float(metrics["loss"]))
    return losses


@pytest.mark.parametrize(
    "mesh, processes, devices",
    [
        ({"tensor": 2}, 2, 1),
        pytest.param({"fsdp": 2}, 2, 1, marks=pytest.mark.long),
        pytest.param({"fsdp": 2, "tensor": 2}, 2, 2, marks=pytest.mark.long),
        pytest.param({"data": 2, "tensor": 2}, 4, 1, marks=pytest.mark.long),
    ],
)
def test_processes_train_what_one_trains(tmp_path, mesh, processes, devices):
    run = Processes(tmp_path, 3, mesh, processes, devices)
    assert run.ends() == [(0, "")] * processes
    wanted = losses_of_one_process(tmp_path, 3, mesh, processes * devices)
    assert [row["loss"] for row in run.rows()] == pytest.approx(wanted, rel=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_others_with_a_sentence_and_all_continue(tmp_path, victim):
    run = Processes(tmp_path, 4000, {"data": 2}, 2)
    run.wait_for_step(5)
    run.all[victim].kill()
    ends = run.ends()
    assert ends[victim][0] == -signal.SIGKILL
    sentence = f"Error: Process {victim} of 2 is gone, and this one stops; begin all again to continue."
    assert ends[1 - victim] == (1, sentence)


@pytest.mark.long
def test_a_signal_to_one_process_stops_all_and_they_continue(tmp_path):
    for heard, victim, code in ((signal.SIGTERM, 1, 0), (signal.SIGINT, 0, 130)):
        run = Processes(tmp_path, 4000, {"data": 2}, 2)
        run.wait_for_step(5 if heard == signal.SIGTERM else run.rows()[-1]["step"] + 5 if run.rows() else 5)
        run.all[victim].send_signal(heard)
        ends = run.ends()
        assert (ends[victim][0], ends[1 - victim][0]) == (code, 0)
    steps = [row["step"] for row in run.rows()]
    assert steps == list(range(1, len(steps) + 1))
    one = losses_of_one_process(tmp_path, 5, {"data": 2}, 2)
    assert [row["loss"] for row in run.rows()[:5]] == pytest.approx(one, rel=1e-5)


@pytest.mark.long
def test_one_process_that_is_wrong_is_told_by_all(tmp_path):
    (tmp_path / "run").mkdir()
    run = Processes(tmp_path, 10, {"data": 3}, 2)
    ends = run.ends()
    assert {code for code, _ in ends} == {2} and all("needs 3 devices; there are 2" in line for _, line in ends)
