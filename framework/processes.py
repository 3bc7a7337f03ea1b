"""A run of several processes as one thing: they start together, and they end together.

Process 0 listens, every other process holds one connection to it for as long as it lives, and JAX starts once all are
there. The kernel closes the connection of a process that is killed, so that its death is noticed at once, in whatever
collective the others wait; the keep-alive of TCP finds out about a machine that is gone without a word. Whoever learns
that the run cannot go on tells the others, and who is told ends on the spot: neither exit handlers nor the end of a
`with` block can wait for processes that will never come.

JAX finds out about deaths too, later, and about process 0's at the same time: it ends the process by SIGABRT, with some
lines about the C++ that noticed. There is no callback to take (that of jaxlib 0.10.2 cannot be called from Python), so
SIGABRT is caught in C: the last line and the exit code are ours in any case.

Messages are JSON lists, one per line: ["hello", index, count] from who comes, ["start", port] to all once they are
there, ["done"] from who has come to the end, ["over"] to all once all have, ["end", code, line] to and from all.
"""

import contextlib
import ctypes
import json
import os
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, NoReturn

from .errors import UserError

_FAILED, _REFUSED = 1, 2
_GONE = 75  # EX_TEMPFAIL: another process has died or failed, and the same command goes on

_GO_ON = "the same command goes on from the newest checkpoint, if there is one"
_VERDICT_SECONDS = 3.0  # after a collective has failed, until who died is known
_LEAVING_SECONDS = 2.0  # for processes that are told to end; they need milliseconds
_COMING_SECONDS = 20.0  # for processes that are to be told why the run ends, and have not come yet
_RETRY_SECONDS = 0.2
_SECONDS_BEHIND = 5.0  # that process 0, which knows who is missing, speaks before the others do

_abort_handler: Any = None


