"""Train with several values of some knobs: `shampax sweep --config=FILE.py[:VARIANT] --workdir=DIR --over KEY=V,V ...`.

    shampax sweep --config=lm:bytes --workdir=runs/rates \
        --over schedule.learning_rate=0.01,0.02,0.04 seed=0,1,2 --jobs=2

Each combination of values is a trial, a run of `shampax train` in a folder of DIR, with its output beside it. Trials
that differ only in `seed` count as one setting. --random=N trains N random combinations, and a knob may then have a
range, as in schedule.learning_rate=1e-4..1e-2 (even in the logarithm). --halving=2,5 pauses all trials at their
evaluations 2 and 5, and only the better half of the settings continues. --jobs=N trains N trials at once, each on its
share of the GPUs or cores. --slurm writes a job array instead, in which each task trains one trial.

Rerun the same command to resume; complete trials are not repeated. In the end come a table, a report and the command of
the best setting. Any --config.KEY=VALUE holds for all trials. Data that can be prepared are prepared once.

Exit codes: 0; 1, a trial has failed; 2, invalid input; 130 and 143, stopped: rerun to resume.
"""

import contextlib
import dataclasses
import glob
import hashlib
import itertools
import math
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..framework.base import paths
from ..framework.base import workdir as layout
from ..framework.base.errors import UserError, printable
from ..framework.config.check import load
from ..framework.reporting.page import page
from ..framework.reporting.runs import Run, read_run
from . import flags, gang

_SHAMPAX = (sys.executable, "-m", "shampax")
_RANGE = re.compile(r"([-+.\de]+)\.\.([-+.\de]+)", re.IGNORECASE)
_PARTS = re.compile(r"(?:[^,\"'()\[\]]|\"[^\"]*\"|'[^']*'|\([^()]*(?:\([^()]*\)[^()]*)*\)|\[[^\]]*\])+")
_LONGEST_NAME = 120
_LOOKING_SECONDS = 0.2
_MOST = 10_000  # trials


@dataclasses.dataclass(frozen=True)
class Trial:
    """One run of a sweep: its overrides "KEY=VALUE", in the order of --over, and its workdir."""

    changes: tuple[str, ...]
    workdir: Path

    @property
    def setting(self) -> tuple[str, ...]:
        """The overrides without the seed."""
        return tuple(change for change in self.changes if not change.startswith("seed="))

    @property
    def log(self) -> Path:
        """The file of its output."""
        return self.workdir.with_name(f"{self.workdir.name}.log")

    def run(self) -> Run | None:
        """Return what the trial has measured, or None before its first measurement."""
        try:
            return read_run(self.workdir)
        except UserError:
            return None

    def done(self) -> bool:
        """Return whether the run is complete."""
        result = layout.read_result(self.workdir)
        return result is not None and not result["stopped"]

    def losses(self, metric: str) -> np.ndarray:
        """Return the held-out metric of each evaluation so far."""
        run = self.run()
        return run.curve(f"heldout/{metric}", "step")[1] if run else np.zeros(0)


@dataclasses.dataclass(frozen=True)
class Setting:
    """Trials that differ only in the seed, and the mean of their metric; infinite if one has diverged or has none."""

    trials: tuple[Trial, ...]
    mean: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the verb and return its exit code. `arguments` defaults to those of this process."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    return flags.run(lambda: _main(given))


