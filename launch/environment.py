"""Set the environment that JAX and its libraries read once, when they start. Settings of the user stay.

JAX reads JAX_PLATFORMS when it is imported, so the packages of the command line and of the benchmarks call `before_jax`
when they are imported.
"""

import glob
import os

from ..framework.base import cpu_backend

_ACCELERATORS = ("/dev/accel*", "/dev/vfio/[0-9]*", "/dev/nvidia[0-9]*", "/dev/kfd")  # TPUs, NVIDIA's and AMD's GPUs
_TPU_VARIABLES = {"TPU_NAME", "TPU_WORKER_ID", "TPU_ACCELERATOR_TYPE"}


def before_jax() -> None:
    """Set the variables that must be set before JAX or NumPy is imported."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # of XLA's own log, despite the name
    # XLA calls LAPACK from many threads at once; OpenBLAS's own threads would spin against each other.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    cpu_backend.avoid_wrong_fusions()
    if not any(map(glob.glob, _ACCELERATORS)) and _TPU_VARIABLES.isdisjoint(os.environ):
        # Otherwise an installed plugin for an accelerator searches for one and prints a long complaint.
        os.environ.setdefault("JAX_PLATFORMS", "cpu")


def without_accelerator() -> None:
    """Make this process use the CPU, whatever is set. Call it before JAX looks at its devices."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax

    jax.config.update("jax_platforms", "cpu")  # for a process that has imported JAX already


def simulate_devices(count: int) -> None:
    """Show the CPU as `count` devices (0: as it is), unless JAX_NUM_CPU_DEVICES is set. JAX must not have started."""
    given = os.environ.get("JAX_NUM_CPU_DEVICES")
    count = int(given or count)
    if count > 1:
        os.environ.setdefault("NPROC", _threads(count))
    if count > 1 and not given:
        import jax

        jax.config.update("jax_num_cpu_devices", count)


def simulating(count: int) -> dict[str, str]:
    """Return the variables for another process that shall see `count` simulated devices and no others."""
    return {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(count),
        "NPROC": os.environ.get("NPROC") or _threads(count),
    }


def _threads(devices: int) -> str:
    # XLA's thread pool has NPROC threads, by default one per core. Steps in flight on several simulated devices wait
    # for each other in it, and deadlock with fewer than two threads per device.
    return str(max(32, 2 * devices, os.cpu_count() or 1))
