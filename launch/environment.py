"""Set the environment that JAX and its libraries read once, when they start. Settings of the user stay.

JAX reads JAX_PLATFORMS when it is imported, so the packages of the command line and of the benchmarks call `before_jax`
when they are imported.
"""

import glob
import importlib.util
import os
from pathlib import Path

from ..framework.base import cpu_backend
from ..framework.base.errors import UserError

_TPU_VARIABLES = ("TPU_NAME", "TPU_WORKER_ID", "TPU_ACCELERATOR_TYPE")
_GOOGLE = "0x1ae0"  # vendor of PCI devices
_AMD_GPU = "/dev/kfd"  # its plugin for JAX has many names


def _has_tpu() -> bool:
    if any(name in os.environ for name in _TPU_VARIABLES) or glob.glob("/dev/accel*"):
        return True
    # Newer TPUs are vfio devices, as other devices are too.
    vendors = glob.glob("/sys/bus/pci/devices/*/vendor") if glob.glob("/dev/vfio/[0-9]*") else ()
    return any(Path(vendor).read_text().strip() == _GOOGLE for vendor in vendors)


# name in messages -> (whether this machine has one, modules of which JAX needs one to use it, command to install one)
_ACCELERATORS = {
    "a TPU": (_has_tpu, ("libtpu",), "make install EXTRA=tpu"),
    "an NVIDIA GPU": (
        lambda: bool(glob.glob("/dev/nvidia[0-9]*")),
        ("jax_cuda12_plugin", "jax_cuda13_plugin"),
        "make install EXTRA=cuda13 (driver 580 or newer) or EXTRA=cuda12",
    ),
}


def before_jax() -> None:
    """Set the variables that must be set before JAX or NumPy is imported."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # of XLA's own log, despite the name
    # XLA calls LAPACK from many threads at once; OpenBLAS's own threads would spin against each other.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    cpu_backend.avoid_wrong_fusions()
    if not (os.path.exists(_AMD_GPU) or any(is_here() for is_here, _, _ in _ACCELERATORS.values())):
        # Otherwise an installed plugin for an accelerator searches for one and prints a long complaint.
        os.environ.setdefault("JAX_PLATFORMS", "cpu")


def check_accelerator() -> None:
    """Refuse to train on the CPU if this machine has an accelerator that the installed JAX cannot use.

    Raises:
      UserError: JAX lacks the support, and JAX_PLATFORMS is not set.
    """
    if os.environ.get("JAX_PLATFORMS"):
        return
    for name, (is_here, modules, fix) in _ACCELERATORS.items():
        if is_here() and not any(map(importlib.util.find_spec, modules)):
            raise UserError(
                f"this machine has {name}, but JAX is installed without support for it. Run {fix}, or set "
                "JAX_PLATFORMS=cpu to train on the CPU."
            )


def without_accelerator() -> None:
    """Make this process use the CPU, whatever is set. Call it before JAX looks at its devices."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax

    jax.config.update("jax_platforms", "cpu")  # for a process that has imported JAX already


def simulate_devices(count: int) -> None:
    """Show the CPU as `count` devices (0: as it is), unless JAX_NUM_CPU_DEVICES is set.

    Raises:
      UserError: JAX has already started with another number.
    """
    given = os.environ.get("JAX_NUM_CPU_DEVICES")
    count = int(given or count)
    if count > 1:
        os.environ.setdefault("NPROC", _threads(count))
    if given or count < 2:
        return
    import jax

    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:
        raise UserError(
            f"config.simulated_devices={count}: too late, JAX has already looked at its devices. Set "
            f"JAX_NUM_CPU_DEVICES={count} in the environment."
        ) from None


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
