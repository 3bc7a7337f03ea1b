"""Read from the environment which process of a run this is.

`jax.distributed.initialize` can detect this too, but only while it starts JAX. The processes of a run connect and
compare their configs before that (`framework/distributed/processes.py`), and JAX has no public function for the
detection alone. Hosts and ports are those that JAX would choose. Sources, in this order:

- JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID; each overrides the others below.
- Open MPI: OMPI_COMM_WORLD_SIZE, _RANK, _LOCAL_SIZE, _LOCAL_RANK; in version 4, OMPI_MCA_orte_hnp_uri has the address.
- Slurm: variables of a step started by srun, https://slurm.schedmd.com/srun.html.
- Cloud TPU on GKE: TPU_WORKER_HOSTNAMES, TPU_WORKER_ID, and MEGASCALE_... if a run has several slices.
- Cloud TPU VMs: attributes that the machine's metadata server returns.
"""

import glob
import os
import re
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import NamedTuple

from ..base.errors import UserError

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
PORT, LOCAL_DEVICES = "JAX_COORDINATOR_PORT", "JAX_LOCAL_DEVICE_IDS"
_TPU_PORT = 8482
_EPHEMERAL_PORTS = range(65536 - 2**12, 65536)  # above those that Linux assigns
_TPU_FILES = ("/dev/accel*", "/dev/vfio/[0-9]*")
_GPU_FILES = "/dev/nvidia[0-9]*"
_VISIBLE_GPUS = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
_METADATA_SECONDS = 10.0


class Place(NamedTuple):
    """Identify one process of a run.

    Attributes:
      host, port: where process 0 listens.
      count: number of processes.
      index: number of this process, from 0.
      port_in: environment variable that can change the port.
      local_devices: numbers of this machine's GPUs that this process uses; None leaves the choice to JAX.
    """

    host: str
    port: int
    count: int
    index: int
    port_in: str = ADDRESS
    local_devices: tuple[int, ...] | None = None


def place(environ: Mapping[str, str] = os.environ) -> Place | None:
    """Return which process of a run this is, or None if it is the only one.

    JAX_COORDINATOR_PORT changes the port of a detected cluster. JAX_NUM_PROCESSES=1 alone makes this process a run of
    its own; with the other two variables it is process 0 of 1, which starts and ends like a run of several.

    Raises:
      UserError: a value is missing or invalid.
    """
    given = {name: environ[name] for name in (ADDRESS, COUNT, INDEX) if environ.get(name)}
    alone = len(given) < 3 and given.get(COUNT) == "1" and given.get(INDEX, "0") == "0"
    found = None if alone or len(given) == 3 else _find(environ)
    if alone or (found is None and not given):
        return None
    count = _number(given, COUNT) if COUNT in given else found and found.count
    index = _number(given, INDEX) if INDEX in given else found and found.index
    if index is not None and count is not None and not 0 <= index < count:
        raise UserError(
            f"{INDEX}={index} and {COUNT}={count}: the index must be below the number of processes. Give each process "
            "another index, from 0."
        )
    host, port = (found.host, found.port) if found else ("", 1)
    if environ.get(PORT):
        port = _number(environ, PORT)
    if ADDRESS in given:
        host, port = _address(given[ADDRESS])
    if not host or count is None or index is None:
        missing = [name for name, value in ((ADDRESS, host or None), (COUNT, count), (INDEX, index)) if value is None]
        said = " and ".join(given) or "the cluster's variables"
        raise UserError(
            f"{said} set for a run of several processes, but {' and '.join(missing)} cannot be detected. Set all three "
            f"variables in each process, or {COUNT}=1 for a run of this process alone."
        )
    if not 0 < port < 2**16:
        raise UserError(f"{PORT}={port}: must be from 1 to 65535.")
    if count == 1 and len(given) < 3:
        return None
    return Place(host, port, count, index, ADDRESS if ADDRESS in given else PORT, found and found.local_devices)


def _find(environ: Mapping[str, str]) -> Place | None:
    """Ask the clusters in turn; the host is "" if a cluster does not tell it."""
    # mpirun under Slurm starts its helpers with srun, and the processes inherit srun's variables: Open MPI comes first.
    finders = (_open_mpi, _slurm, _gke_tpu, _tpu_vm)
    return next((found for find in finders if (found := find(environ)) is not None), None)


