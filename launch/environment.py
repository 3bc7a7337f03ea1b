"""Settings of the process that JAX and its libraries read once, when they start.

Nothing here overrides what is set already. A new process is not needed: XLA reads NPROC when its CPU client is made,
which is at the first look at the devices, and SciPy's OpenBLAS, which XLA calls for LAPACK, is loaded at the first such
call. JAX itself reads JAX_PLATFORMS when it is imported, so `before_jax` must come first of all.
"""

import glob
import os

from ..framework.errors import UserError

_DEVICE_FILES = ("/dev/accel*", "/dev/vfio/[0-9]*", "/dev/nvidia[0-9]*", "/dev/kfd")  # TPU, newer TPU, NVIDIA, AMD
_TPU_VARIABLES = ("TPU_NAME", "TPU_WORKER_ID", "TPU_ACCELERATOR_TYPE")


def before_jax() -> None:
    """What must be set before JAX, NumPy or TensorFlow is imported."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # TensorFlow, which writes TensorBoard's events, is talkative
    # XLA calls LAPACK from many threads at once; OpenBLAS's own threads would only spin against each other.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    if not has_accelerator():
        # Otherwise any plugin installed for an accelerator searches for one first, and complains at length.
        os.environ.setdefault("JAX_PLATFORMS", "cpu")


def without_accelerator() -> None:
    """Leave accelerators to others, whatever is set; before JAX looks at its devices."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax

    jax.config.update("jax_platforms", "cpu")  # for a process that has imported JAX already


def has_accelerator() -> bool:
    """Whether this machine seems to have a TPU or GPU, decided without starting JAX."""
    return any(name in os.environ for name in _TPU_VARIABLES) or any(map(glob.glob, _DEVICE_FILES))


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
