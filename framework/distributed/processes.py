"""Start and end the processes of a run together.

Process 0 listens, and every other process keeps one TCP connection to it. When all have connected and sent the same
identity, JAX starts, and a first collective shows that the devices reach each other. The kernel closes the connection
of a killed process at once, whatever collective the others wait in; TCP keep-alive detects a machine that is gone. A
process that detects a failure notifies the others, and every notified process exits immediately: an exit handler or the
end of a `with` block could wait forever. JAX detects dead processes too, but later and by aborting. Only when process 0
dies can its abort come first; the exit code is then that of SIGABRT.

Messages are JSON lists, one per line. None of them can cause exit code 0 or print control characters.

    ["hello", index, count, secret]  to process 0: the first message
    ["welcome", secret]              from process 0: the answer
    ["ready", identity]              to process 0: the config is loaded
    ["start", port]                  from process 0: all are ready, start JAX at this port
    ["end", code, line]              in both directions: exit with this code and this last line
"""

import contextlib
import hmac
import os
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

from ..base.errors import UserError, printable
from . import sameness, wire
from .cluster import ADDRESS, COUNT, INDEX, PORT, SECRET, Place

_FAILED, _REFUSED = 1, 2
TRY_AGAIN = 75  # EX_TEMPFAIL: another process has died or failed, or this one hangs, and the same command resumes

RESUME = "rerun the same command to resume from the latest checkpoint"
_VERDICT_SECONDS = 3.0  # a collective fails before it is known which process died
_LEAVING_SECONDS = 2.0  # for notified processes to exit; they need milliseconds
_COMING_SECONDS = 20.0  # for processes that have not connected yet, to tell them why the run ends
_RETRY_SECONDS = 0.2
_SECONDS_BEHIND = 5.0  # process 0 knows which processes are missing, so it reports before the others do
_NAMED = 10  # processes that a message names
_LONGEST_LINE = 2_000  # characters of another process that are printed
_STRANGERS = 64  # connections without a valid hello, in addition to one for each process

_group: "Group | None" = None  # of the run that this process takes part in


