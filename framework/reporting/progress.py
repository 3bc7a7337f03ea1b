"""What a person at the console sees: the parameter table, how far the run is and how fast it goes."""

import dataclasses
import datetime
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from ...optimizers.plan import patterns
from ...optimizers.residence import HOST_KIND
from ..base import workdir as layout
from ..checkpoint import takeover
from ..distributed.console import say
from ..sharding import chips, partitioning
from ..step.state import TrainState

_CONSOLE_ROWS = 40


@dataclasses.dataclass(frozen=True)
class Speed:
    """Throughput between two points of training time.

    Attributes:
      steps_per_second: over all devices together, as the other two.
      tokens_per_second:
      mfu: the task's FLOPs per second over the devices' peak in bfloat16; None where the peak is not known.
    """

    steps_per_second: float
    tokens_per_second: float
    mfu: float | None

    def values(self) -> dict[str, float]:
        """By the names they have among the metrics."""
        named = {f"throughput/{field.name}": getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in named.items() if value is not None}


class Speedometer:
    """Measures speed from one reading to the next; the first step of a process, its warm-up, is left out."""

    def __init__(self, mesh: Mesh, *, total_steps: int, tokens_per_step: int, flops_per_step: float):
        self._total_steps = total_steps
        self._tokens_per_step = tokens_per_step
        peak = chips.peak_flops(mesh.devices.flat[0].device_kind)
        self._peak_share_per_step = flops_per_step / (peak * mesh.size) if peak else None
        self._first: tuple[int, float] | None = None
        self._last: tuple[int, float] | None = None

    def warmed_up(self, step: int, seconds: float) -> None:
        """Measure from here on: training seconds after `step`, the first of this process."""
        self._first = self._last = (step, seconds)

    def read(self, step: int, seconds: float) -> Speed | None:
        """Speed since the last reading, or None before there is anything to measure."""
        rate = self._rate(self._last, step, seconds)
        if rate is None:
            return None
        self._last = (step, seconds)
        mfu = rate * self._peak_share_per_step if self._peak_share_per_step else None
        return Speed(rate, rate * self._tokens_per_step, mfu)

    def remaining(self, step: int, seconds: float) -> float | None:
        """Training seconds to the end, at the mean speed of this process."""
        rate = self._rate(self._first, step, seconds)
        return (self._total_steps - step) / rate if rate else None

    @staticmethod
    def _rate(since: tuple[int, float] | None, step: int, seconds: float) -> float | None:
        if since is None or step <= since[0] or seconds <= since[1]:
            return None
        return (step - since[0]) / (seconds - since[1])


def progress_line(
    step: int, total_steps: int, values: Mapping[str, float], speed: Speed | None, remaining: float | None
) -> str:
    """`step  120/600  loss 5.4321  rate 3.0e-03  12.3 steps/s  25.2k tokens/s  ETA 0:00:39`."""
    parts = [f"step {step:>{len(str(total_steps))}}/{total_steps}"]
    parts.append(f"loss {values['train/loss']:.4f}")
    parts.append(f"learning rate {values['train/learning_rate']:.2e}")
    for count in ("skipped", "spikes"):
        if values[f"train/{count}"]:
            parts.append(f"{count} {values[f'train/{count}']}")
    if speed:
        parts.append(f"{speed.steps_per_second:.3g} steps/s")
        parts.append(f"{_short(speed.tokens_per_second)} tokens/s")
        if speed.mfu is not None:
            parts.append(f"MFU {speed.mfu:.1%}")
    if remaining:
        parts.append(f"ETA {datetime.timedelta(seconds=round(remaining))}")
    return "  ".join(parts)


def evaluation_line(step: int, values: Mapping[str, float], best: bool) -> str:
    """`held-out after step 120: loss 5.1, accuracy 0.2 (best so far)`."""
    loss_first = sorted(values, key=lambda name: name != "loss")
    shown = ", ".join(f"{name} {values[name]:.4f}" for name in loss_first)
    return f"held-out after step {step}: {shown}{' (best so far)' if best else ''}"


def spike_line(step: int, loss: float, bound: float, *, skipped: bool) -> str:
    """`loss spike at step 120: 7.1000, above the bound of 5.6000; the step is skipped`."""
    outcome = "the step is skipped" if skipped else "trained on all the same"
    return f"loss spike at step {step}: {loss:.4f}, above the bound of {bound:.4f}; {outcome}"


