"""The commands worth typing after a run: its baseline, both in one report, one knob changed."""

import dataclasses
import os
import shlex
import shutil
import sys
from typing import Any

from ..framework.config import files
from .flags import Command

_SHAMPOO = "shampax.optimizers.shampoo:ShampooOptions"
_ADAMW = "shampax.optimizers.baselines:AdamWOptions"
_BASELINES = ("adamw", "adam", "lamb", "sgd", "adagrad")  # sample_adamw is the baseline of sample
_RATE = "schedule.learning_rate"


def next_steps(command: Command, config: Any) -> list[str]:
    """Three shell commands, ready to paste, for the run that `command` has completed."""
    other = _counterpart(command, config)
    rate = f"{config.schedule.learning_rate / 2:g}"
    slower = dataclasses.replace(
        command,
        workdir=f"{_stem(command)}_rate_{rate}",
        overrides=(*_without(command.overrides, _RATE), f"{_RATE}={rate}"),
    )
    report = [_python(), "-m", "shampax.launch.report", command.workdir, other.workdir]
    return [_shell(other), shlex.join(report), _shell(slower)]


def _counterpart(command: Command, config: Any) -> Command:
    """The baseline of this run, or the run whose baseline this is: a variant of its own, tuned, where there is one."""
    file, colon, variant = command.config.rpartition(":")
    overrides = _without(command.overrides, "optimizer.", _RATE)
    known = files.variants(command.config) if colon else ()
    for method in _BASELINES:
        of = variant.removesuffix(f"_{method}")
        for other, name in ((f"{variant}_{method}", method), (of, "shampoo")):
            if other != variant and other in known:
                place = f"{_stem(command)}_{name}"
                return dataclasses.replace(command, config=f"{file}:{other}", workdir=place, overrides=overrides)
    is_baseline = config.optimizer.name == _ADAMW
    workdir = f"{_stem(command)}_{'shampoo' if is_baseline else 'adamw'}"
    switch = f"optimizer.name={_SHAMPOO if is_baseline else _ADAMW}"
    return dataclasses.replace(command, workdir=workdir, overrides=(*overrides, switch))


def _stem(command: Command) -> str:
    return command.workdir.rstrip("/")


def _without(overrides: tuple[str, ...], *prefixes: str) -> tuple[str, ...]:
    return tuple(override for override in overrides if not override.startswith(prefixes))


def _shell(command: Command) -> str:
    flags = [f"--config={command.config}", f"--workdir={command.workdir}"]
    flags += [f"--config.{override}" for override in command.overrides]
    return shlex.join([_python(), "-m", "shampax.launch.train", *flags])


def _python() -> str:
    """What to type for this interpreter: nobody needs to have activated its environment."""
    if shutil.which("python") == sys.executable:
        return "python"
    path = os.path.relpath(sys.executable)
    return sys.executable if path.startswith("..") else path
