"""Start and end the processes of a run together.

Process 0 listens, and every other process keeps one TCP connection to it. When all have connected and sent the same
identity, JAX starts, and a first all-reduce shows that the devices reach each other. The kernel closes the connection
of a killed process at once, whatever collective the others wait in; TCP keep-alive detects a machine that is gone. A
process that detects a failure notifies the others, and every notified process exits immediately: an exit handler or the
end of a `with` block could wait forever.

JAX detects dead processes too, but later and by aborting. Only when process 0 dies can its abort come first; the exit
code is then that of SIGABRT.

Messages are JSON lists, one per line:

    ["hello", index, count]  to process 0: the first message
    ["welcome"]              from process 0: the answer
    ["ready", identity]      to process 0: the config is loaded
    ["start", port]          from process 0: all are ready, start JAX at this port
    ["done"]                 to process 0: training has finished
    ["over"]                 from process 0: training has finished in all processes
    ["end", code, line]      in both directions: exit with this code and this last line
"""

import contextlib
import os
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
_GONE = 75  # EX_TEMPFAIL: another process has died or failed, and the same command resumes

_RESUME = "rerun the same command to resume from the latest checkpoint"
_VERDICT_SECONDS = 3.0  # a collective fails before it is known which process died
_LEAVING_SECONDS = 2.0  # for notified processes to exit; they need milliseconds
_COMING_SECONDS = 20.0  # for processes that have not connected yet, to tell them why the run ends
_RETRY_SECONDS = 0.2
_SECONDS_BEHIND = 5.0  # process 0 knows which processes are missing, so it reports before the others do
_NAMED = 10  # processes that a message names


