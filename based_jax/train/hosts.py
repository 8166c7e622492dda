"""Many processes as one run: who they are, how they meet before any backend starts, and how all end when one does.

JAX ends a process that misses another one with a stack trace of its own. So the processes meet by themselves first, at
the coordinator's address, and keep these connections: the system closes those of a process that ends, at once where it
is killed, after `SILENCE_SECONDS` where its host is gone. Process 0 tells the others, and each says so in a sentence.

    process 1, 2, ..                         process 0
        {"process": 1, "of": 3}      ->          all are there?
                                     <-      {"jax_port": 41231}
        {"ended": null}              ->          1 has finished, or
        {"ended": "its sentence"}    ->          1 has stopped:   {"lost": "Process 1 of 3 ..."} to all others

Processes that share no devices, those of a sweep, need no other one to go on: they say so, and do.
"""

import atexit
import contextlib
import json
import os
import re
import selectors
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import jax

from based_jax.data.corpus import shortened
from based_jax.errors import UserError
from based_jax.train.coordination_service import in_a_process_of_its_own
from based_jax.train.preemption import AgreedStop

MEETING_SECONDS = 300
"""How long a process waits for the others unless told otherwise."""
SILENCE_SECONDS = 30
"""After which a host that answers nothing is gone."""
HELLO_SECONDS = 5.0
GRACE_SECONDS = 2.0
"""What a process has to say by itself what is wrong, before it says that another one found it wrong."""
STOPS = ", and this one stops; begin all again to continue."
GOES_ON = "; this one goes on, with what that had begun too."
LOST_EXIT_CODE, WRONG_EXIT_CODE, INTERRUPTED_EXIT_CODE = 1, 2, 130
TORCHRUN = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK")
PROCESSES_OF_HOST = ("LOCAL_WORLD_SIZE", "SLURM_STEP_TASKS_PER_NODE", "OMPI_COMM_WORLD_LOCAL_SIZE")


class Place(NamedTuple):
    """Which of how many processes this one is.

    Attributes:
      host, port: where process 0 listens.
      process_id, num_processes: this one's number, from 0, and how many there are.
      local_devices: those of its host that it takes; None for all.
    """

    host: str
    port: int
    process_id: int
    num_processes: int
    local_devices: tuple[int, ...] | None = None

    @property
    def name(self) -> str:
        """What to call the process."""
        return f"Process {self.process_id} of {self.num_processes}"

    def address(self, port: int | None = None) -> str:
        """Return where process 0 listens, as HOST:PORT, or another port of its host."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{port or self.port}"


def given_place(coordinator: str, num_processes: int, process_id: int) -> Place:
    """Return the place that a user gives; UserError for an impossible one."""
    host, colon, port = coordinator.rpartition(":")
    if not host or not colon or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(f"The coordinator is '{coordinator}'; it is HOST:PORT, such as 10.0.0.1:8476.")
    if num_processes < 1:
        raise UserError(f"The number of processes is {num_processes}; it is at least 1.")
    if not 0 <= process_id < num_processes:
        raise UserError(
            f"The process' number is {process_id}; it is at least 0 and below {num_processes}, how many are."
        )
    return Place(host.strip("[]"), int(port), process_id, num_processes)


def found_place(environment: Mapping[str, str] = os.environ) -> Place:
    """Return the place that the environment gives: torchrun's variables, or a cluster that JAX knows.

    Raises:
      UserError: there is none, or it says nothing sensible.
    """
    if all(environment.get(name) for name in TORCHRUN):
        host, *numbers = (environment[name] for name in TORCHRUN)
        try:
            port, count, rank = map(int, numbers)
            local = int(environment.get("LOCAL_RANK", "0"))
        except ValueError:
            raise UserError(
                f"The variables {', '.join(TORCHRUN[1:])} are {', '.join(numbers)} and LOCAL_RANK is"
                f" {environment.get('LOCAL_RANK', '0')}; they must be whole numbers."
            ) from None
        # torchrun itself listens at MASTER_PORT.
        return given_place(f"{host}:{port + 1}", count, rank)._replace(local_devices=_own_devices([local], environment))
    # JAX knows SLURM, Open MPI, GKE, Cloud TPU and Kubernetes, and has no public name for what it found.
    from jax._src.clusters import ClusterEnv

    with contextlib.suppress(Exception):  # each cluster fails in its own way where half of its variables are there
        address, processes, number, own = ClusterEnv.auto_detect_unset_distributed_params(
            None, None, None, None, None, MEETING_SECONDS
        )
        if address is not None and processes is not None and number is not None:
            return given_place(address, processes, number)._replace(local_devices=_own_devices(own, environment))
    raise UserError(
        "There is no cluster around this process: no variables of SLURM, Open MPI, GKE, Cloud TPU, Kubernetes or "
        "torchrun; give --coordinator, --num-processes and --process-id."
    )


def _own_devices(numbers: Sequence[int] | None, environment: Mapping[str, str]) -> tuple[int, ...] | None:
    """Return the devices that a process takes, by its number on its host: all that it sees where it is alone there.

    JAX would give the first process of a host the first device alone, and look for the fourth one in a process that
    sees but its own.
    """
    on_host = next((environment[name] for name in PROCESSES_OF_HOST if environment.get(name)), "")
    alone = re.match(r"1(\(x\d+\))?$", on_host)
    sees_one = "," not in environment.get("CUDA_VISIBLE_DEVICES", ",")
    return None if numbers is None or alone or sees_one else tuple(numbers)


@contextlib.contextmanager
def together(place: Place, timeout: float = MEETING_SECONDS, *, devices: bool = True) -> Iterator[None]:
    """Make this process one of several while open: all have begun, and all end with one.

    Nothing of JAX may have asked for a device before.

    Args:
      place: which of them this one is.
      timeout: seconds to wait for the others.
      devices: whether JAX computes on the devices of all together, or each process on its own and goes on where
        another one ends.

    Raises:
      UserError: a process does not come, or two have the same number.
    """
    connections, port = _meet(place, timeout)
    watch = _Watch(place, connections, together=devices)
    watch.start()
    try:
        if place.num_processes > 1 and devices:
            with in_a_process_of_its_own():
                jax.distributed.initialize(
                    place.address(port),
                    place.num_processes,
                    place.process_id,
                    local_device_ids=place.local_devices,
                    cluster_detection_method="deactivate",
                    initialization_timeout=int(timeout),
                )
        yield
        watch.end()
    except BaseException as error:
        watch.end() if isinstance(error, AgreedStop) else watch.fail(_reason(error))
        known = {UserError: WRONG_EXIT_CODE, KeyboardInterrupt: INTERRUPTED_EXIT_CODE, SystemExit: LOST_EXIT_CODE}
        code = next((code for kind, code in known.items() if isinstance(error, kind)), None)
        if code is None and devices:
            watch.wait_for_a_loss()  # a collective fails a moment before the other process is known to be gone
        if jax.distributed.is_initialized() and not isinstance(error, AgreedStop):
            atexit.register(_leave, code or LOST_EXIT_CODE)
        raise


def _reason(error: BaseException) -> str:
    """Return what the other processes are told of an error."""
    said = " ".join(str(error).split())
    return said or ("Stopped by Ctrl-C." if isinstance(error, KeyboardInterrupt) else repr(error))


def _leave(code: int) -> None:
    """End without a word to JAX's service, at which processes that have ended otherwise are waited for."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _meet(place: Place, timeout: float) -> tuple[dict[int, socket.socket], int]:
    """Return connections to others by their numbers, of process 0 alone to all of them, and the port for JAX."""
    if place.num_processes == 1:
        return {}, 0
    deadline = time.monotonic() + timeout
    return _gather(place, deadline, timeout) if place.process_id == 0 else _join(place, deadline, timeout)


