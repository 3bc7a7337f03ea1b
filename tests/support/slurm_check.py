"""Check the shipped Slurm script under a real Slurm, which is started on this machine and stopped again.

    apt-get install --no-install-recommends slurm-wlm munge
    python tests/support/slurm_check.py

Needs root. Two nodes on one machine run the shrunk language model, one process each: undisturbed; requeued while
training; cancelled; stopped by its time limit. The requeued run must end with the arrays of the undisturbed run, bit
for bit. Prints JSON; exits with 1 after any other outcome.
"""

import argparse
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launch" / "clusters" / "slurm.sbatch"
NODES = [socket.gethostname(), "localhost"]  # two host names that resolve to one machine
SMALL = {
    "task.layers": 2,
    "task.embed_dim": 32,
    "task.heads": 4,
    "task.kv_heads": 2,
    "task.head_dim": 8,
    "task.mlp_dim": 48,
    "task.vocab_size": 300,
    "data.sequence_length": 16,
    "data.max_records": 2,
    "optimizer.block_size": 32,
    "batch_size": 16,
    "evaluation.every": "0 steps",
    "evaluation.batches": 1,
    "checkpoint.every": "20 steps",
    "simulated_devices": 1,
    "processes.death_seconds": 20.0,
}
CONFIGURATION = """
ClusterName=check
SlurmctldHost={host}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job waits until its credential has expired, by default two minutes.
AuthInfo=socket={place}/munge.socket,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
KillWait=60
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
StateSaveLocation={place}/state
SlurmdSpoolDir={place}/spool-%n
SlurmctldPidFile={place}/slurmctld.pid
SlurmdPidFile={place}/slurmd-%n.pid
SlurmctldLogFile={place}/slurmctld.log
SlurmdLogFile={place}/slurmd-%n.log
SlurmctldPort={ports[0]}
{nodes}
PartitionName=all Nodes={names} Default=YES MaxTime=INFINITE State=UP
"""


@contextlib.contextmanager
def slurm(place: Path) -> Iterator[None]:
    """Run a Slurm of two nodes that writes only to `place`; set SLURM_CONF."""
    ports = free_ports(1 + len(NODES))
    nodes = "\n".join(
        f"NodeName={name} NodeHostname={socket.gethostname()} NodeAddr=127.0.0.1 Port={port} CPUs=1 State=UNKNOWN"
        for name, port in zip(NODES, ports[1:], strict=True)
    )
    (place / "state").mkdir()
    (place / "slurm.conf").write_text(
        CONFIGURATION.format(host=socket.gethostname(), place=place, ports=ports, nodes=nodes, names=",".join(NODES))
    )
    (place / "munge.key").write_bytes(os.urandom(128))
    (place / "munge.key").chmod(0o600)
    os.environ["SLURM_CONF"] = str(place / "slurm.conf")
    munged = ["munged", "--foreground", "--force", f"--key-file={place}/munge.key", f"--socket={place}/munge.socket"]
    munged += [f"--{kind}-file={place}/munged.{kind}" for kind in ("pid", "log", "seed")]
    daemons = [munged, ["slurmctld", "-D"], *(["slurmd", "-D", "-N", name] for name in NODES)]
    with contextlib.ExitStack() as stack:
        for command in daemons:
            out = stack.enter_context((place / f"{command[0]}.out").open("a"))
            daemon = subprocess.Popen(command, stdout=out, stderr=out)
            stack.callback(daemon.wait)
            stack.callback(daemon.terminate)
            time.sleep(1)
            assert daemon.poll() is None, (command, (place / f"{command[0]}.out").read_text())
        wait_for("idle nodes", lambda: said("sinfo", "-h", "-o", "%D %t").strip() == f"{len(NODES)} idle", 60)
        try:
            yield
        finally:
            said("scancel", "--user=root")
            wait_for("the end of all jobs", lambda: not said("squeue", "-h", "-t", "running,completing"), 90)