def _short(number: float) -> str:
    for unit, factor in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= factor:
            return f"{number / factor:.3g}{unit}"
    return f"{number:.3g}"


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the parameter table."""

    path: str
    shape: str
    sharding: str
    treatment: str
    count: int


def parameter_rows(
    params: Any, placements: Mapping[str, partitioning.Placement], treatments: Mapping[str, str]
) -> list[Row]:
    """The table's rows, in the order of the tree.

    Args:
      params: arrays or ShapeDtypeStructs.
      placements: of the task's variables, by path, with the reasons where a rule could not be followed.
      treatments: the optimizer's, by path; may lack any.
    """
    rows = []
    for path, leaf in zip(patterns.paths(params), jax.tree.leaves(params), strict=True):
        placement = placements[f"params/{path}"]
        notes = f" ({'; '.join(placement.notes)})" if placement.notes else ""
        rows.append(
            Row(
                path=path,
                shape="x".join(map(str, leaf.shape)) or "scalar",
                sharding=partitioning.describe(placement.spec) + notes,
                treatment=treatments.get(path, "-"),
                count=math.prod(leaf.shape),
            )
        )
    return rows


def table(rows: Sequence[Row]) -> str:
    """All rows as aligned text with a total."""
    cells = [("parameter", "shape", "sharding", "treatment", "count")]
    cells += [(row.path, row.shape, row.sharding, row.treatment, f"{row.count:,}") for row in rows]
    cells.append(("total", "", "", "", f"{sum(row.count for row in rows):,}"))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for line in cells:
        left = [cell.ljust(width) for cell, width in zip(line[:-1], widths[:-1], strict=True)]
        lines.append("  ".join([*left, line[-1].rjust(widths[-1])]))
    return "\n".join(lines)


def show_parameters(rows: Sequence[Row], workdir: Path) -> None:
    """Print the table, and write it whole to `parameters.txt`.

    On the console, parameters that differ only by numbers in their paths share a line; of more than 40 lines
    the largest are shown.
    """
    if jax.process_index() != 0:
        return
    (workdir / layout.PARAMETERS).write_text(table(rows) + "\n")
    merged = _merge(rows)
    if len(merged) > _CONSOLE_ROWS:
        bound = sorted((row.count for row in merged), reverse=True)[_CONSOLE_ROWS - 1]
        large = [row for row in merged if row.count >= bound][:_CONSOLE_ROWS]
        rest = [row for row in merged if row not in large]
        other = Row(f"({len(rest)} more in {layout.PARAMETERS})", "", "", "", sum(row.count for row in rest))
        merged = [*large, other]
    say(table(merged))


def show_takeover(taken: takeover.Takeover, workdir: Path) -> None:
    """Print what a run takes over from a checkpoint and what not, and write it whole to `restored.txt`."""
    if taken.path is None or jax.process_index() != 0:
        return
    first = f"taken over with all their state: {taken.whole} of {len(jax.tree.leaves(taken.spec.params))} parameters"
    (workdir / layout.RESTORED).write_text("\n".join([f"from {taken.path}", first, *taken.lines]) + "\n")
    say(first)
    for line in taken.lines[:_CONSOLE_ROWS]:
        say(f"  {line}")
    if len(taken.lines) > _CONSOLE_ROWS:
        say(f"  ({len(taken.lines) - _CONSOLE_ROWS} more lines in {layout.RESTORED})")


def memory_line(state: TrainState) -> str:
    """`on each device: parameters 2.9 MB, optimizer state 11.2 MB (and 4.2 MB in its host's memory)`.

    Args:
      state: ShapeDtypeStructs with shardings.
    """

    def megabytes(tree: Any, *, on_host: bool) -> float:
        leaves = [leaf for leaf in jax.tree.leaves(tree) if (leaf.sharding.memory_kind == HOST_KIND) == on_host]
        shapes = [(leaf.sharding.shard_shape(leaf.shape), leaf.dtype.itemsize) for leaf in leaves]
        return sum(math.prod(shape) * size for shape, size in shapes) / 1e6

    hosted = megabytes(state.opt_state, on_host=True)
    iterate = megabytes(state.averaging, on_host=False)
    return (
        f"on each device: parameters {megabytes(state.params, on_host=False):.1f} MB, optimizer state "
        f"{megabytes(state.opt_state, on_host=False):.1f} MB"
        + (f" (and {hosted:.1f} MB in its host's memory)" if hosted else "")
        + (f", iterate of the average {iterate:.1f} MB" if state.averaging else "")
    )


def _merge(rows: Sequence[Row]) -> list[Row]:
    """`layer_0/w` ... `layer_11/w` of one shape, sharding and treatment become `layer_*/w (12)`."""

    def alike(row: Row) -> tuple[str, ...]:
        return re.sub(r"\d+", "*", row.path), row.shape, row.sharding, row.treatment

    order = {key: number for number, key in reversed(list(enumerate(map(alike, rows))))}
    merged = []
    for key, same in itertools.groupby(sorted(rows, key=lambda row: order[alike(row)]), alike):
        group = list(same)
        path = group[0].path if len(group) == 1 else f"{key[0]} ({len(group)})"
        merged.append(dataclasses.replace(group[0], path=path, count=sum(row.count for row in group)))
    return merged
