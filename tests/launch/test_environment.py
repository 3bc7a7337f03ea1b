"""Test the environment that entry points set before JAX starts, and the faults it prevents."""

import os
import pkgutil
import subprocess
import sys
import textwrap

import pytest

import shampax.benchmarks
import shampax.launch
from shampax.launch import environment

SETTINGS = (
    "JAX_PLATFORMS",
    "JAX_NUM_CPU_DEVICES",
    "NPROC",
    "OPENBLAS_NUM_THREADS",
    "TF_CPP_MIN_LOG_LEVEL",
    "XLA_FLAGS",
)
# 0 in jaxlib 0.10.2 and 0.12.0.1 (jax#39103); correct is 108: the last row is (0, 1, 2), and (2 (0 + 1 + 2))^2 is 36.
WRONG_FUSION = """
def f(x):
    matrix = jnp.full((3, 3), 2.0)
    return jnp.sum(jax.vmap(lambda v: matrix @ v)(x) ** 2, axis=1)
x = jnp.arange(32769 * 3, dtype=jnp.float32).reshape(32769, 3) % 1024
print(float(jax.jit(f)(x)[-1]))
"""


def run(program, **variables):
    """Run a Python program with only `variables` set by the user; return its standard output."""
    bare = {name: value for name, value in os.environ.items() if name not in SETTINGS} | variables
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, env=bare, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def entry_points():
    packages = (shampax.launch, shampax.benchmarks)
    return [f"{package.__name__}.{it.name}" for package in packages for it in pkgutil.iter_modules(package.__path__)]


def test_no_entry_point_imports_jax_before_its_environment_is_set():
    """Fault: libtpu complains at length before the first line, or OpenBLAS spins, or XLA computes wrong numbers.

    Each entry point is imported in its own fork until it imports JAX or NumPy.
    """
    program = f"""
        import importlib, os, sys
        class Watch:
            def find_spec(self, name, path=None, target=None):
                if name in ("jax", "jaxlib", "numpy", "scipy"):
                    missing = [s for s in ("JAX_PLATFORMS", "OPENBLAS_NUM_THREADS", "XLA_FLAGS") if s not in os.environ]
                    print(name, missing, file=sys.stderr)
                    os._exit(len(missing))
        sys.meta_path.insert(0, Watch())
        for name in {entry_points()}:
            sys.stdout.flush()
            if os.fork() == 0:
                importlib.import_module(name)
                os._exit(0)
            print(name, os.wait()[1])
    """
    done = [line.split() for line in run(program).splitlines()]
    assert [name for name, _ in done] == entry_points()
    assert [name for name, code in done if code != "0"] == []


def test_a_wrong_fusion_of_xla_is_right_after_importing_the_command_line():
    program = "import shampax.launch.train\nimport jax, jax.numpy as jnp\n" + WRONG_FUSION
    assert float(run(program)) == 108.0


def test_a_wrong_fusion_of_xla_is_right_in_a_script_that_calls_train(tmp_path):
    """Fault: training without the command line uses wrong numbers. The config does not matter here."""
    program = f"""
        import jax, jax.numpy as jnp
        from shampax.configs import base
        from shampax.framework.base.errors import UserError
        from shampax.framework.train import train
        try:
            train(base.get_config(), {str(tmp_path / "work")!r})
        except UserError:
            pass
    """
    assert float(run(textwrap.dedent(program) + WRONG_FUSION)) == 108.0


def test_flags_of_the_user_are_kept(monkeypatch):
    for given, expected in (
        (
            "--xla_cpu_enable_fast_math=false",
            "--xla_cpu_enable_fast_math=false --xla_cpu_experimental_ynn_fusion_type=",
        ),
        ("--xla_cpu_experimental_ynn_fusion_type=dot", "--xla_cpu_experimental_ynn_fusion_type=dot"),
    ):
        monkeypatch.setenv("XLA_FLAGS", given)
        environment.before_jax()
        environment.before_jax()
        assert os.environ["XLA_FLAGS"] == expected


def test_a_jaxlib_without_the_flag_does_not_get_it(monkeypatch):
    """Fault: XLA aborts on an unknown flag."""
    monkeypatch.setenv("XLA_FLAGS", "")
    for release, flagged in (("0.9.2", False), ("0.10.2", True), ("0.12.0.1", True), ("0.13.0", False)):
        monkeypatch.setattr("importlib.metadata.version", lambda name, release=release: release)
        monkeypatch.setenv("XLA_FLAGS", "")
        environment.before_jax()
        assert bool(os.environ["XLA_FLAGS"]) == flagged, release


@pytest.mark.parametrize("files", ["/dev/accel*", "/dev/vfio/[0-9]*", "/dev/nvidia[0-9]*", "/dev/kfd"])
def test_a_machine_with_an_accelerator_does_not_become_a_cpu(files, monkeypatch):
    """Fault: a job that pays for an accelerator trains on the CPU for days."""
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr("glob.glob", lambda pattern: [pattern] if pattern == files else [])
    environment.before_jax()
    assert "JAX_PLATFORMS" not in os.environ


def test_simulated_devices_do_not_deadlock_with_unawaited_steps():
    """Do what `main` does before the trainer, in a separate process. A small thread pool would hang here."""
    program = """
        from shampax.launch import environment
        environment.before_jax()
        import jax, jax.numpy as jnp
        environment.simulate_devices(8)
        mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
        x = jax.device_put(jnp.ones((8, 8)), jax.NamedSharding(mesh, jax.P("d")))
        step = jax.jit(lambda x: x - x.mean(0, keepdims=True) / 1000)
        for _ in range(300):
            x = step(x)
        print(jax.device_count(), jax.block_until_ready(x).shape)
    """
    assert run(program).split(maxsplit=1) == ["8", "(8, 8)\n"]


def test_settings_of_the_user_are_kept(monkeypatch):
    chosen = {"JAX_PLATFORMS": "tpu", "OPENBLAS_NUM_THREADS": "5", "NPROC": "9", "JAX_NUM_CPU_DEVICES": "2"}
    for name, value in chosen.items():
        monkeypatch.setenv(name, value)
    environment.before_jax()
    environment.simulate_devices(4)
    assert {name: os.environ[name] for name in chosen} == chosen