def _main(given: list[str]) -> int:
    parser = flags.Parser("sweep", __doc__)
    parser.add_argument("--config", required=True, metavar="FILE.py[:VARIANT]")
    parser.add_argument("--workdir", type=_folder, required=True, metavar="DIR")
    parser.add_argument("--over", nargs="+", action="extend", required=True, metavar="KEY=VALUE,VALUE")
    parser.add_argument("--random", type=int, default=0, metavar="N", help="train N random combinations")
    parser.add_argument("--halving", default="", metavar="I,J", help="drop the worse half at these evaluations")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="trials at once (1)")
    parser.add_argument("--metric", default="loss", metavar="NAME", help="held-out metric to compare by (loss)")
    parser.add_argument("--higher", action="store_true", help="higher values of the metric are better")
    parser.add_argument("--slurm", action="store_true", help="write a Slurm job array, DIR/sweep.sbatch")
    parser.add_argument("--only", type=int, metavar="I", help="train only trial I, as a task of the array does")
    options, overrides = parser.parse(given)
    rungs = _rungs(options.halving)
    if options.jobs < 1:
        raise UserError(f"--jobs={options.jobs}: must be at least 1.")
    trials = _trials(options, overrides)
    if options.only is not None and not 0 <= options.only < len(trials):
        raise UserError(f"--only={options.only}: there are trials 0 to {len(trials) - 1}.")
    if rungs and (options.slurm or options.only is not None):
        raise UserError("--halving: tasks of a job array do not wait for each other. Leave it out.")
    options.workdir.mkdir(parents=True, exist_ok=True)
    command = [f"--config={options.config}", *(f"--config.{each}" for each in overrides)]
    if options.slurm:
        return _write_array(options, given, len(trials))
    command += _prepared(options, trials, overrides)
    if options.only is not None:
        return _train([trials[options.only]], command, 1, math.inf, options.metric)
    alive, code = trials, 0
    for rung in rungs:
        code = max(code, _train(alive, command, options.jobs, rung, options.metric))
        if code > 1:
            return code
        settings = _best(alive, options, rung)
        alive = [trial for setting in settings[: math.ceil(len(settings) / 2)] for trial in setting.trials]
    code = max(code, _train(alive, command, options.jobs, math.inf, options.metric))
    if code <= 1:
        _tell(trials, command, options)
    return code


def _folder(text: str) -> Path:
    if not paths.is_local(text):
        raise UserError(
            f"--workdir={text}: a sweep writes the output of its trials beside them, which a bucket cannot hold. Use a "
            "folder."
        )
    return Path(text)


def _rungs(text: str) -> list[int]:
    if not re.fullmatch(r"(\d{1,6}(,\d{1,6})*)?", text):
        raise UserError(f"--halving={text}: not numbers of evaluations. Write, for example, --halving=2,5.")
    rungs = [int(each) for each in text.split(",") if each]
    if rungs != sorted({*rungs} - {0}):
        raise UserError(f"--halving={text}: must rise from at least 1.")
    return rungs


def _trials(options: Any, overrides: Sequence[str]) -> list[Trial]:
    """Return the trials in order, after a check of each one's config."""
    values: dict[str, list[str]] = {}
    for each in options.over:
        key, equals, text = each.partition("=")
        if not equals or not text:
            raise UserError(f"--over {each}: has no values. Write --over KEY=VALUE,VALUE.")
        if key in values:
            raise UserError(f"--over {each}: {key} has values already. Write all in one list.")
        values[key] = _PARTS.findall(text)
        if _RANGE.fullmatch(text) and not options.random:
            raise UserError(f"--over {each}: a range needs --random=N.")
    if options.random:
        generator = random.Random(0)
        chosen = [
            tuple(f"{key}={_drawn(each, generator)}" for key, each in values.items()) for _ in range(options.random)
        ]
        combinations = list(dict.fromkeys(chosen))
    else:
        count = math.prod(map(len, values.values()))
        if count > _MOST:
            raise UserError(f"--over has {count:,} combinations, at most {_MOST:,} are possible. Use --random=N.")
        combinations = [
            tuple(f"{key}={each}" for key, each in zip(values, combination, strict=True))
            for combination in itertools.product(*values.values())
        ]
    shared = len({key.rpartition(".")[2] for key in values}) < len(values)
    for changes in combinations:
        load(options.config, (*overrides, *changes))
    return [Trial(changes, options.workdir / _name(changes, shared)) for changes in combinations]