class Group:
    """Connect the processes of one run; they connect in the background from construction on.

    Args:
      place: which process of the run this is.
      explain: returns (exit code, last line) of an exception that needs no traceback, None for any other.

    Raises:
      UserError: process 0 cannot listen.
    """

    def __init__(self, place: Place, explain: Callable[[BaseException], tuple[int, str] | None]):
        self._place, self._explain = place, explain
        self._lock = threading.Lock()
        self._connections: dict[int, socket.socket] = {}  # process 0 has one to each other process, they have one to it
        self._come: set[int] = set()  # connected processes; in processes other than 0 only process 0
        self._identities: dict[int, Mapping[str, str]] = {}  # in process 0 only
        self._done: set[int] = set()
        self._jax_port = 0
        self._waiting_seconds = 0.0
        self._patience = _COMING_SECONDS  # at the end of the run, for processes that are not yet notified
        self._started, self._over = threading.Event(), threading.Event()
        self._ending = threading.Lock()
        self._told: list[list[Any]] = []  # messages for all connected processes, and for those that connect later
        if place.index:
            _in_background(self._connect)
            return
        try:
            listener = wire.listen(place)
        except OSError as error:
            raise UserError(
                f"process 0 cannot listen at {place.host}:{place.port}: {os.strerror(error.errno or 0)}. If another "
                f"run or another process 0 uses the port, set another one in {place.port_in} of all processes."
            ) from error
        _in_background(self._accept, listener)

    def join(self, identity: Mapping[str, str], *, waiting_seconds: float, death_seconds: float) -> None:
        """Wait for all processes and start JAX with them; JAX must not have looked at its devices yet.

        All processes exit if identities differ or a process is missing.

        Args:
          identity: values by name that must be the same in all processes; see `sameness.identity`.
          waiting_seconds: timeout for all to connect, for the first all-reduce and, in `leave`, for all to finish.
          death_seconds: silence after which a machine is given up.
        """
        place = self._place
        behind = _SECONDS_BEHIND if place.index else 0
        self._waiting_seconds = waiting_seconds
        self._note_ready(place.index, identity)
        started = self._started.wait(waiting_seconds + behind)
        self._patience = _LEAVING_SECONDS
        if not started:
            self._end(_GONE, f"error: {self._missing()}")
        with self._lock:
            for connection in self._connections.values():
                wire.keep_alive(connection, death_seconds)
        import jax  # not at the top: processes connect, and hear of failures, while it loads

        host = wire.bracketed(place.host)
        jax.distributed.initialize(
            f"{host}:{self._jax_port}",
            place.count,
            place.index,
            coordinator_bind_address=f"{host if wire.is_loopback(place.host) else '[::]'}:{self._jax_port}",
            local_device_ids=place.local_devices,
            cluster_detection_method="deactivate",
            initialization_timeout=max(1, round(waiting_seconds)),
            heartbeat_timeout_seconds=max(10, round(2 * death_seconds)),
            shutdown_timeout_seconds=max(1, round(death_seconds)),
        )
        from .proof_of_life import all_reduce

        watch = threading.Timer(waiting_seconds + behind, self._no_answer)
        watch.daemon = True
        watch.start()
        all_reduce()
        watch.cancel()

    def leave(self) -> None:
        """Wait until all processes have finished; if one has not after `waiting_seconds`, all exit."""
        self._note_done(self._place.index)
        if not self._over.wait(self._waiting_seconds):
            self._end(
                _GONE,
                f"error: process {self._place.index} has finished, and other processes have not within "
                f"{self._waiting_seconds:g} s. Check that all use the same workdir, then {_RESUME}.",
            )
        import jax

        jax.distributed.shutdown()

    def fail(self, error: BaseException) -> NoReturn:
        """Exit all processes because this one has raised an exception."""
        me, known = self._place.index, self._explain(error)
        if known is not None:
            code, text = known
            self._end(code, text, told=(code, f"process {me}: {text.splitlines()[-1]}"))
        # The death of another process makes collectives raise. If that is the cause, the thread that reads messages
        # exits this process meanwhile.
        with contextlib.suppress(KeyboardInterrupt):
            time.sleep(_VERDICT_SECONDS)
        text = "".join(traceback.format_exception(error)).rstrip()
        last = traceback.format_exception_only(error)[0].strip()
        told = f"error: process {me} has failed ({last}). Its output has the traceback. Then {_RESUME}."
        self._end(_FAILED, text, told=(_GONE, told))

    def _end(self, code: int, text: str, *, told: tuple[int, str] | None = None) -> NoReturn:
        """Exit at once with a code and last line, and notify the others, with `told` in place of these."""
        if not self._ending.acquire(blocking=False):
            threading.Event().wait()  # another thread is exiting
        _last_words(text)
        self._tell(["end", *(told or (code, text))])
        deadline = time.monotonic() + self._patience
        try:
            while not self._all_notified() and time.monotonic() < deadline:
                time.sleep(0.01)
        finally:
            os._exit(code)

    def _all_notified(self) -> bool:
        # JAX aborts the others as soon as process 0 is gone, so process 0 exits last.
        if self._place.index:
            return bool(self._come)
        return len(self._come) == self._place.count - 1 and not self._connections

    def _missing(self) -> str:
        place, within = self._place, f"within {self._waiting_seconds:g} s"
        where = f"{place.host}:{place.port}" + (f" ({ADDRESS})" if place.port_in == ADDRESS else "")
        if place.index and not self._come:
            return f"process 0 does not answer at {where} {within}. See its output."
        if place.index:
            return f"some of {place.count} processes have not connected to {where} {within}. See process 0's output."
        absent = sorted(set(range(1, place.count)) - self._come)
        silent = sorted(self._come - self._identities.keys())
        found = []
        if absent:
            found.append(
                f"{len(absent)} of {place.count} processes not connected to {where} {within}: {_names(absent)}"
            )
        if silent:
            found.append(f"processes that connected but sent no config {within}: {_names(silent)}")
        return f"{'; '.join(found)}. See their output; if they need longer, raise config.processes.waiting_seconds."

    def _no_answer(self) -> NoReturn:
        place = self._place
        self._end(
            _GONE,
            f"error: the first all-reduce over the devices of all {place.count} processes has not returned in process "
            f"{place.index} within {self._waiting_seconds:g} s. Open all ports between the machines, then {_RESUME}.",
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
                connection.close()  # not a process of ours
                return
        with self._lock:
            welcome = count == place.count and 0 < index < count and index not in self._come
            if welcome:
                self._come.add(index)
                self._open(index, connection, ["welcome"])
        if not welcome:
            line = (
                f"error: process {index} of {count} has connected to a run of {place.count} processes, of which "
                f"{_names(sorted({0, *self._come}))} are connected. {COUNT} must be the same in all processes, and "
                f"{INDEX} different in each."
            )
            wire.send(connection, ["end", _REFUSED, line])
            if self._started.is_set():  # a surplus process must not end a run that is training
                connection.close()
                return
            self._patience = _LEAVING_SECONDS  # the missing processes may never connect
            self._end(_REFUSED, line)
        self._follow(index, messages)

    def _connect(self) -> None:
        place = self._place
        # Process 0 may not listen yet, or another program may answer; `join` has the timeout.
        while not self._come:
            with contextlib.suppress(OSError):
                connection = socket.create_connection((place.host, place.port), timeout=_COMING_SECONDS)
                # On loopback a connection to a port where nobody listens can reach itself.
                if connection.getsockname() != connection.getpeername():
                    connection.settimeout(None)
                    with self._lock:
                        self._open(0, connection, ["hello", place.index, place.count])
                    self._follow(0, wire.messages(connection))
                connection.close()
            time.sleep(_RETRY_SECONDS)

    def _open(self, index: int, connection: socket.socket, greeting: list[Any]) -> None:
        self._connections[index] = connection
        for message in (greeting, *self._told):
            wire.send(connection, message)

    def _tell(self, message: list[Any]) -> None:
        with self._lock:
            self._told.append(message)
            for connection in self._connections.values():
                wire.send(connection, message)

    def _note_ready(self, index: int, identity: Mapping[str, str]) -> None:
        place = self._place
        if place.index:
            self._tell(["ready", identity])
            return
        with self._lock:
            self._identities[index] = identity
            complete = len(self._identities) == place.count
        if not complete:
            return
        difference = sameness.difference(self._identities)
        if difference:
            self._patience = _LEAVING_SECONDS
            self._end(_REFUSED, f"error: {difference}")
        self._jax_port = wire.free_port(place)
        self._tell(["start", self._jax_port])
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
            f"error: process {index} of {self._place.count} has died or cannot be reached. See its output or its "
            f"machine's log, then {_RESUME}.",
        )

    def _forget(self, index: int) -> None:
        with self._lock:
            del self._connections[index]

    def _note_done(self, index: int) -> None:
        if self._place.index:
            self._tell(["done"])
            return
        with self._lock:
            self._done.add(index)
            over = len(self._done) == self._place.count
        if over:
            self._tell(["over"])
            self._over.set()


def _names(indices: Iterable[int]) -> str:
    names = [str(index) for index in indices]
    return ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")


def _in_background(work: Callable[..., None], *arguments: Any) -> None:
    threading.Thread(target=work, args=arguments, daemon=True).start()


def _last_words(text: str) -> None:
    """Write to stderr and close it, so that neither JAX nor another thread writes after this line."""
    stderr = os.dup(2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    with contextlib.suppress(OSError):
        os.write(stderr, f"{text}\n".encode())
