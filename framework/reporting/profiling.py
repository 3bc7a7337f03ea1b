"""Profile some steps of a run for TensorBoard, on process 0."""

import os
import re
import shutil
import sys
import tempfile
from typing import Any

import jax

from ..base import paths
from ..base.errors import UserError
from ..base.paths import Path
from ..distributed import console
from .watchdog import Watchdog


def parse(text: str) -> range:
    """Return the steps of `config.profile_steps`, numbered from 1 as on the console; none for "".

    Raises:
      UserError: the text is not a range of steps.
    """
    if not text:
        return range(0)
    match = re.fullmatch(r"(\d{1,15}):(\d{1,15})", text)
    first, stop = map(int, match.groups()) if match else (0, 0)
    if not 1 <= first < stop:
        raise UserError(
            f"config.profile_steps={text!r}: not a range of steps. Write FIRST:STOP, such as 10:20 for steps 10 to 19; "
            "the first step of a run is 1."
        )
    return range(first, stop)


class Profile:
    """A hook of the loop that traces the steps of a range once, until the last of them or the end of the run.

    Process 0 alone shows compute, collectives and waiting time; each process would write the same many megabytes.
    TensorBoard finds the profile in the workdir, in `plugins/profile/DATE/`.

    Args:
      steps: steps to trace, from `parse`.
      workdir: workdir of the run.
      watch: told while a profile is written.
      begin: steps taken before this process, which are not traced again.
      total_steps: steps of the run.

    Raises:
      UserError: the run ends before the range does.
    """

    def __init__(self, steps: range, workdir: Path, watch: Watchdog, *, begin: int, total_steps: int):
        if steps and steps[-1] > total_steps:
            raise UserError(
                f"config.profile_steps={steps.start}:{steps.stop}: needs {steps[-1]} steps, but config.duration is "
                f"{total_steps} steps. The largest STOP is {total_steps + 1}."
            )
        left = range(max(steps.start, begin + 1), steps.stop)
        self._workdir, self._watch = workdir, watch
        self._pauses = [left[0] - 1, left[-1]] if left else []  # those still to come
        self._running = False
        self._folder = os.fspath(workdir)  # for a workdir in a bucket another one, from which the files are copied

    def next(self, step: int) -> int:
        """Return the first step after `step` at which training must pause to begin or end the trace."""
        return min((pause for pause in self._pauses if pause > step), default=sys.maxsize)

    def due(self, run: Any) -> bool:
        """Return whether the trace begins or ends at this pause."""
        return bool(self._pauses) and run.step >= self._pauses[0] and (self._running or not run.at_end)

    def __call__(self, run: Any) -> None:
        """Begin or end the trace. No step is in flight at a pause."""
        if self._running:
            self._write()
        elif not run.stopped:
            self._pauses.pop(0)
            self._running = True
            if jax.process_index() == 0:
                options = jax.profiler.ProfileOptions()
                options.python_tracer_level = 0  # tracing every Python call takes 19 to 42 MB for three steps
                self._watch.at("profile", run.step)
                if not paths.is_local(self._workdir):
                    self._folder = tempfile.mkdtemp()
                jax.profiler.start_trace(self._folder, profiler_options=options)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        if self._running:
            self._write()

    def _write(self) -> None:
        self._watch.at("profile", self._pauses.pop())
        self._running = False
        if jax.process_index() == 0:
            try:
                jax.profiler.stop_trace()
                if self._folder != os.fspath(self._workdir):
                    for name in paths.files(paths.of(self._folder)):
                        (self._workdir / name).write_bytes((paths.of(self._folder) / name).read_bytes())
                    shutil.rmtree(self._folder, ignore_errors=True)
            except (RuntimeError, *paths.errors()) as error:  # JAX raises the former for a full disk
                console.say(f"warning: the profile could not be written ({error}). Training continues.")
                return
            console.say(f"profile written: tensorboard --logdir={self._workdir} (the Profile tab needs xprof)")