def _drawn(values: Sequence[str], generator: random.Random) -> str:
    bounds = _RANGE.fullmatch(values[0]) if len(values) == 1 else None
    if bounds is None:
        return generator.choice(values)
    with contextlib.suppress(ValueError):
        low, high = map(float, bounds.groups())
        if 0 < low < high < math.inf:
            return f"{math.exp(generator.uniform(math.log(low), math.log(high))):.4g}"
    raise UserError(f"--over: the range {values[0]} must go from a number above 0 to a larger one.")


def _name(changes: Sequence[str], whole_keys: bool) -> str:
    pairs = [change.partition("=") for change in changes]
    name = ",".join(f"{key if whole_keys else key.rpartition('.')[2]}={value}" for key, _, value in pairs)
    safe = re.sub(r"[^\w.,=+-]", "_", name)
    if safe == name and len(name) <= _LONGEST_NAME:
        return name
    return f"{safe[:_LONGEST_NAME]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _prepared(options: Any, trials: Sequence[Trial], overrides: Sequence[str]) -> list[str]:
    """Prepare the data once, if all trials share them, and return the flag that makes trials use them."""
    from ..framework.config import components
    from ..framework.data.preparing.preparing import Preparable

    sections = [load(options.config, (*overrides, *trial.changes)).data for trial in trials]
    data = components.build(sections[0])
    if not isinstance(data, Preparable) or data.prepared or any(each != sections[0] for each in sections):
        return []
    place = options.workdir / layout.CACHE
    changes = [f"--config.{each}" for each in (*overrides, *trials[0].changes)]
    command = [*_SHAMPAX, "prepare", f"--config={options.config}", *changes, f"--output={place}"]
    if subprocess.run(command, stdout=sys.stderr, check=False).returncode:
        raise UserError(f"the data could not be prepared in {place}: the lines above say why.")
    return [f"--config.data.prepared={place}"]


def _write_array(options: Any, given: Sequence[str], count: int) -> int:
    file, command = options.workdir / "sweep.sbatch", [word for word in given if word != "--slurm"]
    file.write_text(
        "#!/bin/bash\n"
        f"#SBATCH --array=0-{count - 1}\n"
        f"#SBATCH --output={shlex.quote(str(options.workdir))}/%a.slurm\n"
        f"cd {shlex.quote(os.getcwd())}\n"
        f"exec {shlex.join([*_SHAMPAX, 'sweep', *command])} --only=$SLURM_ARRAY_TASK_ID\n"
    )
    print(f"{count} trials. Add your partition, GPUs and time to {file}, and submit it:\n  sbatch {file}")
    print(f"When it has ended, this prints the table:\n  shampax sweep {shlex.join(command)}")
    return 0


def _train(trials: Sequence[Trial], flags_of_all: Sequence[str], jobs: int, rung: float, metric: str) -> int:
    """Train trials to an evaluation, or to their ends; return 1 if one failed, or 128 + the signal that stopped us."""
    waiting = [trial for trial in trials if not trial.done() and len(trial.losses(metric)) < rung]
    running: dict[int, tuple[Trial, subprocess.Popen[bytes]]] = {}  # by share of the machine
    asked: set[int] = set()  # shares whose trial has been asked to stop
    failed, stopped = 0, 0

    def stop(number: int, frame: Any) -> None:
        nonlocal stopped
        del frame
        stopped = number  # the loop asks the trials, also one that is being started now

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        while running or (waiting and not stopped):
            for share in range(jobs):
                if share not in running and waiting and not stopped:
                    trial = waiting.pop(0)
                    running[share] = (trial, _start(trial, flags_of_all, share, jobs))
            time.sleep(_LOOKING_SECONDS)
            for share, (trial, process) in list(running.items()):
                code = process.poll()
                if code is None:
                    if share not in asked and (stopped or len(trial.losses(metric)) >= rung):
                        asked.add(share)  # a second signal would not wait for the save
                        process.send_signal(signal.SIGTERM)
                    continue
                del running[share]
                asked.discard(share)
                paused = code in (128 + signal.SIGTERM, -signal.SIGTERM)  # the latter before it could save
                if code and not paused:
                    failed = 1
                    last = (trial.log.read_text(errors="replace").splitlines() or [""])[-1]
                    _say(f"{trial.workdir.name}: failed with code {code}: {last}")
                elif not stopped:
                    _say(f"{trial.workdir.name}: {_so_far(trial, metric)}{' (paused)' if paused else ''}")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for _, process in running.values():
            process.kill()
    return 128 + stopped if stopped else failed


