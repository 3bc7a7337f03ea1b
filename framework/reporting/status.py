"""Answer a morning's questions about a run: its state, its loss against a baseline, time left, speed, and faults."""

import datetime
import os
import re
import socket
import time
from typing import Literal, NamedTuple

import numpy as np

from ..base import paths, workdir
from ..base.json_files import is_number
from ..base.parts import parts
from . import curves
from .runs import Run

HELDOUT, TRAIN, BYTES = "heldout/loss", "train/loss", "heldout/bits_per_byte"
_SLOW_INPUT = 0.05  # of the time
_SILENT = 600  # seconds without a measurement after which a run on another machine counts as dead
_HOLDER = re.compile(r"process (\d+) on (\S+), run ")


class State(NamedTuple):
    """Whether a run is alive, in a word and in a sentence."""

    kind: Literal["complete", "running", "stopped", "failed"]
    told: str


class Fact(NamedTuple):
    """A number of a run, with its unit and a remark."""

    label: str
    value: str
    note: str = ""
    unit: str = ""


def state(run: Run) -> State:
    """Return whether a run is complete, running, stopped by a signal, or has failed: then why, or since when."""
    if run.result is not None:
        stopped, steps = run.result["stopped"], f"{run.result['steps']:,} steps"
        if not stopped:
            return State("complete", f"complete after {steps}")
        return State("stopped" if stopped.startswith("SIG") else "failed", f"stopped after {steps}: {stopped}")
    written = max(map(paths.modified, parts(run.path / workdir.METRICS)))
    total = total_steps(run)
    done = f"{run.steps:,} {'' if total is None else f'of {total:,} '}steps"
    last = f"{done}, measured at {datetime.datetime.fromtimestamp(written):%Y-%m-%d %H:%M}"
    if _alive(run, written):
        return State("running", f"running: {last}")
    return State("failed", f"ended without a result: {last}. Rerun its command to resume")


def facts(run: Run, baseline: Run | None, key: str) -> list[Fact]:
    """Return loss against the baseline, time left or taken, speed and MFU.

    Args:
      run: the run.
      baseline: run to compare with; None for the baseline itself.
      key: name of the held-out measurement that compares.
    """
    found = [_loss(run, baseline, key), _time(run)]
    per_step, rate = run.last("throughput/steps_per_second"), "tokens"
    if (speed := run.last("throughput/tokens_per_second")) is None:
        speed, rate = run.last("throughput/examples_per_second"), "examples"
    if speed is not None:
        note = f"{1000 / per_step:,.0f} ms a step" if per_step else ""
        found.append(Fact("Speed", short(speed), note, f"{rate}/s"))
    mfu = run.last("throughput/mfu")
    found.append(Fact("MFU", f"{mfu:.0%}") if mfu else Fact("MFU", "-", "no known peak of these devices"))
    return found


def wrong(run: Run) -> list[str]:
    """Return a sentence on each thing that is wrong, most serious first."""
    told, (steps, heldout) = [], run.curve(HELDOUT, "step")
    train = run.curve(TRAIN, "step")[1]
    if len(train) and not np.isfinite(train[-1]):
        told.append("The training loss is not finite. Lower schedule.learning_rate or set gradient_clip.")
    elif len(train) > 4 and train[-1] > train[0]:
        told.append(f"The training loss has risen from {train[0]:.4g} to {train[-1]:.4g}: the run diverges.")
    if skipped := run.last("train/skipped"):
        told.append(f"{skipped:,.0f} steps were skipped, because loss, gradient or update was not finite.")
    if len(heldout) > 2 and np.isfinite(heldout).all() and heldout[-1] > 1.01 * heldout.min():
        best = heldout.argmin()
        told.append(f"The held-out loss was best, {heldout[best]:.4f}, after {steps[best]:,.0f} steps: it overfits.")
    diagnostics = {end: [run.last(key) or 0 for key in _of_buckets(run, end)] for end in ("fallbacks", "failures")}
    if blocks := sum(diagnostics["fallbacks"]):
        told.append(f"{blocks:,.0f} blocks of the optimizer use the graft method: see Fallbacks, by layer.")
    if refused := sum(diagnostics["failures"]):
        told.append(f"Rejected refreshes of roots: {refused:,.0f} in a row. See Residual; raise optimizer.ridge.")
    waits = run.curve("throughput/input_wait", "step")[1][-5:]
    if len(waits) and np.nanmean(waits) > _SLOW_INPUT:
        waited = f"{np.nanmean(waits):.0%} of the time"
        told.append(f"Training waits for input {waited}. Raise input.workers or input.ahead.")
    if folders := [name for name in (workdir.STALLS, workdir.DAMAGED) if (run.path / name).is_dir()]:
        told.append(f"The workdir has {' and '.join(folders)}/: stack traces of a stall, or damaged checkpoints.")
    return [*told, *run.notes]


