"""The thread that runs the scheduler, and how requests of the event loop reach it and are answered."""

import asyncio
import functools
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from based_jax.errors import UserError
from based_jax.generate import Event, Request, Scheduler
from based_jax.serve.api_errors import ApiError, shutting_down
from based_jax.serve.metrics import Metrics

log = logging.getLogger(__name__)


class Ticket:
    """The rows of one request, and what becomes of them; the event loop's alone.

    Attributes:
      rows: what is asked of the scheduler.
      in_flight: indices of the rows that the scheduler has not ended.
      submitted: when, by the monotonic clock.
      has_begun: whether a token has been drawn.
    """

    def __init__(self, driver: "Driver", rows: Sequence[Request]):
        self.rows, self.in_flight, self.submitted = rows, set(range(len(rows))), time.monotonic()
        self.has_begun = False
        self._driver = driver
        self._told: asyncio.Queue[tuple[int, Event] | ApiError] = asyncio.Queue()

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """Yield (index of a row, event) until all rows have ended; raise the ApiError that ends them before."""
        left = len(self.rows)
        while left:
            told = await self._told.get()
            if isinstance(told, ApiError):
                raise told
            left -= told[1].finish is not None
            yield told

    def tell(self, told: tuple[int, Event] | ApiError) -> None:
        """Hand on what has become of a row, or of all."""
        self._told.put_nowait(told)

    def give_up(self) -> None:
        """Ask for no more: what the rows held that have not ended is free for others."""
        self._driver.cancel(self)


class Driver:
    """Runs a scheduler in a thread of its own, which reads the inbox between two steps and hands on the events.

    Requests are taken and answered while programs are compiled, by other threads: one waits for those that it needs.
    The methods are the event loop's.

    Attributes:
      is_warm: whether all programs are compiled.
      failure: what ended the thread; None while all is well.
      on_failure: called then.
    """

    def __init__(self, scheduler: Scheduler, max_rows: int, metrics: Metrics):
        self._scheduler, self._max_rows, self._metrics = scheduler, max_rows, metrics
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._tickets: set[Ticket] = set()
        self._owners: dict[int, tuple[Ticket, int]] = {}  # the thread's alone
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
        self._closed = self._stopped = False
        self._rehearsal: int | None = None
        self.is_warm = False
        self.failure: BaseException | None = None
        self.on_failure: Callable[[], None] = lambda: None

    def start(self) -> None:
        """Start the thread, and those that compile."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()
        threading.Thread(target=self._compile, name="compiling", daemon=True).start()

    def stop(self) -> None:
        """End the thread after its step; what is in flight gets no more events, and no more is compiled."""
        self._stopped = True
        self._inbox.put(None)
        self._thread.join()

    @property
    def rows_in_flight(self) -> int:
        """Rows that are written or wait."""
        return sum(len(ticket.in_flight) for ticket in list(self._tickets))

    @property
    def is_open(self) -> bool:
        """Return whether requests are taken."""
        return not self._closed and self.failure is None

    def submit(self, rows: Sequence[Request]) -> Ticket:
        """Queue the rows of a request.

        Raises:
          ApiError: the queue is full, or the server ends.
        """
        if not self.is_open:
            raise shutting_down()
        if (busy := self.rows_in_flight) + len(rows) > self._max_rows:
            sentence = f"{busy} texts are written or wait, at most {self._max_rows} may; ask again in a moment."
            raise ApiError(429, sentence, code="queue_full")
        self._metrics.prompt_tokens.inc(sum(len(row.prompt) for row in rows))
        ticket = Ticket(self, rows)
        self._tickets.add(ticket)
        self._inbox.put(functools.partial(self._submit, ticket))
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Take the rows of a ticket from the scheduler, those that it has not ended."""
        if ticket.in_flight:
            self._metrics.finished.labels("cancelled").inc(len(ticket.in_flight))
            self._inbox.put(functools.partial(self._cancel, ticket))
        ticket.in_flight.clear()
        self._tickets.discard(ticket)

    def close(self) -> None:
        """Take no more requests."""
        self._closed = True

    def end_all(self, error: ApiError) -> None:
        """End all requests by telling them why."""
        for ticket in list(self._tickets):
            ticket.tell(error)

    def _receive(self, events: Sequence[tuple[Ticket, int, Event]]) -> None:
        """Hand events on to their tickets, but for those that were given up."""
        for ticket, index, event in events:
            if index not in ticket.in_flight:
                continue
            self._metrics.observe(event, time.monotonic() - ticket.submitted, is_first=not ticket.has_begun)
            ticket.has_begun = True
            if event.finish is not None:
                ticket.in_flight.discard(index)
            ticket.tell((index, event))

    def _fail(self, error: BaseException) -> None:
        self.failure = error
        self.end_all(ApiError(500, "The model failed, and the server ends; its log says why.", code="model_failed"))
        self.on_failure()

    def _compile(self) -> None:
        """Compile what requests run, then let the thread run the rest once; a thread of its own."""
        try:
            with ThreadPoolExecutor() as threads:
                list(threads.map(self._unless_stopped, self._scheduler.programs()))
            self._inbox.put(self._rehearse)
        except BaseException as error:
            self._inbox.put(functools.partial(_fail_by, error))

    def _unless_stopped(self, compiles: Callable[[], object]) -> None:
        if not self._stopped:
            compiles()

    # What follows runs in the thread.

    def _rehearse(self) -> None:
        self._rehearsal = self._scheduler.rehearse()

    def _run(self) -> None:
        try:
            while self._obey():
                if self._scheduler.busy:
                    self._hand_on(self._scheduler.advance())
        except BaseException as error:
            log.exception("The scheduler failed.")
            self._tell_loop(self._fail, error)

    def _obey(self) -> bool:
        """Do what the inbox asks for, and wait for it where nothing is in flight; return whether to go on."""
        wait = not self._scheduler.busy
        while True:
            try:
                command = self._inbox.get(block=wait)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()
            wait = False

    def _submit(self, ticket: Ticket) -> None:
        for index, row in enumerate(ticket.rows):
            try:
                self._owners[self._scheduler.submit(row)] = ticket, index
            except UserError as error:
                self._tell_loop(ticket.tell, ApiError(400, str(error)))
                return

    def _cancel(self, ticket: Ticket) -> None:
        for row_id in [row_id for row_id, (owner, _) in self._owners.items() if owner is ticket]:
            del self._owners[row_id]
            self._scheduler.cancel(row_id)

    def _hand_on(self, events: Sequence[Event]) -> None:
        owned = [(*self._owners[event.id], event) for event in events if event.id in self._owners]
        for event in events:
            if event.finish is not None:
                self._owners.pop(event.id, None)
                self.is_warm |= event.id == self._rehearsal
        if owned:
            self._tell_loop(self._receive, owned)

    def _tell_loop(self, call: Callable, *args: object) -> None:
        assert self._loop is not None  # there is one since the start
        self._loop.call_soon_threadsafe(call, *args)


def _fail_by(error: BaseException) -> None:
    raise error