def _open_mpi(environ: Mapping[str, str]) -> Place | None:
    if "OMPI_COMM_WORLD_RANK" not in environ:
        return None
    uri = environ.get("OMPI_MCA_orte_hnp_uri", "")  # JOB.0;tcp://IP,IP:PORT; Open MPI 5 has none
    match = re.match(r"(\d+)\.[^;]*;.*?(?:tcp://([^,:]+)|tcp6://\[([^,\]]+))", uri)
    size, rank, local_size, local_rank = (
        _number(environ, f"OMPI_COMM_WORLD_{name}") for name in ("SIZE", "RANK", "LOCAL_SIZE", "LOCAL_RANK")
    )
    return Place(
        (match[2] or match[3]) if match else "",
        _EPHEMERAL_PORTS[int(match[1]) // 2**12 % 2**12 if match else 0],  # the low 12 bits of a job's number are 0
        size,
        rank,
        local_devices=_own_devices(environ, local_size, local_rank),
    )


def _slurm(environ: Mapping[str, str]) -> Place | None:
    # A batch script has SLURM_PROCID and SLURM_NTASKS as well; only a step has that many processes.
    if "SLURM_STEP_NODELIST" not in environ or "SLURM_STEP_NUM_TASKS" not in environ:
        return None
    count = _number(environ, "SLURM_STEP_NUM_TASKS")
    nodes = _number(environ, "SLURM_STEP_NUM_NODES") if "SLURM_STEP_NUM_NODES" in environ else count
    return Place(
        first_host(environ["SLURM_STEP_NODELIST"]),
        _EPHEMERAL_PORTS[_number(environ, "SLURM_JOB_ID") % 2**12],
        count,
        _number(environ, "SLURM_PROCID"),
        local_devices=_own_devices(environ, -(-count // max(1, nodes)), _number(environ, "SLURM_LOCALID")),
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


def _own_devices(environ: Mapping[str, str], tasks: int, index: int) -> tuple[int, ...] | None:
    """Return the share of process `index` in the GPUs of a machine with `tasks` processes, or None for all it sees.

    A process that sees fewer GPUs than the job has on this machine already has its own.
    """
    allotted = "SLURM_GPUS_ON_NODE"
    here = _number(environ, allotted) if environ.get(allotted) else len(glob.glob(_GPU_FILES))
    listed = next((environ[name] for name in _VISIBLE_GPUS if name in environ), None)
    visible = here if listed is None else len(listed.split(",")) if listed else 0
    total = here or visible
    if environ.get(LOCAL_DEVICES) or tasks == 1 or visible < total or total < tasks:
        return None
    if total % tasks:
        raise UserError(
            f"{tasks} processes share {total} GPUs, which does not divide evenly. Start another number of processes on "
            f"each machine, or set {LOCAL_DEVICES} in each, e.g. 0,1."
        )
    each = total // tasks
    return tuple(range(index * each, (index + 1) * each))


def _gke_tpu(environ: Mapping[str, str]) -> Place | None:
    hosts = environ.get("TPU_WORKER_HOSTNAMES")
    if not hosts or "TPU_WORKER_ID" not in environ:
        return None
    return _slices(hosts.split(","), _number(environ, "TPU_WORKER_ID"), environ)


def _tpu_vm(environ: Mapping[str, str]) -> Place | None:
    if environ.get("TPU_SKIP_MDS_QUERY") or not any(map(glob.glob, _TPU_FILES)):
        return None
    index, endpoints = (_metadata(environ, key) for key in ("agent-worker-number", "worker-network-endpoints"))
    if not index or not endpoints:
        return None  # the TPU of another kind of machine
    hosts = [endpoint.rpartition(":")[2] for endpoint in endpoints.split(",")]  # NAME:NUMBER:IP, or only IP
    said = dict(re.findall(r"^\s*(MEGASCALE_\w+)\s*:\s*'?([^'\n]*)'?\s*$", _metadata(environ, "tpu-env"), re.MULTILINE))
    return _slices(hosts, _number({"agent-worker-number": index}, "agent-worker-number"), said)


def _slices(hosts: list[str], index: int, said: Mapping[str, str]) -> Place:
    """Return a process of one slice, or of several slices that form one run."""
    slices = _number(said, "MEGASCALE_NUM_SLICES") if said.get("MEGASCALE_NUM_SLICES") else 1
    if slices == 1:
        return Place(hosts[0], _TPU_PORT, len(hosts), index)
    host, _, _ = said.get("MEGASCALE_COORDINATOR_ADDRESS", "").partition(":")
    index += len(hosts) * _number(said, "MEGASCALE_SLICE_ID")
    return Place(host, _TPU_PORT, len(hosts) * slices, index)


def _metadata(environ: Mapping[str, str], key: str) -> str:
    """Return an attribute of this machine, "" if it has none."""
    server = environ.get("GCE_METADATA_HOST") or "metadata.google.internal"
    url = f"http://{server}/computeMetadata/v1/instance/attributes/{key}"
    direct = urllib.request.ProxyHandler({})  # a proxy would ask the server of its own machine
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.build_opener(direct).open(request, timeout=_METADATA_SECONDS) as answer:
            return answer.read().decode().strip()
    except OSError as error:
        if isinstance(error, urllib.error.HTTPError) and error.code == 404:
            return ""
        raise UserError(
            f"cannot read {key} from the metadata server {server}, which knows the machines of this TPU: {error}. Set "
            f"{ADDRESS}, {COUNT} and {INDEX} in each process, or TPU_SKIP_MDS_QUERY=1 for a run of this machine alone."
        ) from error


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(f"{ADDRESS}={text!r}: must be host:port of process 0, e.g. 10.0.0.1:8476.")
    return host.strip("[]"), int(port)


def _number(said: Mapping[str, str], name: str) -> int:
    text = said.get(name, "")
    if not text.isdecimal():
        raise UserError(f"{name}={text!r} in the environment: must be a whole number.")
    return int(text)
