"""A run of several processes as one thing: they start together, and they end together.

Process 0 listens, every other process holds one connection to it for as long as it lives. Once all are there and have
been given the same to do, JAX starts, and a first all-reduce shows that their devices reach each other. The kernel
closes the connection of a process that is killed, so that its death is noticed at once, in whatever collective the
others wait; the keep-alive of TCP finds out about a machine that is gone without a word. Whoever learns that the run
cannot go on tells the others, and who is told ends on the spot: neither exit handlers nor the end of a `with` block can
wait for processes that will never come.

JAX finds out about deaths too, later, and about process 0's at the same time: it ends the process by SIGABRT, with some
lines about the C++ that noticed. There is no callback to take (that of jaxlib 0.10.2 cannot be called from Python), so
SIGABRT is caught in C: the last line and the exit code are ours in any case.

Messages are JSON lists, one per line: ["hello", index, count] from who comes, ["welcome"] to it, ["ready", identity]
from who knows what it is to do, ["start", port] to all once they are, ["done"] from who has come to the end, ["over"]
to all once all have, ["end", code, line] to and from all.
"""

import contextlib
import ctypes
import os
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NoReturn

from ..base.errors import UserError
from . import sameness, wire
from .cluster import ADDRESS, COUNT, INDEX, Place

_FAILED, _REFUSED = 1, 2
_GONE = 75  # EX_TEMPFAIL: another process has died or failed, and the same command goes on

_GO_ON = "the same command goes on from the newest checkpoint, if there is one"
_VERDICT_SECONDS = 3.0  # after a collective has failed, until who died is known
_LEAVING_SECONDS = 2.0  # for processes that are told to end; they need milliseconds
_COMING_SECONDS = 20.0  # for processes that are to be told why the run ends, and have not come yet
_RETRY_SECONDS = 0.2
_SECONDS_BEHIND = 5.0  # that process 0, which knows who is missing, speaks before the others do
_NAMED = 10  # processes that a message names

_abort_handler: Any = None


