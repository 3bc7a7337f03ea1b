import contextlib
import json
import socket
import threading

import pytest
from processes import script

from shampax.framework.distributed import wire


@pytest.mark.parametrize("seconds", [5, 20, 60, 100])
def test_a_silent_machine_is_detected_in_time(seconds):
    """Faults: the intervals do not add up to the configured time; the kernel's default of two hours stays."""
    with socket.socket() as connection:
        wire.keep_alive(connection, seconds)
        assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        silence, interval, count = (
            connection.getsockopt(socket.IPPROTO_TCP, getattr(socket, f"TCP_KEEP{name}"))
            for name in ("IDLE", "INTVL", "CNT")
        )
    assert silence + interval * count == seconds


@pytest.mark.parametrize(
    "stranger",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\xff\n",
        b"[" * 100_000 + b"\n",
        b"[" + b"9" * 5_000 + b"]\n",
        b"x" * 3_000_000,
        b"[1]",
    ],
    ids=["another protocol", "no text", "deeply nested", "a long number", "without an end", "half a line"],
)
def test_what_is_not_a_message_ends_the_connection(stranger):
    """Faults: a line without an end fills the memory; a traceback."""
    mine, other = socket.socketpair()
    with mine, other:

        def speak():
            wire.send(other, ["hello"])
            with contextlib.suppress(OSError):  # the test has ended
                other.sendall(stranger)
                other.shutdown(socket.SHUT_WR)

        speaking = threading.Thread(target=speak, daemon=True)
        speaking.start()
        assert list(wire.messages(mine)) == [["hello"]]
        assert len(stranger) < 1_000_000 or speaking.is_alive()  # the rest has not been read


# Process 0 of three, and a program that connects to its port.
STRANGER = """
    import json, socket, threading
    from shampax.framework.distributed import processes
    processes._LEAVING_SECONDS = processes._COMING_SECONDS = 0.2
    processes._STRANGERS = 4
    group = Group(place)
    def connect(*messages):
        connection = socket.create_connection((place.host, place.port))
        connection.sendall("".join(json.dumps(message) + "\\n" for message in messages).encode())
        connection.settimeout(10)
        return connection
"""


@pytest.mark.parametrize(
    ("secret", "said", "code", "line"),
    [
        ("", ["end", 0, "\x1b[2Jcomplete"], 75, "\\x1b[2Jcomplete"),
        ("", ["end", 256, "x" * 5_000], 75, "x" * 2_000),
        ("", ["end", 2, "error: a\nb"], 2, "error: a\\nb"),
        ("", ["end", 2, "\ud800"], 2, "\\ud800"),
        ("", ["start", 80], 75, "error: process 1 of 3 has died or cannot be reached."),
        ("", ["over"], 75, "error: process 1 of 3 has died or cannot be reached."),
        ("", ["ready", {"config.seed": 1}], 75, "error: process 1 of 3 has died or cannot be reached."),
        ("1f2e", ["end", 3, "complete"], 75, "error: 2 of 3 processes have not connected to "),
    ],
    ids=["code 0", "a long line", "two lines", "no UTF-8", "start", "over", "no texts", "without the secret"],
)
def test_a_stranger_at_the_port(secret, said, code, line):
    """Faults: a stranger makes the exit code 0, prints control characters, or starts JAX before all have come; it ends
    a run whose secret it does not know."""
    text = (
        STRANGER
        + f"""
    stranger = connect(["hello", 1, 3, ""], {json.loads(json.dumps(said))!r})
    group.join({{}}, waiting_seconds=1.5, death_seconds=5)
    """
    )
    with script(text, processes=1, JAX_NUM_PROCESSES="3", SHAMPAX_SECRET=secret) as job:
        [ended] = job.wait()
    assert (ended.code, ended.err.count("\n")) == (code, 1)
    assert ended.err.startswith(line)
    assert len(ended.err) < 2_002
    assert ("with the same SHAMPAX_SECRET" in ended.err) == bool(secret)


def test_the_number_of_connections_of_strangers_is_bounded():
    """Faults: idle connections use up threads and memory; after them no process can join."""
    text = (
        STRANGER
        + """
    idle = [connect() for _ in range(12)]
    print([index for index, connection in enumerate(idle) if index > 6 and connection.recv(1) == b""])
    print(threading.active_count() < 12)
    idle[0].close()
    time.sleep(0.2)
    connect(["hello", 1, 3, "\\ud800"])
    print(connect(["hello", 1, 3, ""]).recv(100))
    group.join({}, waiting_seconds=0.1, death_seconds=5)
    """
    )
    with script(text, processes=1, JAX_NUM_PROCESSES="3") as job:
        [ended] = job.wait()
    assert ended.out.splitlines() == ["[7, 8, 9, 10, 11]", "True", repr(b'["welcome", ""]\n')]
