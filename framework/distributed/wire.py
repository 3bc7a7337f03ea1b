"""Lines of JSON over TCP: what the processes of a run (`framework/distributed/processes.py`) tell each other."""

import contextlib
import json
import socket
from collections.abc import Iterator
from typing import Any

from .cluster import Place


def messages(connection: socket.socket) -> Iterator[Any]:
    """What the other end says, until it is gone or says what is no message."""
    with contextlib.suppress(OSError, ValueError), connection.makefile("r", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def send(connection: socket.socket, message: list[Any]) -> None:
    """Say something to the other end, if it is still there."""
    with contextlib.suppress(OSError):  # who listens to this connection notices
        connection.sendall(json.dumps(message).encode() + b"\n")


def keep_alive(connection: socket.socket, seconds: float) -> None:
    """Let the kernel ask a silent other end for signs of life, and give it up after so many seconds, at least 5."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    count, interval = 4, max(1, int(seconds / 8))
    silence = max(1, int(seconds) - count * interval)
    for option, value in (("TCP_KEEPIDLE", silence), ("TCP_KEEPINTVL", interval), ("TCP_KEEPCNT", count)):
        if hasattr(socket, option):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def listen(place: Place) -> socket.socket:
    """Listen at the port of a place: on loopback if that is its host, else at all addresses of this machine."""
    if is_loopback(place.host):
        family = socket.AF_INET6 if ":" in place.host else socket.AF_INET
        return socket.create_server((place.host, place.port), family=family, backlog=place.count)
    if socket.has_dualstack_ipv6():
        address = ("", place.port)
        return socket.create_server(address, family=socket.AF_INET6, dualstack_ipv6=True, backlog=place.count)
    return socket.create_server(("", place.port), backlog=place.count)


def free_port(place: Place) -> int:
    """A port at which this machine could listen instead."""
    with listen(place._replace(port=0)) as probe:
        return probe.getsockname()[1]


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches itself by this name."""
    return host in ("localhost", "::1") or host.startswith("127.")


def bracketed(host: str) -> str:
    """A host as it is written before a port."""
    return f"[{host}]" if ":" in host else host
