"""Many processes as one run: who they are, and how they meet."""

import contextlib
import json
import socket
import threading
import time

import pytest

from based_jax.errors import UserError
from based_jax.train import hosts
from based_jax.train.hosts import Place, found_place, given_place
from tests.helpers.processes import free_port

TORCHRUN = {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "29500", "WORLD_SIZE": "16", "RANK": "9"}


@pytest.mark.parametrize(
    "coordinator, count, number, words",
    [
        ("10.0.0.1", 2, 0, "The coordinator is '10.0.0.1'; it is HOST:PORT"),
        (":80", 2, 0, "it is HOST:PORT"),
        ("a:b", 2, 0, "it is HOST:PORT"),
        ("a:70000", 2, 0, "it is HOST:PORT"),
        ("a:80", 0, 0, "The number of processes is 0; it is at least 1"),
        ("a:80", 2, 2, "number is 2; it is at least 0 and below 2"),
        ("a:80", 2, -1, "number is -1; it is at least 0 and below 2"),
    ],
)
def test_an_impossible_place_is_named(coordinator, count, number, words):
    with pytest.raises(UserError, match=words):
        given_place(coordinator, count, number)


SLURM = {
    "SLURM_JOB_ID": "1",
    "SLURM_STEP_NODELIST": "node[3-4]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NUM_NODES": "2",
}


def test_a_place_is_found_in_the_environment(monkeypatch):
    assert given_place("[fd00::1]:80", 2, 1) == Place("fd00::1", 80, 1, 2)
    assert found_place(TORCHRUN | {"LOCAL_WORLD_SIZE": "1"}) == Place("10.0.0.7", 29501, 9, 16)
    with pytest.raises(UserError, match="must be whole numbers"):
        found_place(TORCHRUN | {"RANK": "first"})
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    assert (found_place({}).host, *found_place({})[2:4]) == ("node3", 1, 2)
    for name in SLURM:
        monkeypatch.delenv(name)
    with pytest.raises(UserError, match="There is no cluster around this process"):
        found_place({})


