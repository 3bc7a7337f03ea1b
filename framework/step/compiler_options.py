"""Options of XLA for the functions of a run: the defaults of each platform, and those of the config."""

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from ..base.errors import UserError

# On a CPU, more optimization by LLVM takes longer than it saves, and changes no bit.
_CPU = {"xla_backend_optimization_level": "1"}
# What maxtext sets for dense models: collectives overlap with products.
_TPU = dict.fromkeys(
    (
        "xla_tpu_enable_async_collective_fusion",
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather",
        "xla_tpu_enable_async_collective_fusion_multiple_steps",
        "xla_tpu_overlap_compute_collective_tc",
        "xla_enable_async_all_gather",
        "xla_tpu_enable_data_parallel_all_reduce_opt",
        "xla_tpu_data_parallel_opt_different_sized_ops",
    ),
    "True",
)
# Chips with 128 MiB of VMEM.
_LARGE_VMEM = {"xla_tpu_scoped_vmem_limit_kib": "98304"}
# Collectives overlap with products, and those of a layer are joined.
_GPU = {
    "xla_gpu_enable_latency_hiding_scheduler": "True",
    "xla_gpu_all_reduce_combine_threshold_bytes": str(2**30),
    "xla_gpu_all_gather_combine_threshold_bytes": str(2**27),
    "xla_gpu_reduce_scatter_combine_threshold_bytes": str(2**26),
}
_UNKNOWN = re.compile(r"No such compile option: '(.*)'")


def choose(given: Sequence[str], device: Any) -> dict[str, str]:
    """Return the options for a device: name -> value.

    A default yields to the same flag in the environment variables XLA_FLAGS and LIBTPU_INIT_ARGS, and both to the
    config.

    Args:
      given: `config.compiler_options`, "name=value" each.
      device: one of the mesh; it may belong to a topology that is not attached.

    Raises:
      UserError: an option has no value.
    """
    environment = [os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")]
    flags = {each.removeprefix("--").partition("=")[0] for each in " ".join(environment).split()}
    chosen = {name: value for name, value in _defaults(device).items() if name not in flags}
    for each in given:
        name, equals, value = each.partition("=")
        if not (name and equals):
            raise UserError(f"config.compiler_options: {each!r} is not of the form name=value.")
        chosen[name.removeprefix("--")] = value
    return chosen


def compile_with(lowered: jax.stages.Lowered, options: Mapping[str, str]) -> jax.stages.Compiled:
    """Compile a function.

    Raises:
      UserError: XLA does not know an option, or its value.
    """
    try:
        return lowered.compile(compiler_options=dict(options) or None)
    except jax.errors.JaxRuntimeError as error:
        if unknown := _UNKNOWN.search(str(error)):
            raise UserError(f"config.compiler_options: XLA has no option {unknown[1]} on this platform.") from error
        if "While setting option" in str(error):
            raise UserError(f"config.compiler_options: {str(error).partition(': ')[2]}") from error
        raise


def _defaults(device: Any) -> Mapping[str, str]:
    if device.platform == "tpu":
        return _TPU | (_LARGE_VMEM if re.search("v5 ?lite|v5e|v6", device.device_kind) else {})
    return {"cpu": _CPU, "gpu": _GPU, "cuda": _GPU}.get(device.platform, {})
