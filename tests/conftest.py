"""Give every test eight simulated CPU devices, and keep compiled programs between runs."""

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
# Linux gives a process 65,530 memory maps by default. Every live compiled program needs some, and XLA aborts when none
# is left.
MANY_MAPS = 20_000

# Programs of tests compile for seconds and run for milliseconds.
QUICK = ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
if importlib.metadata.version("jaxlib").startswith("0.10."):
    QUICK.append("--xla_cpu_use_fusion_emitters=false")  # the older code generators compile in half the time
    QUICK.append("--xla_cpu_parallel_codegen_split_count=1")  # cutting programs for more threads costs an eighth

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
os.environ.setdefault("NPROC", "32")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("XLA_FLAGS", " ".join(QUICK))
# Processes that tests start use it, too.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(PROGRAMS))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
cpu_backend.avoid_wrong_fusions()
gc.set_threshold(50_000, 20, 20)  # by default, looking for cycles takes a sixth of tracing and lowering


def pytest_configure(config):
    """Limit the size of the compiled programs, once for all workers."""
    if not hasattr(config, "workerinput"):
        from shampax.framework.step import compilation_cache

        compilation_cache.prune(PROGRAMS, PROGRAMS_BYTES)


def pytest_warning_recorded(warning_message):
    """Delete a program that a killed process wrote in part, so that JAX does not warn in every run."""
    unreadable = re.match(r"Error reading persistent compilation cache entry for '(.+?)'", str(warning_message.message))
    for path in PROGRAMS.glob(f"{unreadable[1]}-*") if unreadable else ():
        path.unlink(missing_ok=True)


@pytest.fixture(autouse=True, scope="module")
def let_go_of_programs():
    """Release compiled programs after a module if there are many."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MANY_MAPS:
        import jax

        jax.clear_caches()
        gc.collect()