def total_steps(run: Run) -> int | None:
    """Return the length of a run in steps, None if it is not known."""
    if run.result is not None and not run.result["stopped"]:
        return run.result["steps"]
    if run.starts and isinstance(total := run.starts[-1].get("total_steps"), int):
        return total
    match = re.fullmatch(r"([0-9_]+)( steps)?", str(run.config.get("duration", "")))
    return int(match[1]) if match else None


def span(seconds: float) -> str:
    """Return a time in its two largest units, such as "3 h 12 min"."""
    units = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
    at = next((i for i, (_, size) in enumerate(units) if seconds >= size), 3)
    if at == 3:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    (unit, size), (smaller, part) = units[at], units[at + 1]
    whole = round(seconds / part) * part
    rest = whole % size // part
    return f"{whole // size:.0f} {unit}" + (f" {rest:.0f} {smaller}" if rest else "")


def short(number: float) -> str:
    """Return a number in three digits with a unit, such as "25.2k"."""
    unit, factor = next((each for each in (("G", 1e9), ("M", 1e6), ("k", 1e3)) if number >= each[1]), ("", 1.0))
    return f"{number / factor:.3g}{unit}"


def _loss(run: Run, baseline: Run | None, key: str) -> Fact:
    label = "Bits per byte" if key == BYTES else "Held-out loss"
    steps, values = run.curve(key, "step")
    if not len(values):
        last = run.last(TRAIN)
        return Fact("Training loss", "-" if last is None else f"{last:.4f}", "no evaluation yet")
    value = "not finite" if not np.isfinite(values[-1]) else f"{values[-1]:.4f}"
    if baseline is None:
        return Fact(label, value)
    name, (_, ends) = paths.of(baseline.path).name, baseline.curve(key, "step")
    at = curves.reach(steps, values, ends[-1]) if len(ends) and np.isfinite(ends[-1]) else None
    if run.result is not None and baseline.result is not None and len(ends):
        difference, where = values[-1] - ends[-1], ""
    else:
        own, other = (curves.band(curves.Group("", (each,)), key, "step") for each in (run, baseline))
        common = min((line.x[-1] for line in (own, other) if len(line.x)), default=0.0)
        if not all(len(line.x) and line.x[0] <= common for line in (own, other)):
            return Fact(label, value, f"{name} has no value to compare with")
        here, there = (np.interp(common, line.x, line.mean) for line in (own, other))
        difference, where, at = here - there, f" at step {common:,.0f}", None
    told = f"{abs(difference):.4f} {'below' if difference < 0 else 'above'} {name}{where}"
    if at is not None and difference < 0:
        told += f", whose end it reached after {at / baseline.steps:.0%} of the steps"
    return Fact(label, value, told)


def _time(run: Run) -> Fact:
    total, seconds = total_steps(run), run.points.axes["seconds"]
    if run.result is not None and not run.result["stopped"]:
        first = run.result.get("seconds_to_first_step")
        note = f"and {span(float(first))} to the first step" if first and is_number(first) else ""
        return Fact("Trained for", span(run.result["seconds"]), note)
    if total is None or len(seconds) < 2:
        return Fact("Trained for", span(seconds[-1]), f"{run.steps:,} steps so far")
    steps = run.points.axes["step"]
    since = max(0, min(len(steps) - 20, int(np.searchsorted(steps, 0.9 * steps[-1]))))  # the latest tenth
    pace = (seconds[-1] - seconds[since]) / max(1, steps[-1] - steps[since])
    return Fact("Time left", span(pace * (total - run.steps)), f"of training, after {span(seconds[-1])}")


def _of_buckets(run: Run, end: str) -> list[str]:
    return [key for key in run.points.columns if key.startswith("optimizer/") and key.endswith(f"/{end}")]


def _alive(run: Run, written: float) -> bool:
    """Return whether the process that holds the workdir lives; from another machine, whether it has written lately."""
    lock = run.path / workdir.LOCK
    match = _HOLDER.match(paths.read_text(lock)) if lock.exists() else None
    if match and match[2] == socket.gethostname():
        try:
            os.kill(int(match[1]), 0)
        except PermissionError:  # it is another user's
            pass
        except ProcessLookupError:
            return False
        return True
    seconds = np.diff(run.points.axes["seconds"][-20:])
    usual = float(seconds.max()) if len(seconds) else 0.0
    return time.time() - written < max(_SILENT, 5 * usual)
