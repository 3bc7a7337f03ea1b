"""A profile of some steps of a run, for TensorBoard, written by process 0."""

import re
from pathlib import Path

import jax

from ..base.errors import UserError
from ..distributed import console
from .watchdog import Watchdog

_NEVER = 2**62


def parse(text: str) -> range:
    """The steps of `config.profile_steps`, numbered from 1 as in the console; "" is none of them.

    Raises:
      UserError: it is no range of steps.
    """
    if not text:
        return range(0)
    match = re.fullmatch(r"(\d{1,15}):(\d{1,15})", text)
    first, stop = map(int, match.groups()) if match else (0, 0)
    if not 1 <= first < stop:
        raise UserError(
            f"config.profile_steps is {text!r}; write FIRST:STOP, such as 10:20 for the steps 10 to 19, the first step "
            "of a run being 1"
        )
    return range(first, stop)


class Profile:
    """Traces the steps of a range: once, from the first that this process comes to, to the last or the end of the run.

    One process of a run is enough to see compute, collectives and the waits of both; all of them would write the same
    many megabytes a hundred times. In the workdir the profile lies where TensorBoard looks, `plugins/profile/DATE/`.

    Args:
      steps: as `parse` has them.
      workdir: of the run.
      watch: writing a profile takes a while, in which nothing moves.
      begin: the steps behind the run already; where these are some of the range, that is said.
      total_steps: of the run.

    Raises:
      UserError: the run ends before the range does.
    """

    def __init__(self, steps: range, workdir: Path, watch: Watchdog, *, begin: int, total_steps: int):
        if steps and steps[-1] > total_steps:
            raise UserError(
                f"config.profile_steps {steps.start}:{steps.stop} needs {steps[-1]} steps, but config.duration is "
                f"{total_steps} steps; the largest STOP is {total_steps + 1}"
            )
        left = range(max(steps.start, begin + 1), steps.stop)
        if steps and left != steps:
            rest = f"only {left[0]} to {left[-1]} are profiled" if left else "no step is profiled"
            console.say(
                f"warning: config.profile_steps {steps.start}:{steps.stop}: {begin} steps are past, {rest}; "
                "take a later range"
            )
        self._workdir, self._watch = workdir, watch
        self._first = left.start if left else _NEVER  # becomes _NEVER when the trace begins: there is one
        self._last = left[-1] if left else _NEVER
        self._running = False

    def next(self, step: int) -> int:
        """The nearest step after `step` at which training has to pause for the profile to begin or to end."""
        return min(border for border in (self._first - 1, self._last, _NEVER) if border > step)

    def begin(self, step: int) -> None:
        """Begin, if the next step is the first of the range. Nothing is under way on the devices."""
        if step + 1 >= self._first:
            self._first, self._running = _NEVER, True
            if jax.process_index() == 0:
                options = jax.profiler.ProfileOptions()
                options.python_tracer_level = 0  # every Python call: 19 to 42 MB for three steps
                with self._watch.during("profile"):
                    jax.profiler.start_trace(self._workdir, profiler_options=options)

    def end(self, step: int) -> None:
        """End, if the last step of the range is done, and nothing is under way on the devices."""
        if step >= self._last:
            self._write()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        """Where the run ends within the range, write what there is."""
        self._write()

    def _write(self) -> None:
        if not self._running:
            return
        self._running = False
        if jax.process_index() == 0:
            with self._watch.during("profile"):
                jax.profiler.stop_trace()
            console.say(
                f"profile written: tensorboard --logdir={self._workdir}, with the package xprof for its Profile tab"
            )