class Group:
    """The processes of one run, as this one sees them. In the background, they meet from now on.

    Args:
      place: of this process.
      explain: (exit code, last words) for an exception that needs no traceback, None for any other.

    Raises:
      UserError: process 0 cannot listen.
    """

    def __init__(self, place: Place, explain: Callable[[BaseException], tuple[int, str] | None]):
        self._place, self._explain = place, explain
        self._lock = threading.Lock()
        self._connections: dict[int, socket.socket] = {}  # of process 0 to all others, of them to process 0
        self._come: set[int] = set()
        self._identities: dict[int, Mapping[str, str]] = {}  # of process 0 and all others, of them their own
        self._done: set[int] = set()
        self._jax_port = 0
        self._waiting_seconds = 0.0
        self._patience = _COMING_SECONDS  # at the end, with processes that have yet to hear of it
        self._started, self._over = threading.Event(), threading.Event()
        self._ending = threading.Lock()
        self._verdict: list[Any] | None = None
        if place.index == 0:
            try:
                listener = wire.listen(place)
            except OSError as error:
                raise UserError(
                    f"process 0 cannot listen at {place.host}:{place.port}: {os.strerror(error.errno or 0)}; "
                    f"is another run there, or another process 0? Use another port in {place.port_in}, in all processes"
                ) from error
            _in_background(self._accept, listener)
        else:
            _in_background(self._connect)

    def join(self, identity: Mapping[str, str], *, waiting_seconds: float, death_seconds: float) -> None:
        """Wait until all processes are there, and start JAX with them, which must not have looked at its devices yet.

        Where one differs in what it is to do, or some have not come in time, all end.

        Args:
          identity: what must be the same in all, by name; see `sameness.identity`.
          waiting_seconds: that each waits for all to come, for the first all-reduce, and in `leave` for all to come to
            their end.
          death_seconds: after which a machine that is silent is given up.
        """
        place = self._place
        behind = _SECONDS_BEHIND if place.index else 0
        self._note_ready(place.index, identity)
        started = self._started.wait(waiting_seconds + behind)
        self._patience = _LEAVING_SECONDS
        if not started:
            self._end(_GONE, f"error: {self._missing(waiting_seconds)}")
        self._waiting_seconds = waiting_seconds
        with self._lock:
            for connection in self._connections.values():
                wire.keep_alive(connection, death_seconds)
        _on_abort(self._aborted)
        import jax

        host = wire.bracketed(place.host)
        jax.distributed.initialize(
            f"{host}:{self._jax_port}",
            place.count,
            place.index,
            coordinator_bind_address=f"{host if wire.is_loopback(place.host) else '[::]'}:{self._jax_port}",
            local_device_ids=place.local_device,
            cluster_detection_method="deactivate",
            initialization_timeout=max(1, round(waiting_seconds)),
            heartbeat_timeout_seconds=max(10, round(2 * death_seconds)),
            shutdown_timeout_seconds=max(1, round(death_seconds)),
        )
        from .proof_of_life import all_reduce

        watch = threading.Timer(waiting_seconds + behind, self._no_answer, [waiting_seconds])
        watch.daemon = True
        watch.start()
        all_reduce()
        watch.cancel()

    def leave(self) -> None:
        """Wait until all processes have come to their end. One that does not within `waiting_seconds` ends the run."""
        self._note_done(self._place.index)
        if not self._over.wait(self._waiting_seconds):
            self._end(
                _GONE,
                f"error: process {self._place.index} has come to its end, and not all others within "
                f"{self._waiting_seconds:g} s; do all see the same workdir? {_GO_ON}",
            )
        import jax

        jax.distributed.shutdown()

    def fail(self, error: BaseException) -> NoReturn:
        """End all processes for an exception of this one."""
        me, known = self._place.index, self._explain(error)
        if known is not None:
            code, text = known
            self._end(code, text, told=(code, f"process {me}: {text.splitlines()[-1]}"))
        # A collective that fails because another process has died raises any error; if so, who waits for messages
        # ends this process meanwhile.
        with contextlib.suppress(KeyboardInterrupt):
            time.sleep(_VERDICT_SECONDS)
        text = "".join(traceback.format_exception(error)).rstrip()
        last = traceback.format_exception_only(error)[0].strip()
        told = f"error: process {me} has failed, its output says where ({last}); {_GO_ON}"
        self._end(_FAILED, text, told=(_GONE, told))

    def _end(self, code: int, text: str, *, told: tuple[int, str] | None = None) -> NoReturn:
        """End this process at once with an exit code and last words, and the others with those that they are `told`."""
        if not self._ending.acquire(blocking=False):
            threading.Event().wait()  # another thread is ending this process
        _last_words(text)
        verdict = ["end", *(told or (code, text))]
        with self._lock:
            self._verdict = verdict  # whoever comes later hears it first
            connections = list(self._connections.values())
        for connection in connections:
            wire.send(connection, verdict)
        deadline = time.monotonic() + self._patience
        try:
            while not self._all_know() and time.monotonic() < deadline:
                time.sleep(0.01)
        finally:
            os._exit(code)

    def _all_know(self) -> bool:
        # JAX aborts the others as soon as process 0 is gone: it goes last.
        if self._place.index:
            return bool(self._come)
        return len(self._come) == self._place.count - 1 and not self._connections

    def _missing(self, seconds: float) -> str:
        place = self._place
        where = f"{place.host}:{place.port}" + (f" ({ADDRESS})" if place.port_in == ADDRESS else "")
        if place.index:
            if not self._come:
                return f"process 0 does not answer at {where} within {seconds:g} s; its own output may say why"
            return f"not all {place.count} processes have come to {where} within {seconds:g} s; process 0 may say which"
        absent = sorted(set(range(1, place.count)) - self._come)
        silent = sorted(self._come - self._identities.keys())
        said = []
        if absent:
            have = "has" if len(absent) == 1 else "have"
            said.append(
                f"{len(absent)} of {place.count} processes {have} not come to {where} within {seconds:g} s: "
                f"{self._names(absent)}"
            )
        if silent:
            said.append(
                f"after {seconds:g} s these have come and have not read their config yet: {self._names(silent)}"
            )
        return (
            f"{'; '.join(said)}; their own output may say why; if they only need longer, raise "
            "config.processes.waiting_seconds"
        )

    def _names(self, indices: Iterable[int]) -> str:
        hosts = self._place.hosts
        names = [f"{index} on {hosts[index]}" if hosts else str(index) for index in indices]
        return ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")

    def _no_answer(self, seconds: float) -> NoReturn:
        place = self._place
        self._end(
            _GONE,
            f"error: a first all-reduce over the devices of all {place.count} processes has not come back to process "
            f"{place.index} within {seconds:g} s; do the machines reach each other at all ports? {_GO_ON}",
        )

    def _accept(self, listener: socket.socket) -> None:
        while True:
            _in_background(self._greet, listener.accept()[0])

    def _greet(self, connection: socket.socket) -> None:
        place, messages = self._place, wire.messages(connection)
        match next(messages, None):
            case ["hello", int(index), int(count)]:
                pass
            case _:
                connection.close()  # a stranger
                return
        with self._lock:
            welcome = count == place.count and 0 < index < count and index not in self._come
            if welcome:
                self._connections[index] = connection
                self._come.add(index)
                wire.send(connection, ["welcome"])
                if self._verdict is not None:
                    wire.send(connection, self._verdict)
        if not welcome:
            line = (
                f"error: a process came as number {index} of {count}, where {place.count} are expected and "
                f"{self._names(sorted({0, *self._come}))} are there; the number of processes ({COUNT}) must be the "
                f"same in all, the index ({INDEX}) another in each"
            )
            wire.send(connection, ["end", _REFUSED, line])
            if self._started.is_set():  # one that is too many does not end a run that is at work
                connection.close()
                return
            self._patience = _LEAVING_SECONDS  # whoever else is missing may never come
            self._end(_REFUSED, line)
        self._follow(index, messages)

    def _connect(self) -> None:
        place = self._place
        # Until process 0 has answered, it may not be there yet, or somebody else may be; `join` knows how long to wait.
        while not self._come:
            with contextlib.suppress(OSError):
                connection = socket.create_connection((place.host, place.port), timeout=_COMING_SECONDS)
                # Where nobody listens, loopback can connect a port to itself.
                if connection.getsockname() != connection.getpeername():
                    self._introduce(connection)
                connection.close()
            time.sleep(_RETRY_SECONDS)

    def _introduce(self, connection: socket.socket) -> None:
        place = self._place
        connection.settimeout(None)
        wire.send(connection, ["hello", place.index, place.count])
        with self._lock:
            self._connections[0] = connection
            if self._verdict is not None:
                wire.send(connection, self._verdict)
            if place.index in self._identities:
                wire.send(connection, ["ready", self._identities[place.index]])
        self._follow(0, wire.messages(connection))

    def _note_ready(self, index: int, identity: Mapping[str, str]) -> None:
        place = self._place
        with self._lock:
            self._identities[index] = identity
            if place.index:
                for connection in self._connections.values():
                    wire.send(connection, ["ready", identity])
            complete = len(self._identities) == place.count
        if not complete:
            return
        difference = sameness.difference(self._identities)
        if difference:
            self._patience = _LEAVING_SECONDS
            self._end(_REFUSED, f"error: {difference}")
        self._jax_port = wire.free_port(place)
        self._tell_all(["start", self._jax_port])
        self._started.set()

    def _follow(self, index: int, messages: Iterator[Any]) -> None:
        for message in messages:
            match message:
                case ["welcome"]:
                    self._come.add(index)
                case ["ready", dict(identity)]:
                    self._note_ready(index, identity)
                case ["start", int(port)]:
                    self._jax_port = port
                    self._started.set()
                case ["done"]:
                    self._note_done(index)
                case ["over"]:
                    self._over.set()
                case ["end", int(code), str(line)]:
                    self._come.add(index)
                    self._forget(index)
                    self._end(code, line)
        self._forget(index)
        if index in self._done or self._over.is_set() or self._ending.locked() or index not in self._come:
            return
        self._end(
            _GONE,
            f"error: process {index} of {self._place.count} has died or cannot be reached; its own output or its "
            f"machine's log may say why; {_GO_ON}",
        )

    def _forget(self, index: int) -> None:
        with self._lock:
            del self._connections[index]

    def _note_done(self, index: int) -> None:
        if self._place.index:
            self._tell_all(["done"])
            return
        with self._lock:
            self._done.add(index)
            over = len(self._done) == self._place.count
        if over:
            self._tell_all(["over"])
            self._over.set()

    def _tell_all(self, message: list[Any]) -> None:
        with self._lock:
            connections = list(self._connections.values())
        for connection in connections:
            wire.send(connection, message)

    def _aborted(self) -> NoReturn:
        time.sleep(_VERDICT_SECONDS)  # who waits for messages may know who died, and ends this process meanwhile
        me = self._place.index
        self._end(_GONE, f"error: process {me} was aborted, for the reason above; {_GO_ON}")


def _in_background(work: Callable[..., None], *arguments: Any) -> None:
    threading.Thread(target=work, args=arguments, daemon=True).start()


def _last_words(text: str) -> None:
    """Write to stderr, and let nobody write there after it: not JAX, not a thread with a traceback."""
    stderr = os.dup(2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    with contextlib.suppress(OSError):
        os.write(stderr, f"{text}\n".encode())


def _on_abort(handler: Callable[[], NoReturn]) -> None:
    """Call `handler`, which does not return, in whatever thread aborts this process.

    Python's own handlers run in the main thread, some time after the signal; after abort() there is no such time.
    """
    global _abort_handler
    _abort_handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda number: handler())  # C keeps no reference
    install = ctypes.CDLL(None).signal
    install.argtypes, install.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    install(signal.SIGABRT, ctypes.cast(_abort_handler, ctypes.c_void_p))