def _start(trial: Trial, flags_of_all: Sequence[str], share: int, jobs: int) -> "subprocess.Popen[bytes]":
    command = [*_SHAMPAX, "train", *flags_of_all, *(f"--config.{each}" for each in trial.changes)]
    environment, cores = dict(os.environ), sorted(os.sched_getaffinity(0))
    gpus = environment.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if gpus == [""]:
        gpus = [str(number) for number in range(len(glob.glob("/dev/nvidia[0-9]*")))]
    if jobs > 1 and gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[share % len(gpus) :: jobs])
    # Each trial leads a session: Ctrl-C in a terminal reaches it once, through this process.
    with trial.log.open("ab") as log:
        process = subprocess.Popen(
            [*command, f"--workdir={trial.workdir}"],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=gang.die_with_parent,
        )
    if jobs > 1:
        os.sched_setaffinity(process.pid, cores[share % len(cores) :: jobs] or cores)
    return process


def _best(trials: Sequence[Trial], options: Any, rung: int | None = None) -> list[Setting]:
    """Return the settings, best first, by their last evaluation or by evaluation number `rung`."""
    together: dict[tuple[str, ...], list[Trial]] = {}
    for trial in trials:
        together.setdefault(trial.setting, []).append(trial)
    settings = []
    for each in together.values():
        ends = [trial.losses(options.metric)[:rung] for trial in each]
        mean = float(np.mean([end[-1] if len(end) else np.nan for end in ends]))
        settings.append(Setting(tuple(each), mean if math.isfinite(mean) else math.inf))
    sign = -1 if options.higher else 1
    return sorted(settings, key=lambda setting: sign * setting.mean if setting.mean < math.inf else math.inf)


def _tell(trials: Sequence[Trial], command: Sequence[str], options: Any) -> None:
    """Print the table and the best setting's command, and write the report."""
    # A trial that halving has paused is behind those that went on, whatever its metric.
    done, paused = ([trial for trial in trials if trial.done() is whether] for whether in (True, False))
    keys = [change.partition("=")[0] for change in trials[0].changes if not change.startswith("seed=")]
    rows = [[*keys, options.metric, "seeds", "state"]]
    for state, settings in (("complete", _best(done, options)), ("not complete", _best(paused, options))):
        for setting in settings:
            values = [change.partition("=")[2] for change in setting.trials[0].setting]
            shown = f"{setting.mean:.5g}" if setting.mean < math.inf else "none"
            rows.append([*values, shown, str(len(setting.trials)), state])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print()
    for row in rows:
        _say("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    runs = [run for trial in trials if (run := trial.run())]
    if runs:
        (options.workdir / "index.html").write_text(page(runs), encoding="utf-8")
        print(f"\nReport: {options.workdir / 'index.html'}")
    if done:
        best = _best(done, options)[0].trials[0].setting
        words = [each for each in command if not each.startswith("--config.data.prepared=")]
        _say(f"Best: shampax train {shlex.join([*words, *(f'--config.{each}' for each in best)])} --workdir=WORKDIR")


def _so_far(trial: Trial, metric: str) -> str:
    losses = trial.losses(metric)
    return f"{metric} {losses[-1]:.5g} at evaluation {len(losses)}" if len(losses) else "no evaluation yet"


def _say(line: str) -> None:
    print(printable(line), flush=True)


if __name__ == "__main__":
    sys.exit(main())
