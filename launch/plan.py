"""Plan a config before running it: `shampax plan --config=FILE.py[:VARIANT] [--topology=v5e:16x16]`.

Prints the needs of each device: parameters by treatment, buckets, bytes and FLOPs. No accelerator is needed and no data
are read. With --topology or --gpu the train, evaluation and prediction steps are compiled ahead of time for TPU slices
or GPUs that need not exist, in minutes for a large model, and with --present for the devices of this machine. The
memory of the compiled programs, the time of a step by class of work, collectives and the largest possible MFU are shown
too. This needs libtpu (make install EXTRA=plan) or the compiler of CUDA (make install EXTRA=plan-gpu). Without any of
them, --devices is the number of devices, by default as many as the config's mesh names or simulates. Any
--config.KEY=VALUE changes the config, as in training. --search=N compiles up to N variants of the train step with other
meshes, remat policies and micro-batches, and prints their commands, the fastest first.

Exit codes: 0; 1, the config does not fit in the memory of a device; 2, invalid input.
"""

import json
import math
import sys
from collections.abc import Sequence
from typing import Any

from ..framework.config.check import load
from . import environment, flags


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the verb and return its exit code. `arguments` defaults to those of this process."""
    return flags.run(lambda: _plan(arguments))


def _plan(arguments: Sequence[str] | None) -> int:
    parser = flags.Parser("plan", __doc__)
    parser.add_argument("--config", required=True, metavar="FILE.py[:VARIANT]")
    devices = parser.add_mutually_exclusive_group()
    devices.add_argument(
        "--topology", default="", metavar="NAME", help="v5e:4x4, v5p:4x4x4, 2xv5e:16x16 (2 slices), ..."
    )
    devices.add_argument("--gpu", default="", metavar="NAME", help="8xh100, 16xh200 (2 nodes), ...")
    devices.add_argument("--present", action="store_true", help="compile for the devices of this machine")
    devices.add_argument("--devices", type=int, default=0, metavar="N", help="number of devices without compilation")
    parser.add_argument("--fast", action="store_true", help="let the compiler try less: minutes instead of tens")
    parser.add_argument("--search", type=int, default=0, metavar="N", help="compile up to N variants; implies --fast")
    parser.add_argument("--json", action="store_true", help="print the figures for programs")
    options, overrides = parser.parse(arguments)
    if not options.present:
        environment.without_accelerator()
    config = load(options.config, overrides)
    # Imported after the config is checked: planning imports JAX and Orbax.
    from ..framework.planning import plan, search, tables, targets

    if options.fast or options.search:
        targets.compile_fast()
    compiles = plan.PROGRAMS if options.topology or options.gpu or options.present else ()
    if absent := targets.missing(options.topology, options.gpu):
        found, compiles = targets.simulated(targets.counted(options.topology, options.gpu)), ()
        print(absent, file=sys.stderr)
    else:
        found = _devices(options, config)
    if options.search and compiles:
        given = [f"--config={options.config}", *(f"--config.{each}" for each in overrides)]
        trials = search.search(
            lambda changes: load(options.config, (*overrides, *changes)),
            found,
            options.search,
            lambda line: print(line, file=sys.stderr, flush=True),
        )
        print(search.text(" ".join(given), trials))
        return 1 if trials[0].plan.fits is False else 0
    result = plan.make_plan(config, found, compiles=compiles)
    print(json.dumps(result.to_json(), indent=2) if options.json else tables.text(options.config, result))
    return 1 if result.fits is False else 0


def _devices(options: Any, config: Any) -> Sequence[Any]:
    from ..framework.planning import targets

    if options.topology or options.gpu:
        return targets.tpus(options.topology) if options.topology else targets.gpus(options.gpu)
    if options.present:
        environment.simulate_devices(config.simulated_devices)
        return targets.present()
    fixed = math.prod(size for size in config.mesh.values() if size > 0) * max(1, config.slices)
    wanted = max(fixed, config.simulated_devices) if -1 in config.mesh.values() else fixed
    return targets.simulated(options.devices or wanted)


if __name__ == "__main__":
    sys.exit(main())
