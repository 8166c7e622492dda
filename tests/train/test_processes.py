"""Several processes that JAX has joined train what one trains on the same mesh."""

import json
import os
import socket
import subprocess
import sys

import jax
import pytest

from based_jax import config as configs
from based_jax import parallel
from based_jax.train.compile import train_program
from based_jax.train.run import TrainConfig

STEPS = 3
LAYERS = [["conv", {}], ["attention", {"num_heads": 2}]]
CONFIG = {
    "model": {"layers": LAYERS, "d_model": 16, "vocab_size": 64, "dtype": "float32"},
    "data": {"kind": "mqar", "preset": "tiny"},
    "optim": {"warmup_steps": 0, "lr": 1e-2},
    "steps": STEPS,
    "batch_size": 8,
    "log_every": 1,
}
PROGRAM = """if True:
    import json, sys

    import jax

    number, count, port, config, workdir = sys.argv[1:]
    jax.distributed.initialize(f"localhost:{port}", int(count), int(number))
    from based_jax import TrainConfig, train
    from based_jax.config import build

    train(build(TrainConfig, json.loads(config)), workdir)
"""


def losses_of_processes(config, workdir, processes, devices):
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    command = [sys.executable, "-c", PROGRAM]
    arguments = [str(processes), str(port), json.dumps(config), str(workdir)]
    running = [subprocess.Popen([*command, str(i), *arguments], env=environment) for i in range(processes)]
    assert [process.wait(timeout=120) for process in running] == [0] * processes
    rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


def losses_of_one_process(config, devices):
    built = configs.build(TrainConfig, config)
    program = train_program(built, parallel.make_mesh(built.mesh, jax.devices()[:devices]))
    source, feed = built.data.open(built.batch_size), parallel.Feed(program.mesh, built.batch_size)
    state, losses = program.initial_state(), []
    for step in range(STEPS):
        state, metrics = program.step(state, feed.arrays(source.batch(step)))
        losses.append(float(metrics["loss"]))
    return losses


@pytest.mark.parametrize(
    "mesh, processes, devices",
    [
        ({"tensor": 2}, 2, 1),
        pytest.param({"fsdp": 2, "tensor": 2}, 2, 2, marks=pytest.mark.long),
        pytest.param({"data": 2, "tensor": 2}, 4, 1, marks=pytest.mark.long),
    ],
)
def test_processes_train_what_one_trains(tmp_path, mesh, processes, devices):
    config = CONFIG | {"mesh": mesh}
    found = losses_of_processes(config, tmp_path, processes, devices)
    assert found == pytest.approx(losses_of_one_process(config, processes * devices), rel=1e-5)
