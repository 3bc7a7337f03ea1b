"""The options of XLA: which of default, environment and config wins, and what is refused."""

import types

import jax
import pytest
from jax.experimental import topologies

from shampax.configs import base
from shampax.framework.base.errors import UserError
from shampax.framework.config import overrides
from shampax.framework.step import compiler_options

DEVICES = {
    "cpu": types.SimpleNamespace(platform="cpu", device_kind="cpu"),
    "gpu": types.SimpleNamespace(platform="gpu", device_kind="NVIDIA H100 80GB HBM3"),
    "v5e": types.SimpleNamespace(platform="tpu", device_kind="TPU v5 lite"),
    "v5p": types.SimpleNamespace(platform="tpu", device_kind="TPU v5"),
}


@pytest.fixture(autouse=True)
def no_flags(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.delenv("LIBTPU_INIT_ARGS", raising=False)


def test_the_environment_wins_over_defaults_and_the_config_over_both(monkeypatch):
    level = "xla_backend_optimization_level"
    assert compiler_options.choose((), DEVICES["cpu"])[level] == "1"
    monkeypatch.setenv("XLA_FLAGS", f"--other=1 --{level}=0")
    assert level not in compiler_options.choose((), DEVICES["cpu"])
    assert compiler_options.choose((f"{level}=2",), DEVICES["cpu"])[level] == "2"
    assert compiler_options.choose((f"--{level}=2",), DEVICES["cpu"])[level] == "2"
    async_gathers = "xla_enable_async_all_gather"
    monkeypatch.setenv("LIBTPU_INIT_ARGS", f"--{async_gathers}=false")
    assert async_gathers not in compiler_options.choose((), DEVICES["v5e"])


def test_the_command_line_takes_options_without_quotes():
    """Fault: the example of docs/clusters.md is refused."""
    config = base.get_config()
    overrides.apply(config, ["compiler_options=xla_tpu_scoped_vmem_limit_kib=65536,xla_enable_async_all_gather=False"])
    options = compiler_options.choose(config.compiler_options, DEVICES["v5e"])
    assert options["xla_tpu_scoped_vmem_limit_kib"] == "65536" and options["xla_enable_async_all_gather"] == "False"


def test_large_vmem_is_used_where_a_chip_has_it():
    limit = "xla_tpu_scoped_vmem_limit_kib"
    assert limit in compiler_options.choose((), DEVICES["v5e"])
    assert limit not in compiler_options.choose((), DEVICES["v5p"])


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_xla_knows_the_defaults(platform):
    """The flags of GPUs have the same names in a jaxlib without GPUs."""
    options = compiler_options.choose((), DEVICES[platform])
    assert options
    compiler_options.compile_with(jax.jit(lambda: 0).lower(), options)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("xla_foo=1", "config.compiler_options: XLA has no option xla_foo on this platform."),
        ("xla_foo", "config.compiler_options: 'xla_foo' is not of the form name=value."),
        ("=1", "config.compiler_options: '=1' is not of the form name=value."),
        ("xla_backend_optimization_level=x", "config.compiler_options: .*level, 'x' is not a valid int32 value."),
    ],
)
def test_what_xla_does_not_know_is_refused(given, message):
    with pytest.raises(UserError, match=message):
        compiler_options.compile_with(jax.jit(lambda: 0).lower(), compiler_options.choose((given,), DEVICES["cpu"]))


@pytest.mark.slow
def test_libtpu_knows_the_defaults(monkeypatch):
    pytest.importorskip("libtpu", reason="needs the compiler in libtpu, which is for Linux on x86-64")
    settings = {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-16",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    [chip, *_] = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    options = compiler_options.choose((), chip)
    assert "xla_tpu_scoped_vmem_limit_kib" in options
    here = jax.sharding.SingleDeviceSharding(chip)
    compiler_options.compile_with(jax.jit(lambda x: x + 1, in_shardings=here, out_shardings=here).lower(1.0), options)
