"""Show the parameters, memory and restored state of a run at its start."""

import datetime
import json
import math
import os
import platform
import shlex
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from ...optimizers.plan import patterns
from ..base import paths
from ..base import workdir as layout
from ..base.errors import told
from ..base.paths import Path
from ..checkpoint import takeover
from ..checkpoint.inspect import aligned
from ..distributed.console import say
from ..sharding import meshes, placement
from ..step.state import TrainState

_CONSOLE_ROWS = 40


class Row(NamedTuple):
    """One line of the parameter table."""

    path: str
    shape: str = ""
    sharding: str = ""
    treatment: str = ""
    count: int = 0


def parameter_rows(
    params: Any, placements: Mapping[str, placement.Placement], treatments: Mapping[str, str]
) -> list[Row]:
    """Return a row for each parameter, in the order of the tree.

    Args:
      params: arrays or ShapeDtypeStructs.
      placements: placement by "params/<path>"; its notes on dropped axes are shown too.
      treatments: the optimizer's treatment by path; "-" is shown for paths without one.
    """
    rows = []
    for path, leaf in zip(patterns.paths(params), jax.tree.leaves(params), strict=True):
        placed = placements[f"params/{path}"]
        notes = f" ({'; '.join(placed.notes)})" if placed.notes else ""
        shape = "x".join(map(str, leaf.shape)) or "scalar"
        sharding = placement.describe(placed.spec) + notes
        rows.append(Row(path, shape, sharding, treatments.get(path, "-"), math.prod(leaf.shape)))
    return rows


def table(rows: Sequence[Row]) -> str:
    """Return all rows and their total as aligned text."""
    with_total = [*rows, Row("total", count=sum(row.count for row in rows))]
    return aligned([("parameter", *Row._fields[1:]), *((*row[:-1], f"{row.count:,}") for row in with_total)])


def show_parameters(rows: Sequence[Row], workdir: Path) -> None:
    """Write the table to `parameters.txt`, and print it.

    The console shows the 40 largest parameters.
    """
    if jax.process_index() != 0:
        return
    _keep(workdir / layout.PARAMETERS, table(rows))
    large = sorted(range(len(rows)), key=lambda i: -rows[i].count)[:_CONSOLE_ROWS]
    rest = [row.count for i, row in enumerate(rows) if i not in large]
    more = [Row(f"({len(rest)} more in {layout.PARAMETERS})", count=sum(rest))] if rest else []
    say(table([*(rows[i] for i in sorted(large)), *more]))


def note_start(workdir: Path, mesh: Mesh, *, step: int, total_steps: int) -> None:
    """Append when, where and how this process starts to `starts.jsonl`."""
    if jax.process_index() != 0:
        return
    kinds = sorted({device.device_kind for device in mesh.devices.flat})
    start = {
        "started": f"{datetime.datetime.now().astimezone():%Y-%m-%d %H:%M:%S %Z}",
        "command": shlex.join([*_program(), *sys.argv[1:]]),
        "folder": os.getcwd(),
        "commit": _commit(os.getcwd()) or _commit(os.path.dirname(__file__)) or "not in a git repository",
        "machine": f"{socket.gethostname()}, {os.cpu_count()} cores",
        "devices": f"{mesh.size} x {', '.join(kinds)}",
        "processes": jax.process_count(),
        "mesh": ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1) or "one device",
        "versions": f"Python {platform.python_version()}, JAX {jax.__version__}, Flax {metadata.version('flax')}",
        "from_step": step,
        "total_steps": total_steps,
    }
    path = workdir / layout.STARTS
    try:
        before = paths.read_text(path) if path.exists() else ""
        paths.write_text(path, f"{before}{json.dumps(start)}\n")
    except paths.errors() as error:
        say(f"warning: {path} could not be written ({told(error)})")


def _program() -> list[str]:
    name = os.path.basename(sys.argv[0])
    return ["python", "-m", __name__.partition(".")[0]] if name == "__main__.py" else [name]


def _commit(folder: str) -> str:
    """Return the abbreviated commit that is checked out, "-dirty" after it for changed files, "" without git."""
    command = ["git", "-C", folder, "describe", "--always", "--dirty", "--abbrev=12", "--match="]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def show_takeover(taken: takeover.Takeover, workdir: Path) -> None:
    """Write what a run restores from a checkpoint, and what not, to `restored.txt`, and print it."""
    if taken.path is None or jax.process_index() != 0:
        return
    first = f"taken over with all their state: {taken.whole} of {len(jax.tree.leaves(taken.spec.params))} parameters"
    frozen = len(jax.tree.leaves(taken.spec.frozen))
    first += f", and {frozen} frozen ones" if frozen else ""
    _keep(workdir / layout.RESTORED, "\n".join([f"from {taken.path}", first, *taken.lines]))
    more = len(taken.lines) - _CONSOLE_ROWS
    rest = [f"({more} more lines in {layout.RESTORED})"] if more > 0 else []
    say("\n  ".join([first, *taken.lines[:_CONSOLE_ROWS], *rest]))


def _keep(path: Path, text: str) -> None:
    try:
        path.write_text(f"{text}\n")
    except paths.errors() as error:
        say(f"warning: {path} could not be written ({told(error)})")


def memory_line(state: TrainState) -> str:
    """Return `on each device: parameters 2.9 MB, optimizer state 11.2 MB` for ShapeDtypeStructs with shardings."""
    parts = {
        "parameters": state.params,
        "frozen parameters": state.frozen,
        "optimizer state": state.opt_state,
        "average": state.averaging,
    }
    sizes = {name: meshes.bytes_on_device(part) for name, part in parts.items()}
    return "on each device: " + ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in sizes.items() if size)
