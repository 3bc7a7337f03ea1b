"""Real processes that form one JAX job over loopback."""

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

# Ends a process that was left alone within seconds, and waits as long at exit.
_START = """
import sys
import jax
port, count, index = map(int, sys.argv[1:4])
del sys.argv[1:4]
if count > 1:
    jax.distributed.initialize(
        f"127.0.0.1:{port}", count, index, coordinator_bind_address=f"127.0.0.1:{port}",
        cluster_detection_method="deactivate", initialization_timeout=60, heartbeat_timeout_seconds=20,
        shutdown_timeout_seconds=20)
"""


def run_together(script: str, *, processes: int, devices: int, arguments: Sequence[str] = (), timeout: float = 240):
    """Run a script in each of some processes with some simulated devices each.

    Args:
      script: Python text; `jax` is imported and the job has started when it begins. `sys.argv[1:]` are `arguments`.
      processes, devices: numbers of.
      timeout: seconds for all.

    Returns:
      What each process printed, in order.

    Raises:
      AssertionError: a process failed or did not end; with what it wrote.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "PYTHONPATH": os.pathsep.join(sys.path)}
    with contextlib.ExitStack() as stack:
        # Files, not pipes: who is not read at once must not wait.
        outs, errors = ([stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(processes)] for _ in "oe")
        running = [
            subprocess.Popen(
                [sys.executable, "-c", _START + script, str(port), str(processes), str(index), *arguments],
                env=environment,
                stdout=outs[index],
                stderr=errors[index],
            )
            for index in range(processes)
        ]
        end = time.monotonic() + timeout
        try:
            codes = [process.wait(max(0.1, end - time.monotonic())) for process in running]
        except subprocess.TimeoutExpired:
            codes = [f"no end within {timeout:g} s"]
        finally:
            for process in running:
                process.kill()
        for file in (*outs, *errors):
            file.seek(0)
        assert codes == [0] * processes, (codes, [file.read()[-3000:] for file in errors])
        return [file.read() for file in outs]
