"""Settings of the process that JAX and its libraries read once, when they start.

Nothing here overrides what is set already. A new process is not needed: XLA reads NPROC when its CPU client is made,
which is at the first look at the devices, and SciPy's OpenBLAS, which XLA calls for LAPACK, is loaded at the first such
call. JAX itself reads JAX_PLATFORMS when it is imported, so `before_jax` must come first: the packages of the command
line and of the benchmarks call it when they are imported.
"""

import glob
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ..framework.base import cpu_backend
from ..framework.base.errors import UserError

_TPU_VARIABLES = ("TPU_NAME", "TPU_WORKER_ID", "TPU_ACCELERATOR_TYPE")
_GOOGLE = "0x1ae0"  # as a vendor of PCI devices


def _is_tpu() -> bool:
    # Newer TPUs are given to programs by vfio, as other devices are, too.
    vendors = map(Path, glob.glob("/sys/bus/pci/devices/*/vendor")) if glob.glob("/dev/vfio/[0-9]*") else ()
    return any(name in os.environ for name in _TPU_VARIABLES) or bool(
        glob.glob("/dev/accel*") or any(vendor.read_text().strip() == _GOOGLE for vendor in vendors)
    )


class _Accelerator(NamedTuple):
    """A kind of accelerator.

    Attributes:
      name: for people.
      is_here: whether this machine has one, decided without starting JAX.
      modules: with any of these installed, JAX can use it.
      fix: what to install.
    """

    name: str
    is_here: Callable[[], bool]
    modules: tuple[str, ...]
    fix: str


_ACCELERATORS = (
    _Accelerator("a TPU", _is_tpu, ("libtpu",), "make install EXTRA=tpu"),
    _Accelerator(
        "an NVIDIA GPU",
        lambda: bool(glob.glob("/dev/nvidia[0-9]*")),
        ("jax_cuda12_plugin", "jax_cuda13_plugin"),
        "make install EXTRA=cuda13 (driver 580 or newer) or EXTRA=cuda12",
    ),
)
_AMD_GPU = "/dev/kfd"  # its plugin for JAX goes by many names


def before_jax() -> None:
    """Set what must be set before JAX or NumPy is imported."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # the level of XLA's own log, named after where it comes from
    # XLA calls LAPACK from many threads at once; OpenBLAS's own threads would only spin against each other.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    cpu_backend.avoid_wrong_fusions()
    if not has_accelerator():
        # Otherwise any plugin installed for an accelerator searches for one first, and complains at length.
        os.environ.setdefault("JAX_PLATFORMS", "cpu")


def check_accelerator() -> None:
    """Refuse to train on the CPU of a machine that has an accelerator which the installed JAX cannot use.

    Raises:
      UserError: JAX lacks the support, and JAX_PLATFORMS does not say what to train on.
    """
    if os.environ.get("JAX_PLATFORMS"):
        return
    for accelerator in _ACCELERATORS:
        if accelerator.is_here() and not any(map(importlib.util.find_spec, accelerator.modules)):
            raise UserError(
                f"this machine has {accelerator.name} and JAX is installed without support for it; "
                f"{accelerator.fix}, or set JAX_PLATFORMS=cpu to train on the CPU"
            )


def without_accelerator() -> None:
    """Leave accelerators to others, whatever is set; before JAX looks at its devices."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax

    jax.config.update("jax_platforms", "cpu")  # for a process that has imported JAX already


def has_accelerator() -> bool:
    """Whether this machine seems to have a TPU or GPU, decided without starting JAX."""
    return os.path.exists(_AMD_GPU) or any(accelerator.is_here() for accelerator in _ACCELERATORS)


def simulate_devices(count: int) -> None:
    """Let the CPU appear as `count` devices (0: as it is) unless JAX_NUM_CPU_DEVICES says how many.

    Raises:
      UserError: JAX has already started with another number.
    """
    if "JAX_NUM_CPU_DEVICES" in os.environ:
        count = int(os.environ["JAX_NUM_CPU_DEVICES"])
    if count < 2:
        return
    os.environ.setdefault("NPROC", _threads(count))
    if "JAX_NUM_CPU_DEVICES" not in os.environ:
        import jax

        try:
            jax.config.update("jax_num_cpu_devices", count)
        except RuntimeError as error:
            raise UserError(
                f"config.simulated_devices={count} comes too late: JAX has looked at its devices already; "
                f"set JAX_NUM_CPU_DEVICES={count} in the environment"
            ) from error


def simulating(count: int) -> dict[str, str]:
    """The variables of another process that is to see `count` simulated devices, and no others."""
    return {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(count),
        "NPROC": os.environ.get("NPROC") or _threads(count),
    }


def _threads(devices: int) -> str:
    # XLA's thread pool has NPROC threads, by default one per core. Steps in flight on several simulated devices wait
    # for each other in it, and with fewer than two threads per device they wait for ever.
    return str(max(32, 2 * devices, os.cpu_count() or 1))
