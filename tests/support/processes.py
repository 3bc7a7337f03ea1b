"""Start processes that form one job over loopback."""

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

# Seconds after which a process counts as hung; work of seconds takes a minute on a loaded machine.
LIMIT = 300.0

# Starts JAX. A process without the others ends within a minute, and waits no longer than that at exit.
_START = """
import os, sys
import jax
address, count, index = (os.environ["JAX_" + name] for name in ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID"))
if int(count) > 1:
    jax.distributed.initialize(
        address, int(count), int(index), coordinator_bind_address=address,
        cluster_detection_method="deactivate", initialization_timeout=240, heartbeat_timeout_seconds=60,
        shutdown_timeout_seconds=60)
"""


class Ended(NamedTuple):
    """How a process ended; `code` is None if it has not."""

    code: int | None
    out: str
    err: str
    seconds: float  # from the call of `wait` to its end


class Job(contextlib.ExitStack):
    """Run a command in several processes, which connect by the variables that `launch.train` reads.

    The processes are killed when the block ends.

    Args:
      command: command of every process.
      processes, devices: number of processes, and of simulated devices of each.
      variables: additional environment variables.
    """

    def __init__(
        self, command: Sequence[str], *, processes: int, devices: int, variables: Mapping[str, str] | None = None
    ):
        super().__init__()
        address = f"127.0.0.1:{free_port()}"
        # Files, not pipes, which would block a process that is not read at once.
        self._files = Path(self.enter_context(tempfile.TemporaryDirectory()))
        meeting = self._files / "meeting"
        meeting.mkdir()
        self.processes = []
        for index in range(processes):
            environment = {
                "JAX_NUM_CPU_DEVICES": str(devices),
                "PYTHONPATH": os.pathsep.join(sys.path),
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": str(processes),
                "JAX_PROCESS_ID": str(index),
                "MEETING": str(meeting),  # a folder shared by all
            }
            environment = os.environ | environment | (variables or {})
            with (self._files / f"{index}.out").open("w") as out, (self._files / f"{index}.err").open("w") as err:
                process = subprocess.Popen(command, env=environment, stdout=out, stderr=err)
            self.processes.append(process)
            self.callback(process.wait)
            self.callback(process.kill)

    def wait(self) -> list[Ended]:
        """Wait at most `LIMIT` seconds for all to end."""
        start = time.monotonic()
        seconds = {}
        while len(seconds) < len(self.processes) and time.monotonic() < start + LIMIT:
            for index, process in enumerate(self.processes):
                if process.poll() is not None:
                    seconds.setdefault(index, time.monotonic() - start)
            time.sleep(0.02)
        return [self._ended(index, seconds.get(index)) for index in range(len(self.processes))]

    def _ended(self, index: int, seconds: float | None) -> Ended:
        out, err = ((self._files / f"{index}.{kind}").read_text() for kind in ("out", "err"))
        return Ended(None if seconds is None else self.processes[index].returncode, out, err, seconds or 0.0)


def script(text: str, processes: int, **variables: str) -> Job:
    """Start processes of a run without a trainer; `text` makes and joins the `group`.

    A failure is code 2 and its message. `text` begins in all processes at once, after their imports, so its timeouts
    can be short.
    """
    start = f"""
        import os, pathlib, sys, time
        from shampax.framework.distributed import cluster
        from shampax.framework.base.errors import UserError
        from shampax.framework.distributed.processes import Group
        place = cluster.place()
        explain = lambda error: (2, f"error: {{error}}") if isinstance(error, UserError) else None
        meeting = pathlib.Path(os.environ["MEETING"])
        (meeting / str(os.getpid())).touch()
        while len(list(meeting.iterdir())) < {processes}:
            time.sleep(0.01)
    """
    program = textwrap.dedent(start) + textwrap.dedent(text)
    return Job([sys.executable, "-c", program], processes=processes, devices=1, variables=variables)


def free_port() -> int:
    """Return a free port of loopback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run_together(script: str, *, processes: int, devices: int, arguments: Sequence[str] = ()):
    """Run a script in several processes.

    Args:
      script: Python text; `jax` is imported and the job has started when it begins.
      processes, devices: number of processes, and of simulated devices of each.
      arguments: `sys.argv[1:]` of the script.

    Returns:
      The output of each process.

    Raises:
      AssertionError: a process failed or did not end; the message has its output.
    """
    with Job([sys.executable, "-c", _START + script, *arguments], processes=processes, devices=devices) as job:
        ended = job.wait()
    assert [process.code for process in ended] == [0] * processes, [(each.code, each.err[-3000:]) for each in ended]
    return [process.out for process in ended]
