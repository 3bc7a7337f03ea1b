"""Search meshes, remat policies and micro-batches for the shortest step by compiling the train step of each."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from ..base.errors import UserError
from .plan import Plan, make_plan

Overrides = tuple[str, ...]
_TENSOR = (1, 2, 4, 8)
_REMAT = ("best", "minimal", "full", "none")
_MICROBATCHES = (1, 2, 4, 8)


class Trial(NamedTuple):
    """A compiled variant of a config: the overrides "KEY=VALUE" that make it, and its plan."""

    overrides: Overrides
    plan: Plan

    @property
    def error(self) -> str:
        """Return the compiler's reason if it does not fit."""
        return self.plan.compiled["train"].error

    @property
    def rank(self) -> tuple[bool, float]:
        """Return the key to sort by: variants that fit first, then by the time of a step."""
        return self.plan.fits is False, self.plan.step_seconds or math.inf


def search(
    config_of: Callable[[Overrides], Any], devices: Sequence[Any], most: int, say: Callable[[str], None]
) -> list[Trial]:
    """Return the compiled variants, best first.

    It varies the mesh, then with the best mesh the remat policy, then with both the number of micro-batches. Variants
    that the config refuses are skipped.

    Args:
      config_of: returns the config with some overrides.
      devices: devices of the mesh.
      most: number of variants to compile.
      say: prints a line of progress.

    Raises:
      UserError: the config as it is cannot be planned, or the figures of the devices are not known.
    """
    tried: dict[Overrides, Trial] = {}
    config = config_of(())

    def attempt(overrides: Overrides, limit: int) -> None:
        if overrides in tried or len(tried) >= limit:
            return
        say(f"compiling {len(tried) + 1} of at most {most}: {' '.join(overrides) or 'the config as it is'}")
        try:
            plan = make_plan(config_of(overrides), devices, compiles=("train",))
        except UserError as error:
            if not overrides:
                raise
            say(f"skipped: {error}")
            return
        if plan.peak_flops is None:
            raise UserError(f"--search: the speed of {plan.device_kind} is not known. Use --topology or --gpu.")
        tried[overrides] = Trial(overrides, plan)

    def best() -> Trial:
        return min(tried.values(), key=lambda trial: trial.rank)

    attempt((), most)
    for mesh in _meshes(config, len(devices)):
        attempt(mesh, max(1, most // 2))
    start = best().overrides
    if "remat" in config.task:
        for policy in _REMAT:
            if policy != config.task.remat:
                attempt((*start, f"task.remat={policy}"), max(1, most * 3 // 4))
    start = best().overrides
    for count in _MICROBATCHES:
        if count != config.microbatches:
            attempt((*start, f"microbatches={count}"), most)
    return sorted(tried.values(), key=lambda trial: trial.rank)


def _meshes(config: Any, devices: int) -> Iterator[Overrides]:
    """Yield meshes with other sizes of `fsdp` and `tensor`, those like the config's first."""
    mesh = config.mesh
    free = devices // (max(1, config.slices) * mesh.expert * mesh.sequence)
    current = max(1, mesh.fsdp), max(1, mesh.tensor)
    found = [
        (fsdp, tensor)
        for tensor in _TENSOR
        for fsdp in (2**power for power in range(free.bit_length()))
        if free % (fsdp * tensor) == 0 and (fsdp, tensor) != current
    ]

    def distance(sizes: tuple[int, int]) -> float:
        return sum(abs(math.log2(new / old)) for new, old in zip(sizes, current, strict=True))

    for fsdp, tensor in sorted(found, key=distance):
        yield (f"mesh.fsdp={fsdp}", f"mesh.tensor={tensor}", "mesh.data=-1")


def text(command: str, trials: Sequence[Trial]) -> str:
    """Return a table of the variants, with commands, and of those that do not fit.

    Args:
      command: the command that plans the config without overrides.
      trials: variants, best first.
    """
    lines = ["MFU at most  ms of a step  peak GB   command"]
    for trial in (each for each in trials if not each.rank[0]):
        plan = trial.plan
        assert plan.step_seconds and plan.peak is not None
        figures = f"{plan.mfu(plan.model_flops):>11.1%} {1e3 * plan.step_seconds:>14,.1f} {plan.peak / 1e9:>8,.2f}"
        lines.append("   ".join([figures, _with(command, trial.overrides)]))
    if refused := [each for each in trials if each.rank[0]]:
        lines += ["", "do not fit:"]
        for trial in refused:
            peak, memory = trial.plan.peak, trial.plan.memory
            over = trial.error or f"peak {(peak or 0) / 1e9:,.2f} GB of {(memory or 0) / 1e9:,.2f} GB"
            lines.append(f"  {_with(command, trial.overrides)}: {over}")
    return "\n".join(lines)


def _with(command: str, overrides: Overrides) -> str:
    return " ".join([command, *(f"--config.{each}" for each in overrides)])
