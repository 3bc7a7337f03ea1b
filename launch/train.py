"""Train: `python -m shampax.launch.train --config=FILE.py[:VARIANT] --workdir=DIR [--config.KEY=VALUE ...]`.

The same command again resumes from the newest checkpoint; once the run is complete it only says so. --help lists every
knob; with a --config, its values too.

A run of several processes is this command in each. Slurm, GKE, Cloud TPU and Open MPI say which process each is; else
JAX_COORDINATOR_ADDRESS=HOST:PORT (of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID in the environment do. They end
together. `shampax.launch.local` starts several on this machine.

Exit codes: 0, complete; 1, training could not go on (a checkpoint is saved), or this process has failed with a
traceback; 2, something given cannot work, or is not the same in all processes (no run has begun); 75, another process
has died, failed or not come, the same command goes on from the newest checkpoint; 130 and 143, stopped by Ctrl-C or
SIGTERM (a checkpoint is saved, the same command goes on from it).
"""

import errno
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from ..configs import base
from ..framework.base.errors import TrainingStopped, UserError
from ..framework.config.check import load
from ..framework.distributed import cluster, sameness
from ..framework.distributed.processes import Group
from . import environment, flags, knobs
from .next_steps import next_steps

_UNUSABLE = (errno.EEXIST, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG)
_USAGE = "usage: python -m shampax.launch.train --config=FILE.py[:VARIANT] --workdir=DIR [--config.KEY=VALUE ...]"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; see the module. `arguments` are those of this process by default. Returns the exit code."""
    group = None
    try:
        command = flags.parse(sys.argv[1:] if arguments is None else arguments)
        if command.help:
            _help(command)
            return 0
        place = cluster.place()
        group = Group(place, _explain) if place else None
        code = _train(command, group)
    except BaseException as error:
        if group is not None:
            group.fail(error)
        known = _explain(error)
        if known is None:
            raise
        code, words = known
        print(words, file=sys.stderr)
        return code
    if group is not None:
        group.leave()
    return code


def _train(command: flags.Command, group: Group | None) -> int:
    environment.check_accelerator()
    config = load(command.config, command.overrides)
    environment.simulate_devices(config.simulated_devices)
    if group is not None:
        group.join(sameness.identity(config, command.workdir), **config.processes)
    # Imported when the config is known to be good: the trainer brings all of JAX, Orbax and grain with it.
    from ..framework.train import train

    try:
        result = train(config, command.workdir)
    except OSError as error:
        if error.errno not in _UNUSABLE:
            raise
        raise UserError(f"workdir {command.workdir} cannot be used: {error}") from error
    _say_where(command, config, result)
    return 128 + signal.Signals[result["stopped"]] if result["stopped"] else 0


def _say_where(command: flags.Command, config: Any, result: dict[str, Any]) -> None:
    import jax

    if jax.process_index() != 0:
        return
    print(f"\nResults: {command.workdir} (result.json, metrics.jsonl, config.json, checkpoints/, TensorBoard events)")
    if result["stopped"]:
        print(f"Stopped by {result['stopped']} after step {result['steps']}; the same command goes on from there.")
        return
    print("Next:")
    for line in next_steps(command, config):
        print(f"  {line}")


def _help(command: flags.Command) -> None:
    config = load(command.config, command.overrides) if command.config else base.get_config()
    print(f"{_USAGE}\n\nThe same command again resumes. Knobs, their {'values' if command.config else 'defaults'}:\n")
    print(knobs.table(config))
    if not command.config:
        print("\nWith --config=FILE.py:VARIANT also the knobs of its task, data and optimizer.")


def _explain(error: BaseException) -> tuple[int, str] | None:
    """Exit code and last words for what a user can make use of; None for what needs its traceback."""
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT, "interrupted; the same command goes on from the newest checkpoint, if there is one"
    if not isinstance(error, (UserError, TrainingStopped)):
        return None
    words = f"error: {' '.join(str(error).split())}"
    if isinstance(error.__cause__, RuntimeError):  # not the user's doing: whoever mends it needs to see where it was
        words = "".join(traceback.format_exception(error.__cause__)) + words
    return (2 if isinstance(error, UserError) else 1), words


if __name__ == "__main__":
    sys.exit(main())