def _gather(place: Place, deadline: float, timeout: float) -> tuple[dict[int, socket.socket], int]:
    found: dict[int, socket.socket] = {}
    missing = set(range(1, place.num_processes))

    def refuse(reason: str) -> NoReturn:
        for connection in found.values():
            with contextlib.suppress(OSError):  # one that came may be gone
                _send(connection, {"refused": reason})
        raise UserError(reason)

    try:
        server = _listening(place.port, backlog=place.num_processes)
    except OSError as error:
        raise UserError(
            f"Port {place.port} cannot be listened to, for the other processes: {os.strerror(error.errno or 0)}."
        ) from None
    with server:
        while missing:
            server.settimeout(max(deadline - time.monotonic(), 0.01))
            try:
                connection, _ = server.accept()
            except TimeoutError:
                names = shortened(tuple(map(str, sorted(missing))))
                which = f"process {names}" if len(missing) == 1 else f"processes {names}"
                where = f"{place.address()} within {timeout:g} s"
                refuse(f"Of {place.num_processes} processes, {which} did not come to {where}.")
            hello = None
            with contextlib.suppress(TimeoutError):
                hello = _receive(connection, HELLO_SECONDS)
            if not isinstance(hello, dict) or not isinstance(hello.get("process"), int):
                connection.close()  # somebody else's
                continue
            number, count = hello["process"], hello.get("of")
            if number in found and _has_ended(found[number]):  # and comes again
                missing.add(number)
            found[number if number in missing else -1] = connection
            if count != place.num_processes:
                refuse(f"Process {number} was told of {count} processes, and process 0 of {place.num_processes}.")
            if number not in missing:
                refuse(f"Two processes have the number {number}.")
            missing.remove(number)
            if not missing:
                missing.update(n for n, x in found.items() if _has_ended(x))  # who may come again
    with socket.create_server(("", 0)) as free:
        port = free.getsockname()[1]
    for connection in found.values():
        with contextlib.suppress(OSError):  # `_Watch` says of one that came and is gone
            _send(connection, {"jax_port": port})
    return found, port


