"""Measure what the host schedule adds to a step, with an emulated accelerator: a step that waits and uses no core.

    python -m shampax.benchmarks.host_schedule --markdown=docs/schedules.md --figure=docs/images/host_timeline.png

Loops with different schedules take turns: no roots; roots on the host, at intervals from long to too short; the same
roots in the step. Every step computes the optimizer's arithmetic, and waits as long as a device would need for
gradients. JSON goes to standard output.
"""

import argparse
import contextlib
import dataclasses
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from ..framework.base.errors import UserError
from ..optimizers import ShampooOptions, distributed_shampoo
from ..optimizers.host.service import Event
from ..optimizers.host.workers import pool_size
from . import command
from .documents import Section, table, write

COMMAND = "python -m shampax.benchmarks.host_schedule"
SECTION = Section("host_schedule")
NONE, HOST, IN_STEP = "no roots", "host", "in the step"
_COLOURS = {"step": "#0072B2", "copy": "#56B4E9", "solve": "#009E73", "install": "#D55E00", "wait": "#000000"}


@dataclasses.dataclass(frozen=True)
class Way:
    """How a loop refreshes roots. `solver` applies to roots in the step."""

    kind: str
    interval: int
    delay: int = 0
    solver: str = "newton"

    @property
    def name(self) -> str:
        """Name in tables."""
        if self.kind == NONE:
            return self.kind
        how = f"delay {self.delay}" if self.kind == HOST else self.solver
        return f"{self.kind}, interval {self.interval}, {how}"


class Loop:
    """A train loop with one way of refreshing roots.

    Args:
      way: how roots are refreshed.
      shapes: shapes of the parameters, by name.
      block_size: largest side of a block.
      wait: seconds that the emulated device needs for gradients.
    """

    def __init__(self, way: Way, shapes: dict[str, tuple[int, ...]], block_size: int, wait: float):
        refresh = "staggered" if way.kind == IN_STEP else "host"
        options = ShampooOptions(
            block_size=block_size,
            interval=way.interval,
            early_intervals=(),
            refresh=refresh,
            delay=way.delay,
            solver=way.solver,
        )
        self.way, self.workers = way, pool_size(options.host_workers)
        self.events: list[Event] = []
        self.seconds: list[float] = []
        random = np.random.default_rng(0)
        gradients = {name: jnp.asarray(random.standard_normal(shape, np.float32)) for name, shape in shapes.items()}
        self._params = jax.tree.map(jnp.zeros_like, gradients)
        tx = distributed_shampoo(1e-3, options)

        def device(number: np.ndarray) -> np.ndarray:
            start = time.perf_counter()
            time.sleep(wait)
            self.events.append(Event("step", "device", start, time.perf_counter(), int(number)))
            return np.ones((), np.float32)

        def step(params: Any, state: Any) -> tuple[Any, Any, jax.Array]:
            one = jax.pure_callback(device, jax.ShapeDtypeStruct((), jnp.float32), state.count)
            noise = jax.random.normal(jax.random.key(state.count), (16,))
            grads = {name: one * (1 + 0.1 * noise[i]) * g for i, (name, g) in enumerate(gradients.items())}
            updates, state = tx.update(grads, state, params)
            return jax.tree.map(jnp.add, params, updates), state, one

        self._step = jax.jit(step, donate_argnums=(0, 1))
        self.service = tx.host_roots(self._params, self.events) if way.kind == HOST else None
        state = jax.jit(tx.init)(self._params)
        self._state = self.service.start(state) if self.service else state
        self.blocks = sum(bucket.blocks for bucket in tx.layout(self._params).plan.buckets)

    def run(self, steps: int) -> None:
        """Run steps. As in the trainer, wait for a step after the next one is dispatched."""
        unread = None
        for _ in range(steps):
            start = time.perf_counter()
            if self.service:
                self._state = self.service.install(self._state)
            self._params, self._state, done = self._step(self._params, self._state)
            if self.service:
                self.service.take(self._state)
            if unread is not None:
                unread.block_until_ready()
            unread = done
            self.seconds.append(time.perf_counter() - start)
        jax.block_until_ready(unread)