class Group:
    """Connect the processes of one run; they connect in the background from construction on.

    Args:
      place: which process of the run this is.

    Raises:
      UserError: process 0 cannot listen.
    """

    def __init__(self, place: Place):
        self._place = place
        self._lock = threading.Lock()
        self._connections: dict[int, socket.socket] = {}  # process 0 has one to each other process, they have one to it
        self._come: set[int] = set()  # processes that have connected; in processes other than 0 only process 0
        self._identities: dict[int, Mapping[str, str]] = {}  # in process 0 only
        self._jax_port = 0
        self._waiting_seconds = 0.0
        self._patience = _COMING_SECONDS  # at the end of the run, for processes that are not yet notified
        self._started = threading.Event()
        self._over = False  # all processes have finished
        self._ending = threading.Lock()
        self._told: list[list[Any]] = []  # messages for all connected processes, and for those that connect later
        self._strangers = threading.Semaphore(place.count + _STRANGERS)
        if place.index:
            _in_background(self._connect)
            return
        try:
            listener = wire.listen(place)
        except OSError as error:
            raise UserError(
                f"process 0 cannot listen at {place.host}:{place.port}: {os.strerror(error.errno or 0)}. If another "
                f"run or another process 0 uses the port, set another one in {ADDRESS} or {PORT} of all processes."
            ) from error
        _in_background(self._accept, listener)

    def join(self, identity: Mapping[str, str], *, waiting_seconds: float, death_seconds: float) -> None:
        """Wait for all processes and start JAX with them; JAX must not have looked at its devices yet.

        All processes exit if identities differ or a process is missing.

        Args:
          identity: values by name that must be the same in all processes; see `sameness.identity`.
          waiting_seconds: timeout for all to connect, for the first collective and, in `leave`, for all to finish.
          death_seconds: silence after which a machine is given up.
        """
        global _group
        place, self._waiting_seconds = self._place, waiting_seconds
        self._note_ready(place.index, identity)
        started = self._started.wait(waiting_seconds + (_SECONDS_BEHIND if place.index else 0))
        self._patience = _LEAVING_SECONDS
        if not started:
            self._end(TRY_AGAIN, f"error: {self._missing()}")
        with self._lock:
            for connection in self._connections.values():
                wire.keep_alive(connection, death_seconds)
        _group = self
        import jax  # not at the top: processes connect, and hear of failures, while it loads

        host = f"[{place.host}]" if ":" in place.host else place.host
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
        self._meet("the first collective", "Open all ports between the machines")
        if place.local_devices and place.index == 0:
            print(f"each process has {len(place.local_devices)} of {place.visible} GPUs of its machine", flush=True)

    def leave(self) -> None:
        """Wait until all processes have finished; if one has not after `waiting_seconds`, all exit."""
        self._meet("the last collective", "Check that all have finished")
        self._over = True
        import jax

        jax.distributed.shutdown()  # returns when all processes have called it

    def _meet(self, name: str, fix: str) -> None:
        """Run a collective over all devices; all processes exit if it has not returned after `waiting_seconds`."""
        from jax.experimental import multihost_utils

        place = self._place
        line = (
            f"error: {name} over the devices of all {place.count} processes has not returned in process {place.index} "
            f"within {self._waiting_seconds:g} s. {fix}, then {RESUME}."
        )
        watch = threading.Timer(self._waiting_seconds, self._end, (TRY_AGAIN, line))
        watch.daemon = True
        watch.start()
        multihost_utils.sync_global_devices(name)
        watch.cancel()

    def fail(self, error: BaseException, known: tuple[int, str] | None) -> NoReturn:
        """Exit all processes because of an exception; `known` has code and last lines if it needs no traceback."""
        me = self._place.index
        if known is not None:
            code, text = known
            self._end(code, text, told=(code, f"process {me}: {text.splitlines()[-1]}"))
        # The death of another process makes collectives raise. If that is the cause, the thread that reads messages
        # exits this process meanwhile.
        with contextlib.suppress(KeyboardInterrupt):
            time.sleep(_VERDICT_SECONDS)
        text = "".join(traceback.format_exception(error)).rstrip()
        last = traceback.format_exception_only(error)[0].strip()
        told = f"error: process {me} has failed ({last}). Its output has the traceback. Then {RESUME}."
        self._end(_FAILED, text, told=(TRY_AGAIN, told))

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
        where = f"{place.host}:{place.port}" + (f" with the same {SECRET}" if place.secret else "")
        if place.index:
            who = f"some of {place.count} processes have" if self._come else "process 0 has"
            return f"{who} not answered at {where} {within}. See the output of process 0."
        silent = [index for index in range(1, place.count) if index not in self._identities]
        return (
            f"{len(silent)} of {place.count} processes have not connected to {where} and sent their config {within}: "
            f"{str(silent[:_NAMED])[1:-1]}. See their output, or raise config.processes.waiting_seconds."
        )

    def _accept(self, listener: socket.socket) -> None:
        while True:
            with contextlib.suppress(OSError):  # the other side has closed the connection already
                connection, _ = listener.accept()
                if self._strangers.acquire(blocking=False):
                    _in_background(self._greet, connection)
                else:
                    connection.close()

    def _greet(self, connection: socket.socket) -> None:
        place, messages = self._place, wire.messages(connection)
        connection.settimeout(_COMING_SECONDS)
        hello = next(messages, None)
        self._strangers.release()
        match hello:
            case ["hello", int(index), int(count), str(secret)] if self._knows(secret) and index < count < 2**31:
                wire.send(connection, ["welcome", place.secret])
            case _:
                connection.close()  # not a process of this run
                return
        if count != place.count or index < 1 or not self._admit(index, connection):
            line = (
                f"error: process {index} of {count} cannot join this run of {place.count} processes. {COUNT} must be "
                f"the same in all processes, and {INDEX} different in each."
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
                messages = wire.messages(connection)
                wire.send(connection, ["hello", place.index, place.count, place.secret])
                match next(messages, None):
                    case ["welcome", str(secret)] if self._knows(secret) and self._admit(0, connection):
                        self._follow(0, messages)
                connection.close()
            time.sleep(_RETRY_SECONDS)

    def _knows(self, secret: str) -> bool:
        return hmac.compare_digest(*(text.encode(errors="backslashreplace") for text in (secret, self._place.secret)))

    def _admit(self, index: int, connection: socket.socket) -> bool:
        """Send a process what all are told, from now on; return False if one of this index has come before."""
        with self._lock:
            if index in self._come:
                return False
            connection.settimeout(None)
            self._come.add(index)
            self._connections[index] = connection
            for message in self._told:
                wire.send(connection, message)
            return True

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
            self._end(_REFUSED, printable(f"error: {difference}"))
        self._jax_port = wire.free_port(place)
        self._tell(["start", self._jax_port])
        self._started.set()

    def _follow(self, index: int, messages: Iterator[Any]) -> None:
        for message in messages:
            match message:
                case ["ready", dict(identity)] if index and all(isinstance(value, str) for value in identity.values()):
                    self._note_ready(index, identity)
                case ["start", int(port)] if not index:
                    self._jax_port = port
                    self._started.set()
                case ["end", int(code), str(line)]:
                    self._forget(index)
                    self._end(code if 0 < code < 256 else TRY_AGAIN, printable(line[:_LONGEST_LINE]))
                case _:
                    break
        self._forget(index)
        if self._over or self._ending.locked():
            return
        self._end(
            TRY_AGAIN,
            f"error: process {index} of {self._place.count} has died or cannot be reached. See its output or its "
            f"machine's log, then {RESUME}.",
        )

    def _forget(self, index: int) -> None:
        with self._lock:
            del self._connections[index]


def end_run(code: int, line: str) -> NoReturn:
    """Exit this process and all others of its run at once, with a code and a last line. Any thread may call it."""
    if _group is not None:
        _group._end(code, line)
    _last_words(line)
    os._exit(code)


def _in_background(work: Callable[..., None], *arguments: Any) -> None:
    threading.Thread(target=work, args=arguments, daemon=True).start()


def _last_words(text: str) -> None:
    """Write to stderr and close it, so that neither JAX nor another thread writes after this line."""
    stderr = os.dup(2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    with contextlib.suppress(OSError):
        os.write(stderr, f"{text}\n".encode(errors="backslashreplace"))
