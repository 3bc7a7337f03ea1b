"""Which process of a run this is, as the environment says: by JAX_... variables, or by whoever has started it.

JAX finds these out by itself, too, when it starts. Here they are needed before that: the processes of a run meet, and
compare what they are to do, before JAX looks at a device (`framework/distributed/processes.py`). The ports are
those that JAX would take. Formats:

- Open MPI 4: OMPI_COMM_WORLD_SIZE, _RANK, _LOCAL_SIZE, _LOCAL_RANK; OMPI_MCA_orte_hnp_uri has the addresses of mpirun.
- Slurm: the variables that srun sets in a step, https://slurm.schedmd.com/srun.html.
- Cloud TPU on GKE: TPU_WORKER_HOSTNAMES, TPU_WORKER_ID, and MEGASCALE_... where a run has several slices.
- Kubernetes: JOB_COMPLETION_INDEX of an indexed Job; the pods' host names are the Job's name and that index.
- Cloud TPU VMs: attributes of the machine, which its metadata server tells.
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
PORT = "JAX_COORDINATOR_PORT"
_TPU_PORT, _KUBERNETES_PORT = 8482, 55527
_EPHEMERAL_PORTS = range(65536 - 2**12, 65536)  # above those that Linux gives away by itself
_TPU_FILES = ("/dev/accel*", "/dev/vfio/[0-9]*")
_METADATA_SECONDS = 10.0


class Place(NamedTuple):
    """Which process of a run this is: number `index` of `count`; process 0 is at `host`:`port`."""

    host: str
    port: int
    count: int
    index: int
    hosts: tuple[str, ...] = ()  # of the processes, by index, where that is known
    port_in: str = ADDRESS  # the variable that has the last word on the port
    local_device: int | None = None  # the only one to take, of those that this machine has


class Found(NamedTuple):
    """What a cluster says; None where it does not say it."""

    name: str
    host: str | None
    port: int
    count: int | None
    index: int
    hosts: tuple[str, ...] = ()  # of the processes, by index
    local_device: int | None = None


def place(environ: Mapping[str, str] = os.environ) -> Place | None:
    """Which process of a run this is, or None where it is the whole run.

    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID have the last word, each for itself, and where all
    three are set nothing else is looked at; JAX_COORDINATOR_PORT moves the port of what a cluster says.
    JAX_NUM_PROCESSES=1 by itself makes a run of this process alone; with the other two it is process 0 of 1, which
    starts, adds up and ends as those of many do.

    Raises:
      UserError: what is said is not all that is needed, or makes no sense.
    """
    given = {name: environ[name] for name in (ADDRESS, COUNT, INDEX) if environ.get(name)}
    if given.get(COUNT) == "1" and len(given) < 3:
        return _alone(given)
    found = None if len(given) == 3 else _find(environ)
    if not given and (found is None or found.count == 1):
        return None
    name, host, port = (found.name, found.host, found.port) if found else ("", None, 0)
    if environ.get(PORT):
        port = _number(environ, PORT)
    if ADDRESS in given:
        host, port = _address(given[ADDRESS])
    count = _number(given, COUNT) if COUNT in given else found and found.count
    index = _number(given, INDEX) if INDEX in given else found and found.index
    missing = [name for name, value in ((ADDRESS, host), (COUNT, count), (INDEX, index)) if value is None]
    if host is None or count is None or index is None:
        says = " and ".join([*given, *([name] if name else [])])
        raise UserError(
            f"{says} {'say' if ' and ' in says else 'says'} that this is a process of several, and "
            f"{' and '.join(missing)} {'are' if len(missing) > 1 else 'is'} not set in the environment; "
            "set all three in each process, or JAX_NUM_PROCESSES=1 for a run of this process alone"
        )
    if not 0 <= index < count:
        raise UserError(
            f"this is process {index} of {count} by {' and '.join([*given, name]).removesuffix(' and ')}; "
            f"give the number of processes ({COUNT}), and to each another index from 0 to one less ({INDEX})"
        )
    if not 0 < port < 2**16:
        raise UserError(f"the port of process 0 is {port}; give one from 1 to 65535 in {PORT}")
    if count == 1 and len(given) < 3:
        return None
    hosts = found.hosts if found and len(found.hosts) == count else ()
    return Place(host, port, count, index, hosts, ADDRESS if ADDRESS in given else PORT, found and found.local_device)


def expand(hostlist: str) -> list[str]:
    """The hosts of a Slurm host list: "n[01-03,7],gpu" is n01, n02, n03, n7, gpu.

    Raises:
      UserError: it is none.
    """
    entry = r"(?:[^\[\],]|\[[0-9,-]+\])+"
    if not re.fullmatch(f"{entry}(?:,{entry})*", hostlist):
        raise UserError(f"{hostlist!r} is no list of hosts as Slurm writes them, such as n[01-03,7],gpu")
    hosts = []
    for group in re.findall(entry, hostlist):
        found = [""]
        for literal, ranges in re.findall(r"([^\[\]]+)|\[([^\]]*)\]", group):
            endings = [literal] if literal else [number for part in ranges.split(",") for number in _range(part)]
            found = [start + ending for start in found for ending in endings]
        hosts += found
    return hosts


def _range(part: str) -> list[str]:
    first, dash, last = part.partition("-")
    try:
        return [f"{number:0{len(first)}}" for number in range(int(first), int(last if dash else first) + 1)]
    except ValueError:
        raise UserError(f"[{part}] is no range of hosts as Slurm writes them, such as [01-03]") from None


def _alone(given: Mapping[str, str]) -> None:
    if _number(given, INDEX) if INDEX in given else 0:
        raise UserError(
            f"{COUNT} is '1' and {INDEX} is {given[INDEX]!r}; give the number of processes, and to each another index "
            "from 0 to one less"
        )


def _find(environ: Mapping[str, str]) -> Found | None:
    # mpirun under Slurm starts its own helpers by srun, whose variables the processes inherit: it is asked first.
    for look in (_open_mpi, _slurm, _gke_tpu, _kubernetes, _tpu_vm):
        found = look(environ)
        if found is not None:
            return found
    return None


def _open_mpi(environ: Mapping[str, str]) -> Found | None:
    if "OMPI_COMM_WORLD_RANK" not in environ:
        return None
    uri = environ.get("OMPI_MCA_orte_hnp_uri", "")  # JOB.0;tcp://IP,IP:PORT; Open MPI 5 has none
    match = re.match(r"(\d+)\.[^;]*;.*?(?:tcp://([^,:]+)|tcp6://\[([^,\]]+))", uri)
    port = _EPHEMERAL_PORTS[int(match[1]) // 2**12 % 2**12 if match else 0]  # the low 12 bits of a job's number are 0
    shared = _number(environ, "OMPI_COMM_WORLD_LOCAL_SIZE") > 1
    return Found(
        "Open MPI",
        (match[2] or match[3]) if match else None,
        port,
        _number(environ, "OMPI_COMM_WORLD_SIZE"),
        _number(environ, "OMPI_COMM_WORLD_RANK"),
        local_device=_own_device(environ, _number(environ, "OMPI_COMM_WORLD_LOCAL_RANK")) if shared else None,
    )


def _slurm(environ: Mapping[str, str]) -> Found | None:
    # A batch script, too, has SLURM_PROCID and SLURM_NTASKS; only in a step are there as many processes as that.
    if "SLURM_STEP_NODELIST" not in environ or "SLURM_STEP_NUM_TASKS" not in environ:
        return None
    hosts = expand(environ["SLURM_STEP_NODELIST"])
    count = _number(environ, "SLURM_STEP_NUM_TASKS")
    shared = len(hosts) < count
    return Found(
        "Slurm",
        hosts[0],
        _EPHEMERAL_PORTS[_number(environ, "SLURM_JOB_ID") % 2**12],
        count,
        _number(environ, "SLURM_PROCID"),
        tuple(hosts),
        _own_device(environ, _number(environ, "SLURM_LOCALID")) if shared else None,
    )


def _own_device(environ: Mapping[str, str], local_index: int) -> int | None:
    """Processes that share a machine take one device each, unless each is shown only its own."""
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    return local_index if visible is None or "," in visible else None


def _gke_tpu(environ: Mapping[str, str]) -> Found | None:
    hosts = environ.get("TPU_WORKER_HOSTNAMES")
    if not hosts or "TPU_WORKER_ID" not in environ:
        return None
    return _slices("GKE", hosts.split(","), _number(environ, "TPU_WORKER_ID"), environ)


def _kubernetes(environ: Mapping[str, str]) -> Found | None:
    # Pods of an indexed Job may as well be runs of their own; with JAX_NUM_PROCESSES they are one.
    if "JOB_COMPLETION_INDEX" not in environ or not environ.get(COUNT):
        return None
    index, count = _number(environ, "JOB_COMPLETION_INDEX"), _number(environ, COUNT)
    stem, service = environ.get("HOSTNAME", "").removesuffix(f"-{index}"), environ.get("HEADLESS_SERVICE")
    hosts = tuple(f"{stem}-{other}.{service}" for other in range(count)) if stem and service else ()
    if not hosts and not environ.get(ADDRESS):
        raise UserError(
            f"this is a pod of an indexed Job with {COUNT}={count}, and HEADLESS_SERVICE or HOSTNAME is not set; set "
            "HEADLESS_SERVICE to the name of the service that gives the pods their names: in a JobSet, the JobSet's"
        )
    return Found("Kubernetes", hosts[0] if hosts else None, _KUBERNETES_PORT, None, index, hosts)


def _tpu_vm(environ: Mapping[str, str]) -> Found | None:
    if environ.get("TPU_SKIP_MDS_QUERY") or not any(map(glob.glob, _TPU_FILES)):
        return None
    index, endpoints = (_metadata(environ, key) for key in ("agent-worker-number", "worker-network-endpoints"))
    if not index or not endpoints:
        return None  # a TPU of another kind of machine
    hosts = [endpoint.rpartition(":")[2] for endpoint in endpoints.split(",")]  # NAME:NUMBER:IP, or only the last
    said = dict(re.findall(r"^\s*(MEGASCALE_\w+)\s*:\s*'?([^'\n]*)'?\s*$", _metadata(environ, "tpu-env"), re.MULTILINE))
    return _slices("the TPU's metadata", hosts, _number({"agent-worker-number": index}, "agent-worker-number"), said)


def _slices(name: str, hosts: list[str], index: int, said: Mapping[str, str]) -> Found:
    """A process of a slice, or of several slices that are one run."""
    slices = _number(said, "MEGASCALE_NUM_SLICES") if said.get("MEGASCALE_NUM_SLICES") else 1
    if slices == 1:
        return Found(name, hosts[0], _TPU_PORT, len(hosts), index, tuple(hosts))
    host, _, _ = said.get("MEGASCALE_COORDINATOR_ADDRESS", "").partition(":")
    index += len(hosts) * _number(said, "MEGASCALE_SLICE_ID")
    return Found(name, host or None, _TPU_PORT, len(hosts) * slices, index)


def _metadata(environ: Mapping[str, str], key: str) -> str:
    """An attribute of this machine; "" where it has none."""
    server = environ.get("GCE_METADATA_HOST") or "metadata.google.internal"
    url = f"http://{server}/computeMetadata/v1/instance/attributes/{key}"
    direct = urllib.request.ProxyHandler({})  # a proxy would ask its own machine's server
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.build_opener(direct).open(request, timeout=_METADATA_SECONDS) as answer:
            return answer.read().decode().strip()
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return ""
        reason: Exception = error
    except OSError as error:
        reason = error
    raise UserError(
        f"the metadata server {server}, which knows the other machines of this TPU, does not tell {key}: {reason}; "
        f"set {ADDRESS}, {COUNT} and {INDEX} in each process, or TPU_SKIP_MDS_QUERY=1 for a run of this machine alone"
    )


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(f"{ADDRESS} is {text!r}; give host:port of process 0, such as 10.0.0.1:8476")
    return host.strip("[]"), int(port)


def _number(said: Mapping[str, str], name: str) -> int:
    text = said.get(name, "")
    if not text.isdecimal():
        raise UserError(f"{name} is {text!r} in the environment; it must be a whole number")
    return int(text)