def _listening(port: int, backlog: int) -> socket.socket:
    """Return a socket that takes connections of IPv4 and, where the system has it, of IPv6."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), backlog=backlog, family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port), backlog=backlog)


def _join(place: Place, deadline: float, timeout: float) -> tuple[dict[int, socket.socket], int]:
    where = place.address()
    while True:
        try:
            connection = socket.create_connection((place.host, place.port), timeout=5)
            break
        except UnicodeError:  # of the host's name
            raise UserError(f"The coordinator is '{where}', whose host is no name and no address.") from None
        except OSError as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"{place.name} found nobody at {where} within {timeout:g} s, where process 0 listens: "
                    f"{error.strerror or error}."
                ) from None
            time.sleep(0.2)
    with contextlib.suppress(OSError):  # what listens there may hang up
        _send(connection, {"process": place.process_id, "of": place.num_processes})
        # Process 0 may have begun to wait later than this one.
        answer = _receive(connection, deadline - time.monotonic() + timeout)
        answer = answer if isinstance(answer, dict) else {}
        if "jax_port" in answer:
            return {0: connection}, answer["jax_port"]
        if "refused" in answer:
            raise UserError(answer["refused"])
    raise UserError(f"{place.name} had no answer from process 0 at {where} within {timeout:g} s.")


class _Watch:
    """Says that another process has ended before its time; where they compute together, this one ends with it."""

    def __init__(self, place: Place, connections: Mapping[int, socket.socket], together: bool):
        self._place, self._connections, self._together = place, dict(connections), together
        self._failed = False
        for connection in connections.values():
            _keep_alive(connection)

    def start(self) -> None:
        """Listen in a thread from here on."""
        if self._connections:
            threading.Thread(target=self._listen, daemon=True).start()

    def end(self) -> None:
        """Tell the others that this process has done what it had to."""
        self._tell({"ended": None})

    def fail(self, reason: str) -> None:
        """Tell the others why this process stops; what becomes of them is no news from here on."""
        self._failed = True
        self._tell({"ended": reason})

    def wait_for_a_loss(self) -> None:
        """Wait a moment for the news that another process is gone, which ends this one."""
        self._failed = False
        time.sleep(GRACE_SECONDS)

    def _tell(self, message: Mapping[str, Any], but: int | None = None) -> None:
        for number, connection in list(self._connections.items()):
            if number != but:
                with contextlib.suppress(OSError):
                    _send(connection, message)

    def _listen(self) -> None:
        with selectors.DefaultSelector() as selector:
            for number, connection in self._connections.items():
                connection.setblocking(True)
                selector.register(connection, selectors.EVENT_READ, number)
            while selector.get_map():
                for key, _ in selector.select():
                    message = _receive(key.fileobj, None)
                    if message is None or "ended" in message:
                        selector.unregister(key.fileobj)
                    self._take(key.data, message)

    def _take(self, number: int, message: Mapping[str, Any] | None) -> None:
        if message is not None and message.get("ended", "") is None:
            return
        who = f"Process {number} of {self._place.num_processes}"
        if message is None:
            news, wait = f"{who} is gone{STOPS if self._together else GOES_ON}", 0.0
        elif "ended" in message:
            news, wait = f"{who} stopped: {message['ended']}", GRACE_SECONDS
        else:
            news, wait = message["lost"], message["wait"]
        self._tell({"lost": news, "wait": wait}, but=number)
        if not self._together:
            print(news, file=sys.stderr, flush=True)
            return
        time.sleep(wait)
        if not self._failed:
            print(f"Error: {news}", file=sys.stderr)
            _leave(LOST_EXIT_CODE)


def _send(connection: socket.socket, message: Mapping[str, Any]) -> None:
    connection.sendall(json.dumps(message).encode() + b"\n")


def _receive(connection: Any, timeout: float | None) -> dict[str, Any] | None:
    """Return the next line that the other end says, None where it has ended or says something else."""
    connection.settimeout(timeout)
    line = b""
    try:
        while not line.endswith(b"\n"):
            byte = connection.recv(1)
            if not byte:
                return None
            line += byte
        return json.loads(line)
    except TimeoutError:
        raise
    except (OSError, ValueError):
        return None


def _has_ended(connection: socket.socket) -> bool:
    """Return whether the other end of a connection is closed."""
    connection.setblocking(False)
    try:
        return not connection.recv(1, socket.MSG_PEEK)
    except OSError as error:
        return not isinstance(error, BlockingIOError)
    finally:
        connection.setblocking(True)


def _keep_alive(connection: socket.socket) -> None:
    """Let the system close a connection whose other host is gone."""
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    tries = 3
    for option, value in {
        "TCP_KEEPIDLE": 9,
        "TCP_KEEPINTVL": SILENCE_SECONDS // tries - 3,
        "TCP_KEEPCNT": tries,
    }.items():
        if hasattr(socket, option):  # not everywhere
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