def measure(options: argparse.Namespace) -> tuple[dict[str, Any], Loop]:
    """Run all ways in turns. Return (result as JSON, loop for the timeline)."""
    shapes = {f"w{i}": (2 * options.block_size, 2 * options.block_size) for i in range(options.matrices)}
    k = options.interval
    ways = [
        Way(NONE, k),
        *(Way(HOST, max(interval, options.delay + 1), options.delay) for interval in (k, k // 2, k // 4, 1)),
        Way(IN_STEP, k),
        Way(IN_STEP, k, solver="eigh"),
    ]
    loops = [Loop(way, shapes, options.block_size, options.wait) for way in dict.fromkeys(ways)]
    with contextlib.ExitStack() as stack:
        for loop in loops:
            if loop.service:
                stack.callback(loop.service.close)
            loop.run(2 * k)  # compiles, and refreshes every root once
        rows: dict[str, list[dict[str, float]]] = {loop.way.name: [] for loop in loops}
        for _ in range(options.turns):
            for loop in loops:
                before = loop.service.report() if loop.service else None
                loop.seconds.clear()
                start = time.perf_counter()
                loop.run(options.steps)
                elapsed = time.perf_counter() - start
                row = {"step_ms": 1e3 * elapsed / options.steps, "median_ms": 1e3 * statistics.median(loop.seconds)}
                if loop.service and before:
                    did = loop.service.report().since(before)
                    row |= {
                        "stall_share": did.stalled_seconds / elapsed,
                        "stalls": did.stalls,
                        "busy": did.busy_seconds / (elapsed * loop.workers),
                    }
                rows[loop.way.name].append(row)
                print(f"{loop.way.name}: {row}", file=sys.stderr, flush=True)
    base = statistics.median(row["step_ms"] for row in rows[loops[0].way.name])
    results = []
    for loop in loops:
        of_way = rows[loop.way.name]
        middle = {name: statistics.median(row[name] for row in of_way) for name in of_way[0]}
        added = middle["step_ms"] / base - 1
        results.append({"way": loop.way.name, **middle, "added": added, "turns": of_way})
    facts = {"blocks": loops[0].blocks, "block_size": options.block_size, "workers": loops[1].workers}
    facts |= {"wait_ms": 1e3 * options.wait, "steps": options.steps, "turns": options.turns}
    return facts | {"ways": results}, loops[1]


def markdown(result: dict[str, Any]) -> str:
    """Format the result as a table."""

    def percent(row: dict[str, Any], name: str) -> str:
        return f"{row[name]:.1%}" if name in row else ""

    rows = [
        [
            row["way"],
            f"{row['step_ms']:.1f}",
            f"{row['added']:+.1%}",
            percent(row, "stall_share"),
            f"{row['stalls']:g}" if "stalls" in row else "",
            percent(row, "busy"),
        ]
        for row in result["ways"]
    ]
    heading = ["roots", "ms per step", "added to no roots", "time stalled", "stalls", "pool busy"]
    return (
        f"Made by `{COMMAND}`: {result['blocks']} blocks of {result['block_size']} x {result['block_size']}, "
        f"{result['workers']} host thread(s), a device emulated by a wait of {result['wait_ms']:.0f} ms per step; "
        f"medians over {result['turns']} turns of {result['steps']} steps:\n\n{table(heading, rows)}\n"
    )


def timeline(loop: Loop, steps: int) -> Figure:
    """Draw a loop's last steps: the device's work, copies, solves and installs, one row per thread."""
    marks = [event for event in loop.events if event.kind == "step"][-steps - 1 : -1]
    first, last = marks[0].start, marks[-1].end
    shown = [event for event in loop.events if event.end > first and event.start < last and event.kind in _COLOURS]
    workers = sorted({event.thread for event in shown if event.kind == "solve"})
    rows = ["device", "main", "reader", *workers]
    figure = Figure(figsize=(11, 1.4 + 0.5 * len(rows)), layout="constrained", dpi=144)
    panel = figure.subplots()
    for event in shown:
        row = {"step": "device", "copy": "reader", "solve": event.thread}.get(event.kind, "main")
        # Copies and installs are widened: they are too short to see.
        width = max(event.end - event.start, (last - first) / 400) if event.kind in ("copy", "install") else None
        width = width or event.end - event.start
        panel.barh(rows.index(row), 1e3 * width, left=1e3 * (event.start - first), height=0.6, linewidth=0.3,
                   edgecolor="white", color=_COLOURS[event.kind])  # fmt: skip
    titles = {"main": "main thread", "reader": "reader: copies", "device": "device (emulated)"}
    panel.set_yticks(range(len(rows)), [titles.get(row, row.replace("roots-", "solver ")) for row in rows])
    panel.invert_yaxis()
    panel.set_xlim(0, 1e3 * (last - first))
    panel.set_xlabel("milliseconds")
    names = {"step": "step", "copy": "statistics arrive", "solve": "solve", "install": "install", "wait": "stall"}
    seen = [kind for kind in _COLOURS if any(event.kind == kind for event in shown)]
    handles = [Patch(color=_COLOURS[kind]) for kind in seen]
    figure.legend(handles, [names[kind] for kind in seen], loc="outside upper center", ncols=len(seen), frameon=False)
    return figure


def main(arguments: Sequence[str]) -> int:
    """Run the command line. Return the exit code."""
    parser = argparse.ArgumentParser(prog=COMMAND, description="Measure the host schedule on an emulated accelerator.")
    for name, default, text in (
        ("block_size", 256, "side of a block"),
        ("matrices", 12, "number of matrices of 2 x 2 blocks"),
        ("interval", 24, "longest interval; a half, a quarter and the shortest possible are measured too"),
        ("delay", 2, "delay of roots on the host in steps"),
        ("steps", 48, "steps per turn"),
        ("turns", 3, "turns of every loop"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{text}; default: {default}")
    parser.add_argument("--wait", type=float, default=0.1, metavar="S", help="seconds per device step; default: 0.1")
    parser.add_argument(
        "--markdown", type=Path, metavar="FILE", help=f"write the table between {SECTION.begin} and {SECTION.end}"
    )
    parser.add_argument("--figure", type=Path, metavar="PNG", help="draw the timeline of the longest interval")
    options = parser.parse_args(arguments)

    def run() -> dict[str, Any]:
        if options.markdown and not options.markdown.is_file():
            # Fail before minutes of measuring.
            raise UserError(f"--markdown={options.markdown}: the file does not exist. Name an existing page")
        result, loop = measure(options)
        if options.markdown:
            write(options.markdown, {SECTION: markdown(result)})
        if options.figure:
            options.figure.parent.mkdir(parents=True, exist_ok=True)
            timeline(loop, steps=8).savefig(options.figure)
        return result

    return command.report(run)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
