"""Eight simulated CPU devices for every test, and compiled programs kept between runs; set before JAX starts."""

import gc
import importlib.metadata
import os
import re
from pathlib import Path

import pytest

from shampax.framework.base import cpu_backend

# Deleted by `make test COLD=1`.
PROGRAMS = Path(__file__).parents[1] / ".pytest_cache" / "programs"
PROGRAMS_BYTES = 2_000_000_000
# Of the 65,530 memory maps that Linux gives a process by default. A compiled program takes some while it lives, and
# when there are no more, XLA aborts.
MANY_MAPS = 20_000

# Programs of tests run for milliseconds and compile for seconds.
QUICK = ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
if importlib.metadata.version("jaxlib").startswith("0.10."):
    QUICK.append("--xla_cpu_use_fusion_emitters=false")  # the emitters before compile in half the time

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
os.environ.setdefault("NPROC", "32")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("XLA_FLAGS", " ".join(QUICK))
# Of the processes that tests start, too.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(PROGRAMS))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
cpu_backend.avoid_wrong_fusions()


def pytest_configure(config):
    """Bound what is kept, once for all workers."""
    if not hasattr(config, "workerinput"):
        from shampax.framework.step import compilation_cache

        compilation_cache.prune(PROGRAMS, PROGRAMS_BYTES)


def pytest_warning_recorded(warning_message):
    """Delete a program that a killed process has written in part: JAX would warn of it in every run."""
    unreadable = re.match(r"Error reading persistent compilation cache entry for '(.+?)'", str(warning_message.message))
    for path in PROGRAMS.glob(f"{unreadable[1]}-*") if unreadable else ():
        path.unlink(missing_ok=True)


@pytest.fixture(autouse=True, scope="module")
def let_go_of_programs():
    """Forget compiled programs after a module, once there are many."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MANY_MAPS:
        import jax

        jax.clear_caches()
        gc.collect()
