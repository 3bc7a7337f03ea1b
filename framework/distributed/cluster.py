"""Read from the environment which process of a run this is.

`jax.distributed.initialize` can detect this too, but only while it starts JAX; the processes of a run compare their
configs before that (`framework/distributed/processes.py`). Hosts and ports are those that JAX would choose. Sources, in
this order:

- JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID; each overrides the others below.
- Open MPI: OMPI_COMM_WORLD_SIZE, _RANK, _LOCAL_SIZE and _LOCAL_RANK. It has no address: set JAX_COORDINATOR_ADDRESS.
- Slurm: variables of a step started by srun, https://slurm.schedmd.com/srun.html.
- Cloud TPU on GKE: TPU_WORKER_HOSTNAMES, TPU_WORKER_ID, and MEGASCALE_... if a run has several slices.
"""

import glob
import os
import re
from collections.abc import Mapping
from typing import NamedTuple

from ..base.errors import UserError

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
PORT, LOCAL_DEVICES = "JAX_COORDINATOR_PORT", "JAX_LOCAL_DEVICE_IDS"
SECRET = "SHAMPAX_SECRET"
_TPU_PORT = 8482
_EPHEMERAL_PORTS = range(65536 - 2**12, 65536)  # above those that Linux assigns
_GPU_FILES = "/dev/nvidia[0-9]*"
_VISIBLE_GPUS = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")


class Place(NamedTuple):
    """Identify one process of a run. The defaults mean that a value is unknown."""

    host: str = ""  # where process 0 listens
    port: int = 1
    count: int = 0  # number of processes
    index: int = -1  # of this process, from 0
    here: tuple[int, int] = (1, 0)  # number of processes on this machine, and index of this process among them
    local_devices: tuple[int, ...] | None = None  # numbers of the visible GPUs that this process uses; None for all
    visible: int = 0  # number of visible GPUs
    secret: str = ""  # known only to the processes of this run


def place(environ: Mapping[str, str] = os.environ) -> Place | None:
    """Return which process of a run this is, or None if it is the only one.

    JAX_COORDINATOR_PORT changes the port of a detected cluster. JAX_NUM_PROCESSES=1 alone makes this process a run of
    its own; with the other two variables it is process 0 of 1, which starts and ends like a run of several.

    Raises:
      UserError: a value is missing or invalid.
    """
    given = {name: environ[name] for name in (ADDRESS, COUNT, INDEX) if environ.get(name)}
    explicit = len(given) == 3
    if not explicit and given.get(COUNT) == "1" and given.get(INDEX, "0") == "0":
        return None
    # mpirun under Slurm starts its helpers with srun, and the processes inherit srun's variables: Open MPI comes first.
    detected = None if explicit else _open_mpi(environ) or _slurm(environ) or _gke_tpu(environ)
    if not (given or detected):
        return None
    host, port, count, index, here, *_ = detected or Place()
    if COUNT in given:
        count = _number(given, COUNT, least=1)
    if INDEX in given:
        index = _number(given, INDEX)
    if 0 < count <= index:
        raise UserError(
            f"{INDEX}={index} and {COUNT}={count}: the index must be below the number of processes. Give each process "
            "another index, from 0."
        )
    if ADDRESS in given:
        host, port = _address(given[ADDRESS])
    elif environ.get(PORT):
        port = _number(environ, PORT, least=1, most=2**16 - 1)
    missing = [name for name, known in ((ADDRESS, host), (COUNT, count), (INDEX, index >= 0)) if not known]
    if missing:
        said = " and ".join(given) or "the cluster's variables"
        raise UserError(
            f"{said} set for a run of several processes, but {' and '.join(missing)} cannot be detected. Set all three "
            f"variables in each process, or {COUNT}=1 for a run of this process alone."
        )
    if count == 1 and not explicit:
        return None
    return Place(host, port, count, index, here, *_own_gpus(environ, *here), environ.get(SECRET, ""))


def _open_mpi(environ: Mapping[str, str]) -> Place | None:
    if "OMPI_COMM_WORLD_RANK" not in environ:
        return None
    size, rank, local_size, local_rank = (
        _number(environ, f"OMPI_COMM_WORLD_{name}") for name in ("SIZE", "RANK", "LOCAL_SIZE", "LOCAL_RANK")
    )
    return Place(count=size, index=rank, here=(local_size, local_rank))