class Place(NamedTuple):
    """Which process of a run this is: number `index` of `count`; process 0 is at `host`:`port`."""

    host: str
    port: int
    count: int
    index: int


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
        self._done: set[int] = set()
        self._jax_port = 0
        self._waiting_seconds = 0.0
        self._patience = _COMING_SECONDS  # at the end, with processes that have yet to hear of it
        self._started, self._over = threading.Event(), threading.Event()
        self._ending = threading.Lock()
        self._verdict: list[Any] | None = None
        if place.index == 0:
            try:
                listener = _listen(place)
            except OSError as error:
                raise UserError(
                    f"process 0 cannot listen at {place.host}:{place.port}: {os.strerror(error.errno or 0)}; "
                    "is another run there? Use another port in JAX_COORDINATOR_ADDRESS, in all processes"
                ) from error
            _in_background(self._accept, listener)
        else:
            _in_background(self._connect)

    def join(self, *, waiting_seconds: float, death_seconds: float) -> None:
        """Wait until all processes are there, and start JAX with them, which must not have looked at its devices yet.

        Args:
          waiting_seconds: that each waits for all to come, and in `leave` for all to come to their end.
          death_seconds: after which a machine that is silent is given up.

        Raises:
          UserError: some have not come in time.
        """
        place = self._place
        started = self._started.wait(waiting_seconds + (_SECONDS_BEHIND if place.index else 0))
        self._patience = _LEAVING_SECONDS
        if not started:
            raise UserError(self._missing(waiting_seconds))
        self._waiting_seconds = waiting_seconds
        with self._lock:
            for connection in self._connections.values():
                _keep_alive(connection, death_seconds)
        _on_abort(self._aborted)
        import jax

        bind = f"{_bracketed(place.host)}:{self._jax_port}" if _is_loopback(place.host) else f"[::]:{self._jax_port}"
        jax.distributed.initialize(
            f"{_bracketed(place.host)}:{self._jax_port}",
            place.count,
            place.index,
            coordinator_bind_address=bind,
            cluster_detection_method="deactivate",
            initialization_timeout=max(1, round(waiting_seconds)),
            heartbeat_timeout_seconds=max(10, round(2 * death_seconds)),
            shutdown_timeout_seconds=max(1, round(death_seconds)),
        )

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
            _send(connection, verdict)
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
        where = f"{place.host}:{place.port} (JAX_COORDINATOR_ADDRESS)"
        if place.index:
            if not self._come:
                return f"process 0 does not answer at {where} within {seconds:g} s; its own output may say why"
            return f"not all {place.count} processes have come to {where} within {seconds:g} s"
        missing = sorted(set(range(1, place.count)) - self._come)
        shown = ", ".join(map(str, missing[:10])) + (", ..." if len(missing) > 10 else "")
        return (
            f"{len(missing)} of {place.count} processes have not come to {where} within {seconds:g} s: {shown}; "
            "their own output may say why; if they only need longer, raise config.processes.waiting_seconds"
        )

    def _accept(self, listener: socket.socket) -> None:
        while True:
            _in_background(self._greet, listener.accept()[0])

    def _greet(self, connection: socket.socket) -> None:
        place, messages = self._place, _messages(connection)
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
                if self._verdict is not None:
                    _send(connection, self._verdict)
            complete = len(self._come) == place.count - 1
        if not welcome:
            line = (
                f"error: a process came as number {index} of {count}, where {place.count} are expected and "
                f"{sorted({0, *self._come})} are there; JAX_NUM_PROCESSES must be the same in all, "
                "JAX_PROCESS_ID another in each"
            )
            _send(connection, ["end", _REFUSED, line])
            self._patience = _LEAVING_SECONDS  # whoever else is missing may never come
            self._end(_REFUSED, line)
        if complete:
            self._jax_port = _free_port(place)
            self._tell_all(["start", self._jax_port])
            self._started.set()
        self._follow(index, messages)

    def _connect(self) -> None:
        place = self._place
        while True:
            try:
                connection = socket.create_connection((place.host, place.port), timeout=_COMING_SECONDS)
                break
            except OSError:  # process 0 is not there yet; `join` knows how long to wait
                time.sleep(_RETRY_SECONDS)
        connection.settimeout(None)
        _send(connection, ["hello", place.index, place.count])
        with self._lock:
            self._connections[0] = connection
            if self._verdict is not None:
                _send(connection, self._verdict)
            self._come.add(0)
        self._follow(0, _messages(connection))

    def _follow(self, index: int, messages: Iterator[Any]) -> None:
        for message in messages:
            match message:
                case ["start", int(port)]:
                    self._jax_port = port
                    self._started.set()
                case ["done"]:
                    self._note_done(index)
                case ["over"]:
                    self._over.set()
                case ["end", int(code), str(line)]:
                    self._forget(index)
                    self._end(code, line)
        self._forget(index)
        if index in self._done or self._over.is_set() or self._ending.locked():
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
            _send(connection, message)

    def _aborted(self) -> NoReturn:
        time.sleep(_VERDICT_SECONDS)  # who waits for messages may know who died, and ends this process meanwhile
        me = self._place.index
        self._end(_GONE, f"error: process {me} was aborted, for the reason above; {_GO_ON}")


def _in_background(work: Callable[..., None], *arguments: Any) -> None:
    threading.Thread(target=work, args=arguments, daemon=True).start()


def _messages(connection: socket.socket) -> Iterator[Any]:
    """What the other end says, until it is gone or says what is no message."""
    with contextlib.suppress(OSError, ValueError), connection.makefile("r", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def _send(connection: socket.socket, message: list[Any]) -> None:
    with contextlib.suppress(OSError):  # who listens to this connection notices
        connection.sendall(json.dumps(message).encode() + b"\n")


def _keep_alive(connection: socket.socket, seconds: float) -> None:
    """Let the kernel ask a silent other end for signs of life, and give it up after so many seconds, at least 5."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    count, interval = 4, max(1, int(seconds / 8))
    silence = max(1, int(seconds) - count * interval)
    for option, value in (("TCP_KEEPIDLE", silence), ("TCP_KEEPINTVL", interval), ("TCP_KEEPCNT", count)):
        if hasattr(socket, option):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def _listen(place: Place) -> socket.socket:
    if _is_loopback(place.host):
        family = socket.AF_INET6 if ":" in place.host else socket.AF_INET
        return socket.create_server((place.host, place.port), family=family, backlog=place.count)
    if socket.has_dualstack_ipv6():
        address = ("", place.port)
        return socket.create_server(address, family=socket.AF_INET6, dualstack_ipv6=True, backlog=place.count)
    return socket.create_server(("", place.port), backlog=place.count)


def _free_port(place: Place) -> int:
    with _listen(place._replace(port=0)) as probe:
        return probe.getsockname()[1]


def _is_loopback(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


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