@pytest.mark.parametrize(
    "environment, devices",
    [
        ({"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8"}, (1,)),
        ({"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}, None),
        ({"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8", "CUDA_VISIBLE_DEVICES": "1"}, None),
        ({"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}, (1,)),
    ],
)
def test_a_process_of_several_on_a_host_takes_its_device_and_one_alone_all(environment, devices):
    assert found_place(TORCHRUN | environment).local_devices == devices


@pytest.mark.parametrize("tasks, devices", [("1(x2)", None), ("1", None), ("8(x2)", (0,)), ("2,1", (0,))])
def test_a_task_of_slurm_that_is_alone_on_its_node_takes_all_devices(tasks, devices, monkeypatch):
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    assert found_place({"SLURM_STEP_TASKS_PER_NODE": tasks}).local_devices == devices


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


def test_an_interruption_is_told_in_words():
    assert hosts._reason(KeyboardInterrupt()) == "Stopped by Ctrl-C."
    assert hosts._reason(UserError("a\nb")) == "a b" and hosts._reason(ValueError()) == "ValueError()"


def test_who_does_not_come_is_named():
    port = free_port()
    where = f"localhost:{port} within 0.5 s"
    zero, two = met(Place("localhost", port, 0, 4), Place("localhost", port, 2, 4), timeout=0.5)
    assert zero == two == f"Of 4 processes, processes 1, 3 did not come to {where}."
    (alone,) = met(Place("localhost", port, 1, 2), timeout=0.5)
    assert alone.startswith(f"Process 1 of 2 found nobody at {where}, where process 0 listens: ")
    (alone,) = met(Place("localhost", port, 0, 99), timeout=0.1)
    assert "18, 19, 20 and 78 more did not come" in alone
    (alone,) = met(Place("a..b", port, 1, 2), timeout=0.1)
    assert alone == f"The coordinator is 'a..b:{port}', whose host is no name and no address."


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="there is no IPv6 here")
def test_processes_meet_at_an_address_of_ipv6():
    port = free_port()
    places = [given_place(f"[::1]:{port}", 2, number) for number in range(2)]
    first, other = met(*places)
    assert first[1] == other[1] and places[0].address(80) == "[::1]:80"


@pytest.mark.parametrize("said", [b"1\n", b"[]\n", b"GET / HTTP/1.1\r\n\r\n", b'{"process": "1"}\n'])
def test_what_is_none_of_the_processes_is_not_listened_to(said):
    port = free_port()

    def call():
        with contextlib.suppress(OSError), _connected(port) as connection:
            connection.sendall(said)
            connection.recv(1)

    thread = threading.Thread(target=call)
    thread.start()
    (zero,) = met(Place("localhost", port, 0, 2), timeout=0.5)
    thread.join()
    assert zero.startswith("Of 2 processes, process 1 did not come")


@pytest.mark.parametrize("seconds", [0.0, 0.3])
def test_a_process_that_was_killed_in_the_meeting_comes_again(seconds):
    """At once, or when all others have come."""
    port, others = free_port(), []

    def come(number):
        others.extend(met(Place("localhost", port, number, 3)))

    def come_twice():
        with _connected(port) as connection:
            connection.sendall(b'{"process": 1, "of": 3}\n')
        other = threading.Thread(target=come, args=(2,))
        other.start()
        time.sleep(seconds)
        come(1)
        other.join()

    thread = threading.Thread(target=come_twice)
    thread.start()
    (zero,) = met(Place("localhost", port, 0, 3))
    thread.join()
    assert sorted(zero[0]) == [1, 2] and [other[1] for other in others] == [zero[1]] * 2


def _connected(port):
    """Return a connection to who listens there, or soon will."""
    while True:
        with contextlib.suppress(ConnectionRefusedError):
            return socket.create_connection(("localhost", port), timeout=5)
        time.sleep(0.02)


def test_what_hangs_up_is_not_process_0():
    with socket.create_server(("localhost", 0)) as server:
        threading.Thread(target=lambda: server.accept()[0].close()).start()
        (one,) = met(Place("localhost", server.getsockname()[1], 1, 2), timeout=0.5)
    assert one.startswith("Process 1 of 2 had no answer from process 0")


def test_processes_that_were_told_otherwise_are_refused():
    port = free_port()
    one = Place("localhost", port, 1, 3)
    assert met(Place("localhost", port, 0, 3), one, one) == ["Two processes have the number 1."] * 3
    other = one._replace(num_processes=2)
    assert met(Place("localhost", port, 0, 3), other) == ["Process 1 was told of 2 processes, and process 0 of 3."] * 2


def connected_pair():
    """Return both ends of a connection by TCP, as of two processes."""
    with socket.create_server(("localhost", 0)) as server:
        other = socket.create_connection(server.getsockname())
        return server.accept()[0], other


FULL = "The disk is full."


@pytest.mark.parametrize("message, told", [(None, "is gone"), ({"ended": FULL}, f"stopped: {FULL}")])
@pytest.mark.parametrize("together", [True, False])
def test_a_process_that_ends_ends_those_alone_that_compute_with_it(monkeypatch, capsys, together, message, told):
    codes = []
    monkeypatch.setattr(hosts, "_leave", codes.append)
    monkeypatch.setattr(hosts, "GRACE_SECONDS", 0.01)
    (own, one), (other, two) = connected_pair(), connected_pair()
    with own, other, one, two, two.makefile() as heard:
        watch = hosts._Watch(Place("localhost", 1, 0, 3), {1: own, 2: other}, together)
        thread = threading.Thread(target=watch._listen)
        thread.start()
        if message is not None:
            hosts._send(one, message)
        one.close()
        assert json.loads(heard.readline())["lost"].startswith(f"Process 1 of 3 {told}")
        hosts._send(two, {"ended": None})
        thread.join(5)
    said = capsys.readouterr().err
    assert f"Process 1 of 3 {told}" in said and said.startswith("Error: ") == together
    assert codes == [1] * together and not thread.is_alive()