def _slurm(environ: Mapping[str, str]) -> Place | None:
    # A batch script has SLURM_PROCID and SLURM_NTASKS as well; only a step has that many processes.
    if "SLURM_STEP_NODELIST" not in environ or "SLURM_STEP_NUM_TASKS" not in environ:
        return None
    count = _number(environ, "SLURM_STEP_NUM_TASKS")
    nodes = _number(environ, "SLURM_STEP_NUM_NODES", least=1) if "SLURM_STEP_NUM_NODES" in environ else count
    return Place(
        first_host(environ["SLURM_STEP_NODELIST"]),
        _EPHEMERAL_PORTS[_number(environ, "SLURM_JOB_ID") % 2**12],
        count,
        _number(environ, "SLURM_PROCID"),
        here=(-(-count // nodes), _number(environ, "SLURM_LOCALID")),
    )


def first_host(hostlist: str) -> str:
    """Return the first host of a Slurm host list: "n01" of "n[01-03,7],gpu".

    Raises:
      UserError: the text is not a host list.
    """
    match = re.match(r"(?:[^\[\],]|\[\d+[\d,-]*\])+(?=,|$)", hostlist)
    if match is None:
        raise UserError(f"SLURM_STEP_NODELIST={hostlist!r}: cannot parse it. It should look like n[01-03,7],gpu.")
    return re.sub(r"\[(\d+)[\d,-]*\]", r"\1", match[0])


def _own_gpus(environ: Mapping[str, str], processes: int, index: int) -> tuple[tuple[int, ...] | None, int]:
    """Return the GPUs of process `index` of those on this machine, None for all it sees, and how many it sees.

    A process that sees fewer GPUs than the job has on this machine already has its own.
    """
    allotted = "SLURM_GPUS_ON_NODE"
    total = _number(environ, allotted) if environ.get(allotted) else len(glob.glob(_GPU_FILES))
    listed = next((environ[name] for name in _VISIBLE_GPUS if name in environ), None)
    visible = total if listed is None else len(listed.split(",")) if listed else 0
    if given := environ.get(LOCAL_DEVICES):
        if not re.fullmatch("[0-9]{1,4}(,[0-9]{1,4})*", given):
            raise UserError(f"{LOCAL_DEVICES}={given!r}: must be numbers of GPUs. Write e.g. 0,1.")
        return tuple(map(int, given.split(","))), visible
    if processes < 2 or visible < max(processes, total):
        return None, visible
    if visible % processes:
        raise UserError(
            f"{processes} processes share {visible} GPUs, which does not divide evenly. Start another number of "
            f"processes on each machine, or set {LOCAL_DEVICES} in each, e.g. 0,1."
        )
    each = visible // processes
    return tuple(range(index * each, (index + 1) * each)), visible


def _gke_tpu(environ: Mapping[str, str]) -> Place | None:
    hosts = environ.get("TPU_WORKER_HOSTNAMES", "").split(",")
    if not hosts[0] or "TPU_WORKER_ID" not in environ:
        return None
    index, slices, first = _number(environ, "TPU_WORKER_ID"), 1, hosts[0]
    if environ.get("MEGASCALE_NUM_SLICES", "1") != "1":
        slices = _number(environ, "MEGASCALE_NUM_SLICES")
        index += len(hosts) * _number(environ, "MEGASCALE_SLICE_ID")
        first = environ.get("MEGASCALE_COORDINATOR_ADDRESS", "")
    host = first if first.count(":") > 1 else first.partition(":")[0]  # IPv6, HOST or HOST:PORT
    return Place(host, _TPU_PORT, len(hosts) * slices, index)


def _address(text: str) -> tuple[str, int]:
    match = re.fullmatch(r"(\[[0-9a-fA-F.]*:[0-9a-fA-F:.]*(?:%\w+)?\]|[^\s:/@\[\]]+):([0-9]{1,5})", text)
    if match is None or not 0 < int(match[2]) < 2**16:
        raise UserError(f"{ADDRESS}={text!r}: must be host:port of process 0, e.g. 10.0.0.1:8476 or [fe80::1]:8476.")
    return match[1].strip("[]"), int(match[2])


def _number(said: Mapping[str, str], name: str, *, least: int = 0, most: int = 2**32 - 1) -> int:
    text = said.get(name, "")
    if not re.fullmatch("[0-9]{1,10}", text) or not least <= int(text) <= most:
        raise UserError(f"{name}={text!r} in the environment: must be a whole number from {least} to {most}.")
    return int(text)
