import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from based_jax.train.preemption import Preemption


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_seen_once_and_the_handler_is_put_back(signum):
    before = signal.getsignal(signum)
    with Preemption() as preemption:
        assert not preemption.reached(1)
        os.kill(os.getpid(), signum)
        assert preemption.reached(2)
        assert preemption.reached(3)
        assert preemption.interrupted == (signum == signal.SIGINT)
        assert signal.getsignal(signum) == before
    assert signal.getsignal(signum) == before


def test_a_second_ctrl_c_acts_as_it_would_without():
    with Preemption() as preemption, pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        assert preemption.reached(1)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)


def test_a_signal_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Preemption() as preemption:
            os.kill(os.getpid(), signal.SIGINT)
            assert not preemption.reached(1)
    finally:
        signal.signal(signal.SIGINT, before)


def test_without_a_signal_the_handler_is_put_back_too():
    before = signal.getsignal(signal.SIGTERM)
    with Preemption() as preemption:
        assert signal.getsignal(signal.SIGTERM) != before
    assert not preemption.reached(1)
    assert signal.getsignal(signal.SIGTERM) == before


def test_another_thread_listens_to_nothing():
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def work():
        with Preemption() as preemption:
            seen.append((signal.getsignal(signal.SIGTERM) == before, preemption.reached(1)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(True, False)]


LOOP = """
    import time
    from based_jax.train.preemption import Preemption

    {setup}
    with Preemption() as preemption:
        for step in range(10_000):
            if step == 1:
                print("running", flush=True)
            if preemption.reached(step):
                print("saved", flush=True)
                break
            time.sleep(0.01)
"""


def terminated(setup):
    code = textwrap.dedent(LOOP).format(setup=setup)
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "running\n"
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    return process.returncode, output


def test_a_terminated_process_saves_and_ends_well():
    assert terminated("") == (0, "saved\n")


def test_jax_listens_where_it_is_distributed():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    code, output = terminated(f"import jax; jax.distributed.initialize('localhost:{port}', 1, 0)")
    assert output == "saved\n"
    assert code == 0
