"""Send and receive JSON lines over TCP, for the processes of a run (`framework/distributed/processes.py`)."""

import contextlib
import ipaddress
import json
import socket
from collections.abc import Iterator
from typing import Any

from .cluster import Place

_LONGEST_MESSAGE = 2**20  # bytes; a config with the hashes of all source files has about 2**14


def messages(connection: socket.socket) -> Iterator[Any]:
    """Yield messages until the connection closes or sends something that is not a message."""
    faults = (OSError, ValueError, RecursionError)  # RecursionError: thousands of nested lists
    with contextlib.suppress(*faults), connection.makefile("rb") as lines:
        while (line := lines.readline(_LONGEST_MESSAGE)).endswith(b"\n"):
            yield json.loads(line)


def send(connection: socket.socket, message: list[Any]) -> None:
    """Send a message; ignore a closed connection, which the reader of `messages` notices."""
    with contextlib.suppress(OSError):
        connection.sendall(json.dumps(message).encode() + b"\n")


def keep_alive(connection: socket.socket, seconds: float) -> None:
    """Let the kernel probe a silent connection and close it after `seconds`, at least 5."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    count, interval = 4, max(1, int(seconds / 8))
    silence = max(1, int(seconds) - count * interval)
    for option, value in (("TCP_KEEPIDLE", silence), ("TCP_KEEPINTVL", interval), ("TCP_KEEPCNT", count)):
        if hasattr(socket, option):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def listen(place: Place) -> socket.socket:
    """Listen at the port of a place: on loopback if its host is, else on all addresses of this machine."""
    host, dualstack = place.host, False
    if not is_loopback(host):
        host, dualstack = "", socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if ":" in host or dualstack else socket.AF_INET
    return socket.create_server(
        (host, place.port), family=family, dualstack_ipv6=dualstack, backlog=min(place.count, 2**12)
    )


def free_port(place: Place) -> int:
    """Return a free port of this machine."""
    with listen(place._replace(port=0)) as probe:
        return probe.getsockname()[1]


def is_loopback(host: str) -> bool:
    """Return whether a host name is that of this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