class Job:
    """Submit the shipped script."""

    def __init__(self, place: Path, name: str, *options: str, steps: int):
        self.workdir, self.log = place / name, place / f"{name}.log"
        knobs = [f"--config.{key}={value}" for key, value in (SMALL | {"duration": f"{steps} steps"}).items()]
        done = said(
            "sbatch",
            "--parsable",
            f"--output={self.log}",
            *options,
            str(SCRIPT),
            "--config=shampax/configs/lm.py:sample",
            f"--workdir={self.workdir}",
            *knobs,
        )
        self.number = done.strip().split(";")[0]

    def field(self, name: str) -> str:
        found = re.search(rf"\b{name}=(\S+)", said("scontrol", "show", "job", self.number))
        return found[1] if found else ""

    def at_work(self, step: int) -> None:
        def saved() -> bool:
            whole = self.workdir.glob("checkpoints/*/SHA256SUMS-0-of-*")
            return any(int(path.parent.name) >= step for path in whole if path.parent.name.isdecimal())

        wait_for(f"a checkpoint after step {step}", saved, 300)

    def ended(self, seconds: float = 600) -> str:
        states = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        wait_for(f"the end of job {self.number}", lambda: self.field("JobState") in states, seconds)
        return self.field("JobState")

    def outcome(self) -> dict[str, object]:
        log = self.log.read_text()
        return {
            "state": self.field("JobState"),
            "exit code": self.field("ExitCode"),
            "restarts": int(self.field("Restarts")),
            "resumed": len(re.findall(r"^0: resuming from ", log, re.MULTILINE)),
            "stopped by": re.findall(r"^0: Stopped by (\w+) after step", log, re.MULTILINE),
        }


def check(place: Path) -> dict[str, dict[str, object]]:
    """Return the outcome of each job, with a list of faults."""
    results = {}

    def note(name: str, job: Job, **expected: object) -> None:
        results[name] = job.outcome()
        faults = [f"{key} is not {value!r}" for key, value in expected.items() if results[name][key] != value]
        if results[name]["state"] == "COMPLETED" and name != "undisturbed":
            faults += differences(job.workdir, place / "undisturbed")
        results[name]["faults"] = faults

    steps = 120
    whole = Job(place, "undisturbed", steps=steps)
    whole.ended()
    note("undisturbed", whole, state="COMPLETED", restarts=0, resumed=0)

    requeued = Job(place, "requeued", steps=steps)
    requeued.at_work(40)
    said("scontrol", "requeue", requeued.number)
    requeued.ended()
    note("requeued", requeued, state="COMPLETED", restarts=1, resumed=1)

    cancelled = Job(place, "cancelled", steps=100_000)
    cancelled.at_work(20)
    said("scancel", cancelled.number)
    cancelled.ended()
    note("cancelled", cancelled, state="CANCELLED", restarts=0)

    # Slurm checks time limits about once a minute.
    limited = Job(place, "limited", "--time=2", "--signal=TERM@60", steps=100_000)
    wait_for("a restart", lambda: int(limited.field("Restarts") or 0) == 1, 300)
    wait_for("a resumed run", lambda: "resuming from" in limited.log.read_text(), 300)
    said("scancel", limited.number)
    limited.ended()
    note("limited", limited, state="CANCELLED", restarts=1, resumed=1)
    return results


def differences(mine: Path, whole: Path) -> list[str]:
    """Return the arrays of the last checkpoint that differ in any bit."""
    from shampax.framework.checkpoint import store

    sides = []
    for workdir in (mine, whole):
        path = store.checkpoints(workdir)[-1]
        sides.append(store.read(path, dict.fromkeys(store.arrays(path))))
    a, b = sides
    if a.keys() != b.keys():
        return ["other arrays"]
    return [f"{name} differs" for name in a if np.asarray(a[name]).tobytes() != np.asarray(b[name]).tobytes()]


def said(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def wait_for(what: str, condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not within {seconds:g} s")
        time.sleep(0.2)


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        free = [stack.enter_context(socket.create_server(("", 0))) for _ in range(count)]
        return [each.getsockname()[1] for each in free]


def main() -> int:
    """Run the command and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, help="a new folder for workdirs, logs and configuration, which stays")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # end the daemons first
    os.environ["PYTHON"] = sys.executable
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    with contextlib.ExitStack() as stack:
        place = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        place.mkdir(exist_ok=True)
        place.chmod(0o755)  # munged insists
        # All jobs compile the same programs, so that later jobs train before their time limit.
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(place.resolve() / "programs")
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        stack.enter_context(slurm(place.resolve()))
        results = check(place.resolve())
    print(json.dumps(results, indent=2))
    return 1 if any(result["faults"] for result in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
