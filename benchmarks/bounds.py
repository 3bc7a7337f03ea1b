"""Compute the largest possible MFU of the large language models from programs compiled for absent devices.

    make install EXTRA=plan
    make install EXTRA=plan-gpu
    python -m shampax.benchmarks.bounds [--only=1b_adamw,8b] [--markdown=docs/plan.md]

Each row compiles the train step of a shipped config ahead of time at the compiler's least effort and judges it as
launch.plan does: 1 to 5 minutes of a core and up to 6 GB each. Prints JSON; progress goes to standard error. --markdown
replaces these rows of the table between the markers in a file; other rows stay.
"""

import argparse
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..configs import base, lm
from ..framework.base.errors import UserError
from ..framework.planning import plan, targets
from . import command, documents

SECTION = documents.Section("bounds")


class Case(NamedTuple):
    """A config for some devices.

    Attributes:
      variant: of configs/lm.py.
      topology: TPU slices, or "".
      gpu: GPUs, or "".
      changes: knobs that differ from the shipped config.
      adamw: whether AdamW replaces the config's optimizer.
    """

    variant: str
    topology: str
    gpu: str = ""
    changes: Mapping[str, Any] = {}
    adamw: bool = True


_NODE = {"mesh.fsdp": 8, "batch_size": 64}  # 8 rows on each GPU
_FOUR_SLICES = {"batch_size": 2_048}  # 2 rows on each of 1,024 chips, as on one slice
CASES = {
    "1b_adamw": Case("1b", "v5e:16x16"),
    "1b_shampoo": Case("1b", "v5e:16x16", adamw=False),
    "1b_two_slices": Case("1b", "2xv5e:16x16", adamw=False),
    "1b_two_slices_adamw": Case("1b", "2xv5e:16x16"),
    "1b_four_slices": Case("1b", "4xv5e:16x16", changes=_FOUR_SLICES, adamw=False),
    "1b_four_slices_adamw": Case("1b", "4xv5e:16x16", changes=_FOUR_SLICES),
    "8b": Case("8b", "v5p:4x4x8"),
    "8b_shampoo": Case("8b", "v5p:4x4x8", adamw=False),
    "8b_two_slices": Case("8b", "2xv5p:4x4x8", adamw=False),
    "long": Case("long", "v5e:16x16"),
    "moe": Case("moe", "v5e:16x16"),
    "moe_shampoo": Case("moe", "v5e:16x16", adamw=False),
    "1b_h100": Case("1b", "", "8xh100", _NODE),
}


def bound(case: Case) -> dict[str, Any]:
    """Return the figures of a case, or the reason why it does not compile."""
    config = lm.get_config(case.variant)
    config.update_from_flattened_dict(dict(case.changes))
    if case.adamw:
        config.optimizer = base.component(base.ADAMW, weight_decay=0.1)
    devices = targets.tpus(case.topology) if case.topology else targets.gpus(case.gpu)
    start = time.monotonic()
    found = plan.make_plan(config, devices, compiles=("train",))
    train = found.compiled["train"]
    row: dict[str, Any] = {
        "devices": case.topology or case.gpu,
        "optimizer": config.optimizer.name.rpartition(":")[2],
        "seconds_to_compile": round(time.monotonic() - start),
    }
    if train.error:
        return row | {"error": train.error}
    return row | {
        "milliseconds": 1e3 * train.work.seconds,
        "network_milliseconds": 1e3 * train.work.network_seconds,
        "bytes_between_slices": sum(each.crossing for each in train.work.traffic.values()),
        "milliseconds_by_class": {name: 1e3 * part.seconds for name, part in train.work.parts.items()},
        "mfu_bound": found.mfu(found.model_flops),
        "mfu_bound_whole_square": found.mfu(found.square_flops),
        "peak_bytes": train.peak,
        "peak_share": train.peak / found.memory if found.memory else None,
        "assumed": list(train.work.assumed),
    }


def table(rows: Mapping[str, Any], document: str = "") -> str:
    """Return the rows, and those that only the table of a document has, as a table in Markdown."""
    present = {line.split(" ")[1]: line for line in document.splitlines() if line.startswith("| ")}
    lines = [
        "| program | devices | optimizer | work ms | network ms | MB between slices | MFU at most | counting T x T | "
        "peak memory |",
        f"|{'---|' * 9}",
    ]
    for name in CASES:
        row = rows.get(name)
        if row is None:
            lines += [present[name]] if name in present else []
            continue
        start = f"| {name} | {row['devices']} | {row['optimizer'].removesuffix('Options')} |"
        if "error" in row:
            lines.append(f"{start} does not fit: {row['error'][:80]} | | | | | |")
            continue
        times, between = f"{row['milliseconds']:,.0f} | {row['network_milliseconds']:,.0f}", row["bytes_between_slices"]
        shares = " | ".join(f"{row[name]:.0%}" for name in ("mfu_bound", "mfu_bound_whole_square", "peak_share"))
        lines.append(f"{start} {times} | {between / 1e6:,.0f} | {shares} |")
    return "\n".join(lines)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Compile the cases and return their figures by name."""
    chosen = options.only.split(",") if options.only else list(CASES)
    if unknown := set(chosen) - set(CASES):
        raise UserError(f"--only={options.only}: unknown {', '.join(sorted(unknown))}. Use some of {', '.join(CASES)}.")
    targets.compile_fast()
    rows = {}
    for name in chosen:
        if absent := targets.missing(CASES[name].topology, CASES[name].gpu):
            raise UserError(absent)
        print(f"compiling {name}", file=sys.stderr, flush=True)
        rows[name] = bound(CASES[name])
    if options.markdown:
        documents.write(options.markdown, {SECTION: f"{table(rows, options.markdown.read_text())}\n"})
    return rows


def main() -> int:
    """Run the benchmark and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="names of rows, separated by commas")
    parser.add_argument("--markdown", type=Path, default=None, help="file whose table is replaced")
    return command.report(lambda: run(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
