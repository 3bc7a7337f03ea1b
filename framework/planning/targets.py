"""Find the devices that a plan is for: TPU slices and GPUs that need not exist, or simulated ones."""

import importlib.util
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax._src.cudnn import fused_attention_stablehlo

from ..base.errors import UserError

MOST_DEVICES = 16_384  # 4,096 simulated devices take 15 seconds to make
_GPUS_OF_A_NODE = 8
_CUDNN = 90_800  # version 9.8.0
# What the compiler of CUDA asks of a device: the name that JAX shows, compute capability, multiprocessors, GB/s and
# bytes of memory, bytes of the L2 cache, shared bytes of a block and of a multiprocessor, and clock in GHz.
_GPUS = {
    "a100": ("NVIDIA A100-SXM4-80GB", 8, 108, 2_039, 85_899_345_920, 41_943_040, 166_912, 167_936, 1.41),
    "h100": ("NVIDIA H100 80GB HBM3", 9, 132, 3_352, 84_929_347_584, 52_428_800, 232_448, 233_472, 1.98),
    "h200": ("NVIDIA H200", 9, 132, 4_890, 150_109_880_320, 52_428_800, 232_448, 233_472, 1.98),
    "b200": ("NVIDIA B200", 10, 148, 7_672, 191_000_000_000, 132_120_576, 232_448, 233_472, 1.97),
}


def missing(topology: str, gpu: str) -> str:
    """Return why no compiler for the devices is installed, with the command that installs it; "" if there is one."""
    if topology and importlib.util.find_spec("libtpu") is None:
        return f"--topology={topology}: no libtpu, so nothing is compiled. Install it with make install EXTRA=plan."
    plugins = ("jax_cuda12_plugin", "jax_cuda13_plugin")
    if gpu and not any(importlib.util.find_spec(name) for name in plugins):
        return f"--gpu={gpu}: no CUDA compiler, so nothing is compiled. Install it with make install EXTRA=plan-gpu."
    return ""


def compile_fast() -> None:
    """Let the compiler try less. It fuses as usual, but overlaps no collective and may use more memory."""
    jax.config.update("jax_exec_time_optimization_effort", -1.0)
    jax.config.update("jax_memory_fitting_effort", -1.0)


def present() -> Sequence[Any]:
    """Return the devices of this machine."""
    # A program of the cache may have the names of another version.
    jax.config.update("jax_enable_compilation_cache", False)
    return jax.devices()


def counted(topology: str, gpu: str) -> int:
    """Return the number of devices that a name of a topology or of GPUs stands for."""
    if gpu:
        return _parsed_gpu(gpu)[0]
    slices, _, shape = _parsed_topology(topology)
    return slices * math.prod(int(n) for n in shape.split("x"))


def simulated(count: int) -> Sequence[Any]:
    """Return CPU devices that stand for those of the plan.

    Raises:
      UserError: it is not a number of devices that can be simulated.
    """
    if not 1 <= count <= MOST_DEVICES:
        raise UserError(f"--devices or config.mesh: {count} devices: must be at least 1 and at most {MOST_DEVICES}.")
    jax.config.update("jax_num_cpu_devices", count)  # overrides the environment
    return jax.devices()


def tpus(name: str) -> Sequence[Any]:
    """Return the devices of one or several TPU slices, such as "v5e:4x4" or "2xv5e:16x16".

    Raises:
      UserError: libtpu knows no such slice.
    """
    # libtpu must not query a cloud's metadata server, and several processes may compile at once.
    for variable, value in (
        ("TPU_SKIP_MDS_QUERY", "1"),
        ("TPU_ACCELERATOR_TYPE", "v5litepod-16"),
        ("TPU_WORKER_HOSTNAMES", "localhost"),
        ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),
    ):
        os.environ.setdefault(variable, value)
    slices, generation, shape = _parsed_topology(name)
    several = {"num_slices": slices} if slices > 1 else {}
    return _described(f"--topology={name}: no such TPU slice", "tpu", f"{generation}:{shape}", **several)


def gpus(name: str) -> Sequence[Any]:
    """Return absent GPUs, such as "8xh100", in nodes of at most 8.

    Raises:
      UserError: the name is invalid, or the compiler does not know such GPUs.
    """
    count, kind = _parsed_gpu(name)
    shown, capability, cores, bandwidth, memory, cache, block, multiprocessor, clock = _GPUS[kind]
    nodes, of_a_node = -(-count // _GPUS_OF_A_NODE), min(count, _GPUS_OF_A_NODE)
    # The fields are those of XLA's GpuTargetConfigProto. Without a GPU nothing can be tuned by measurement.
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0"
    target = f"""
        gpu_device_info {{
          threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
          block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
          shared_memory_per_block: 49152 shared_memory_per_block_optin: {block}
          shared_memory_per_core: {multiprocessor} registers_per_core_limit: 65536 registers_per_block_limit: 65536
          core_count: {cores} fpus_per_core: 128 clock_rate_ghz: {clock} l2_cache_size: {cache}
          memory_bandwidth: {bandwidth}000000000 device_memory_size: {memory}
          cuda_compute_capability {{ major: {capability} }}
        }}
        platform_name: "CUDA" device_description_str: "{shown}"
        dnn_version_info {{ major: {_CUDNN // 10_000} minor: {_CUDNN // 100 % 100} }}
        runtime_version {{ major: 12 minor: 9 }}
    """
    # JAX asks the cuDNN that is installed for its version when it traces attention; here none need be installed.
    fused_attention_stablehlo.check_cudnn_version = lambda: _CUDNN
    topology = f"1x{nodes}x{of_a_node}"
    return _described(f"--gpu={name}: no such GPUs", "cuda", kind, target_config=target, topology=topology)


def _described(fault: str, platform: str, name: str, **options: Any) -> Sequence[Any]:
    from jax.experimental import topologies

    # JAX writes programs for absent devices to the cache, but cannot read them back.
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        return topologies.get_topology_desc(platform=platform, topology_name=name, **options).devices
    except Exception as error:  # the plugins raise many types
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{fault} ({type(error).__name__}: {reason}). Use a name like v5e:4x4, v5p:4x4x4, 2xv6e:16x16 or 8xh100."
        ) from error


def _parsed_topology(name: str) -> tuple[int, str, str]:
    found = re.fullmatch(r"(?:(\d+)x(?=[a-z]))?(\w+):(\d+(?:x\d+)*)", name)
    if not found:
        raise UserError(f"--topology={name}: no such TPU slice. Use a name like v5e:4x4, v5p:4x4x4 or 2xv6e:16x16.")
    return int(found[1] or 1), found[2], found[3]


def _parsed_gpu(name: str) -> tuple[int, str]:
    found = re.fullmatch(r"(\d+)x(\w+)", name)
    if not found or found[2] not in _GPUS or not 1 <= int(found[1]) <= MOST_DEVICES:
        raise UserError(f"--gpu={name}: no such GPUs. Use a number and one of {', '.join(_GPUS)}, for example 8xh100.")
    count = int(found[1])
    if count > _GPUS_OF_A_NODE and count % _GPUS_OF_A_NODE:
        raise UserError(f"--gpu={name}: more than {_GPUS_OF_A_NODE} must be whole nodes of {_GPUS_OF_A_NODE}.")
    return count, found[2]
