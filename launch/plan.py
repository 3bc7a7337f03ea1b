"""Know the cost first: `python -m shampax.launch.plan --config=FILE.py[:VARIANT] [--topology=v5e:16x16]`.

Prints what a config needs of each device: parameters by treatment, buckets, bytes, FLOPs, collectives and the least
time of a step. No accelerator is needed and no data are read. With --topology the train step is compiled ahead of time
for a TPU slice, in minutes for a large model, and the compiler's bytes and collectives are shown besides; it needs
libtpu (make install EXTRA=plan). Without it --devices says how many devices there are, by default as many as the
config's mesh names, or simulates, and --chip of what kind. Any --config.KEY=VALUE changes the config, as it does for
training.

--search compiles nothing. It tries every mesh of data, fsdp and tensor, and block sizes on the best, and prints those
with the lowest predicted step time that fit.

Exit codes: 0; 1, it does not fit in the memory of a device; 2, something given cannot work.
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from typing import Any

from ..framework.base.errors import UserError
from ..framework.config.check import load
from . import environment


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; see the module. `arguments` are those of this process by default. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m shampax.launch.plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, metavar="FILE.py[:VARIANT]")
    parser.add_argument("--topology", default="", metavar="NAME", help="v5e:4x4, v5p:4x4x4, v6e:16x16, ...")
    parser.add_argument("--devices", type=int, default=0, metavar="N", help="without --topology")
    parser.add_argument("--chip", default="", metavar="NAME", help="that --devices counts: v5e, v5p, v6e, ...")
    parser.add_argument("--search", action="store_true", help="propose a mesh and a block size")
    parser.add_argument("--json", action="store_true", help="the same figures for programs")
    options, rest = parser.parse_known_args(sys.argv[1:] if arguments is None else arguments)
    environment.without_accelerator()
    try:
        overrides = _overrides(rest)
        config = load(options.config, overrides)
        devices = _slice(options.topology) if options.topology else _simulated(options.devices, config)
        # Imported when the config is known to be good: these bring JAX and Orbax with them.
        from ..framework.planning import plan_report, planning
        from ..framework.sharding import chips

        if options.chip and (options.topology or options.chip not in chips.KINDS):
            raise UserError(f"--chip={options.chip} is for --devices and one of {', '.join(chips.KINDS)}")
        kind = chips.KINDS[options.chip] if options.chip else devices[0].device_kind
        if options.search:
            return _search(options, overrides, devices, kind)
        found = planning.figures(config, devices, compiles=bool(options.topology), kind=kind)
        advice = planning.suggestions(found, config)
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(found.to_json() | {"suggestions": advice}, indent=2))
    else:
        print(plan_report.text(options.config, found, advice))
    return 1 if found.fits is False else 0


def _search(options: argparse.Namespace, overrides: tuple[str, ...], devices: Sequence[Any], kind: str) -> int:
    from ..framework.planning import search

    def note(what: str) -> None:
        print(f"trying {what}", file=sys.stderr)

    found = search.search(lambda more: load(options.config, (*overrides, *more)), devices, kind, note)
    print(json.dumps([each.to_json() for each in found], indent=2) if options.json else search.text(found))
    return 0 if found[0].seconds < math.inf else 1


def _overrides(rest: Sequence[str]) -> tuple[str, ...]:
    for argument in rest:
        if not argument.startswith("--config.") or "=" not in argument:
            raise UserError(
                f"unknown flag {argument!r}; there are --config, --topology, --devices, --chip, --search, --json "
                "and --config.KEY=VALUE"
            )
    return tuple(argument.removeprefix("--config.") for argument in rest)


def _simulated(count: int, config: Any) -> Sequence[Any]:
    """CPU devices in the place of those that are to be planned for."""
    if count < 0:
        raise UserError(f"--devices is {count}; give a count, or leave it out")
    fixed = math.prod(size for size in config.mesh.values() if size > 0)
    count = count or (max(fixed, config.simulated_devices) if -1 in config.mesh.values() else fixed)
    import jax

    jax.config.update("jax_num_cpu_devices", count)  # also where the environment says otherwise
    return jax.devices()


def _slice(name: str) -> Sequence[Any]:
    """The devices of a TPU slice that is not here."""
    # Nothing is asked of the metadata server of a cloud, and several processes may compile at a time.
    for variable, value in (
        ("TPU_SKIP_MDS_QUERY", "1"),
        ("TPU_ACCELERATOR_TYPE", "v5litepod-16"),
        ("TPU_WORKER_HOSTNAMES", "localhost"),
        ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),
    ):
        os.environ.setdefault(variable, value)
    import jax
    from jax.experimental import topologies

    # Programs for devices that are not here can be written to the cache and not read back.
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    except Exception as error:  # of libtpu, as of its absence
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"no TPU slice --topology={name} ({type(error).__name__}: {reason}); names are like v5e:4x4, v5p:4x4x4 and "
            "v6e:16x16, and libtpu must be installed: make install EXTRA=plan"
        ) from error


if __name__ == "__main__":
    sys.exit(main())
