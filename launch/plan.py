"""Plan a config before running it: `python -m shampax.launch.plan --config=FILE.py[:VARIANT] [--topology=v5e:16x16]`.

Prints the needs of each device: parameters by treatment, buckets, bytes and FLOPs. No accelerator is needed and no data
are read. With --topology the train, evaluation and prediction steps are compiled ahead of time for a TPU slice, in
minutes for a large model, and the memory, FLOPs and collectives of the compiled programs are shown too; this needs
libtpu (make install EXTRA=plan). Without it, --devices is the number of devices, by default as many as the config's
mesh names or simulates. Any --config.KEY=VALUE changes the config, as in training.

Exit codes: 0; 1, the config does not fit in the memory of a device; 2, invalid input.
"""

import json
import math
import os
import re
import sys
from collections.abc import Sequence
from typing import Any

from ..framework.base.errors import UserError
from ..framework.config.check import load
from . import environment, flags

_MOST_DEVICES = 16_384  # 4,096 simulated devices take 15 seconds to make


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the verb and return its exit code. `arguments` defaults to those of this process."""
    return flags.run(lambda: _plan(arguments))


def _plan(arguments: Sequence[str] | None) -> int:
    parser = flags.Parser("plan", __doc__)
    parser.add_argument("--config", required=True, metavar="FILE.py[:VARIANT]")
    parser.add_argument(
        "--topology", default="", metavar="NAME", help="v5e:4x4, v5p:4x4x4, 2xv5e:16x16 (2 slices), ..."
    )
    parser.add_argument("--devices", type=int, default=0, metavar="N", help="number of devices without --topology")
    parser.add_argument("--json", action="store_true", help="print the figures for programs")
    options, overrides = parser.parse(arguments)
    environment.without_accelerator()
    config = load(options.config, overrides)
    devices = _slice(options.topology) if options.topology else _simulated(options.devices, config)
    # Imported after the config is checked: planning imports JAX and Orbax.
    from ..framework.planning import plan, tables

    found = plan.make_plan(config, devices, compiles=bool(options.topology))
    print(json.dumps(found.to_json(), indent=2) if options.json else tables.text(options.config, found))
    return 1 if found.fits is False else 0


def _simulated(count: int, config: Any) -> Sequence[Any]:
    """Return CPU devices that stand for those of the plan."""
    fixed = math.prod(size for size in config.mesh.values() if size > 0)
    fixed *= max(1, config.slices)
    count = count or (max(fixed, config.simulated_devices) if -1 in config.mesh.values() else fixed)
    if not 1 <= count <= _MOST_DEVICES:
        raise UserError(f"--devices or config.mesh: {count} devices: must be at least 1 and at most {_MOST_DEVICES}.")
    import jax

    jax.config.update("jax_num_cpu_devices", count)  # overrides the environment
    return jax.devices()


def _slice(name: str) -> Sequence[Any]:
    """Return the devices of one or several TPU slices that need not exist."""
    # libtpu must not query a cloud's metadata server, and several processes may compile at once.
    for variable, value in (
        ("TPU_SKIP_MDS_QUERY", "1"),
        ("TPU_ACCELERATOR_TYPE", "v5litepod-16"),
        ("TPU_WORKER_HOSTNAMES", "localhost"),
        ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),
    ):
        os.environ.setdefault(variable, value)
    import jax
    from jax.experimental import topologies

    # JAX writes programs for absent devices to the cache, but cannot read them back.
    jax.config.update("jax_enable_compilation_cache", False)
    slices, shape = re.fullmatch(r"(?:(\d+)x(?=v))?(.*)", name).groups()  # type: ignore  (it matches every name)
    several = {"num_slices": int(slices)} if slices else {}
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=shape, **several).devices
    except Exception as error:  # libtpu raises many types, ImportError among them
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"--topology={name}: no such TPU slice ({type(error).__name__}: {reason}). Use a name like v5e:4x4, "
            "v5p:4x4x4 or v6e:16x16, and install libtpu with make install EXTRA=plan."
        ) from error


if __name__ == "__main__":
    sys.exit(main())
