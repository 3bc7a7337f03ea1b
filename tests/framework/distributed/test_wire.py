import socket

import pytest

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
