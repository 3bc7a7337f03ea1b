"""Test environments as documented by each cluster."""

import pytest

from shampax.framework.base.errors import UserError
from shampax.framework.distributed import cluster

SLURM = {
    "SLURM_JOB_ID": "4100",
    "SLURM_STEP_NODELIST": "tux[07-08]",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}
MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}
GKE = {"TPU_WORKER_HOSTNAMES": "t-0.job,t-1.job", "TPU_WORKER_ID": "1"}
EXPLICIT = {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:84", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        (dict.fromkeys(EXPLICIT, ""), None),
        (EXPLICIT | {"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}, ("10.0.0.1", 84, 1, 0)),
        ({"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}, None),
        (EXPLICIT, ("10.0.0.1", 84, 4, 3)),
        (EXPLICIT | SLURM, ("10.0.0.1", 84, 4, 3)),
        (EXPLICIT | {"JAX_COORDINATOR_ADDRESS": "[fe80::1]:84"}, ("fe80::1", 84, 4, 3)),
        (EXPLICIT | {"JAX_COORDINATOR_ADDRESS": "[fe80::1%eth0]:84"}, ("fe80::1%eth0", 84, 4, 3)),
        (EXPLICIT | {"JAX_COORDINATOR_ADDRESS": "lm-0.lm:84"}, ("lm-0.lm", 84, 4, 3)),
        (SLURM, ("tux07", 61444, 2, 1)),
        (SLURM | {"JAX_COORDINATOR_PORT": "85"}, ("tux07", 85, 2, 1)),
        (SLURM | {"JAX_NUM_PROCESSES": "1"}, None),
        (SLURM | {"SLURM_JOB_ID": str(2**32 - 1)}, ("tux07", 65535, 2, 1)),  # of a federation
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),
        ({name: SLURM[name] for name in ("SLURM_JOB_ID", "SLURM_PROCID", "SLURM_LOCALID")}, None),  # a batch script
        (
            SLURM | MPI | {"JAX_COORDINATOR_ADDRESS": "n1:84", "CUDA_VISIBLE_DEVICES": "7"},
            ("n1", 84, 4, 3, (2, 1), None, 1),
        ),
        (GKE, ("t-0.job", 8482, 2, 1)),
        (GKE | {"TPU_WORKER_HOSTNAMES": "fd00::9,fd00::a"}, ("fd00::9", 8482, 2, 1)),
        (GKE | {"TPU_WORKER_HOSTNAMES": "t-0:8471,t-1:8471"}, ("t-0", 8482, 2, 1)),
        (GKE | {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, None),
        (
            GKE
            | {
                "MEGASCALE_NUM_SLICES": "3",
                "MEGASCALE_SLICE_ID": "2",
                "MEGASCALE_COORDINATOR_ADDRESS": "lm-slice-0-0.lm:8080",
            },
            ("lm-slice-0-0.lm", 8482, 6, 5),
        ),
    ],
)
def test_process_index_and_count_from_the_environment(environ, expected):
    """Faults: a process takes the index of another, or trains alone."""
    assert cluster.place(environ) == (expected and cluster.Place(*expected))


SHARED = SLURM | {"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "2", "SLURM_LOCALID": "1"}
ALL_FOUR = {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}


@pytest.mark.parametrize(
    ("environ", "devices"),
    [
        (SHARED, None),  # no GPU
        (SHARED | ALL_FOUR, (2, 3)),
        (SHARED | {"SLURM_GPUS_ON_NODE": "4"}, (2, 3)),
        (SHARED | {"SLURM_GPUS_ON_NODE": "2", "CUDA_VISIBLE_DEVICES": "0,1"}, (1,)),
        (SHARED | {"SLURM_GPUS_ON_NODE": "4", "CUDA_VISIBLE_DEVICES": "0,1"}, None),  # bound by --gpus-per-task=2
        (SHARED | {"SLURM_GPUS_ON_NODE": "2", "ROCR_VISIBLE_DEVICES": "1"}, None),  # one bound to each process
        (SHARED | {"CUDA_VISIBLE_DEVICES": "1"}, None),
        (SHARED | {"SLURM_GPUS_ON_NODE": "4", "CUDA_VISIBLE_DEVICES": ""}, None),  # hidden by the user
        (SHARED | ALL_FOUR | {"JAX_LOCAL_DEVICE_IDS": "3,0"}, (3, 0)),
        (SHARED | {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}, (4, 5, 6, 7)),
        (EXPLICIT | {"JAX_LOCAL_DEVICE_IDS": "0,1"}, (0, 1)),
        (SLURM | ALL_FOUR, None),  # one node each
        (MPI | ALL_FOUR | {"JAX_COORDINATOR_ADDRESS": "n1:84"}, (2, 3)),
    ],
)
def test_processes_that_share_a_machine_divide_its_devices(environ, devices):
    """Faults: each takes all devices, or one of several, or a share of its share."""
    assert cluster.place(environ).local_devices == devices


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        (
            EXPLICIT | {"JAX_PROCESS_ID": ""},
            "and JAX_NUM_PROCESSES set for a run of several processes, but JAX_PROCESS_ID cannot",
        ),
        ({"JAX_NUM_PROCESSES": "4"}, "but JAX_COORDINATOR_ADDRESS and JAX_PROCESS_ID cannot be detected"),
        *(
            (
                EXPLICIT | {"JAX_COORDINATOR_ADDRESS": wrong},
                "must be host:port of process 0, e.g. 10.0.0.1:8476 or [fe80",
            )
            for wrong in (
                *(
                    "10.0.0.1",
                    "::1:84",
                    "fe80::1",
                    "[fe80::1]",
                    "[fe80::1:84",
                    "fe80::1]:84",
                    "[n1]:84",
                    "[]:84",
                    "a:b:84",
                ),
                *(
                    "http://n1:84",
                    "n1:84/x",
                    "u@n1:84",
                    "n1:0",
                    "n1:65536",
                    "n1:8 4",
                    "n1:-1",
                    "n1:\u0664",
                    " n1:84",
                    ":84",
                ),
            )
        ),
        (EXPLICIT | {"JAX_NUM_PROCESSES": "9" * 5_000}, "must be a whole number from 1 to 4294967295"),
        (EXPLICIT | {"JAX_NUM_PROCESSES": "0"}, "must be a whole number from 1 to"),
        (EXPLICIT | {"JAX_LOCAL_DEVICE_IDS": "0,"}, "JAX_LOCAL_DEVICE_IDS='0,': must be numbers of GPUs. Write e.g."),
        (
            GKE | {"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "0"},
            "but JAX_COORDINATOR_ADDRESS cannot be detected",
        ),
        (
            EXPLICIT | {"JAX_PROCESS_ID": "4"},
            "JAX_PROCESS_ID=4 and JAX_NUM_PROCESSES=4: the index must be below",
        ),
        (EXPLICIT | {"JAX_PROCESS_ID": "-1"}, "JAX_PROCESS_ID='-1' in the environment: must be a whole number"),
        ({"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "1"}, "JAX_PROCESS_ID=1 and JAX_NUM_PROCESSES=1"),
        (
            SLURM | {"JAX_COORDINATOR_PORT": "70000"},
            "JAX_COORDINATOR_PORT='70000' in the environment: must be a whole number from 1 to 65535",
        ),
        (SLURM | {"SLURM_STEP_NODELIST": "a[1"}, "SLURM_STEP_NODELIST='a[1': cannot parse it"),
        (
            MPI,
            "the cluster's variables set for a run of several processes, but JAX_COORDINATOR_ADDRESS cannot",
        ),
        (SHARED | {"CUDA_VISIBLE_DEVICES": "0,1,2"}, "2 processes share 3 GPUs, which does not divide evenly"),
    ],
)
def test_invalid_environments_are_one_line_with_the_fix(environ, message):
    with pytest.raises(UserError) as refused:
        cluster.place(environ)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("hostlist", "hosts"),
    [
        ("n1", "n1"),
        ("n1,m2", "n1 m2"),
        ("n[1,3-4]x,gpu-a", "n1x n3x n4x gpu-a"),
        ("r[1-2]n[09-10]", "r1n09 r1n10 r2n09 r2n10"),
        ("n[001-002,9].cluster", "n001.cluster n002.cluster n9.cluster"),
    ],
)
def test_the_first_of_a_list_of_hosts(hostlist, hosts):
    assert cluster.first_host(hostlist) == hosts.split()[0]


@pytest.mark.parametrize("wrong", ["", "n[", "n[-1]x", "n[a]", ",n2", "a" * 5_000 + "["])
def test_invalid_lists_of_hosts(wrong):
    """Fault: the pattern needs exponential time for long names."""
    with pytest.raises(UserError, match="cannot parse it"):
        cluster.first_host(wrong)
