"""Train: `python -m shampax.launch.train --config=FILE.py[:VARIANT] --workdir=DIR [--config.KEY=VALUE ...]`.

The same command again resumes from the newest checkpoint; once the run is complete it only says so. --help lists every
knob; with a --config, its values too.

Exit codes: 0, complete; 1, training could not go on (a checkpoint is saved); 2, something given cannot work (no run
has begun); 130 and 143, stopped by Ctrl-C or SIGTERM (a checkpoint is saved, the same command goes on from it).
"""

import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from ..configs import base
from ..framework.config import load
from ..framework.errors import UserError
from . import environment, flags, knobs
from .next_steps import next_steps

_USAGE = "usage: python -m shampax.launch.train --config=FILE.py[:VARIANT] --workdir=DIR [--config.KEY=VALUE ...]"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; see the module. `arguments` are those of this process by default. Returns the exit code."""
    environment.before_jax()
    try:
        command = flags.parse(sys.argv[1:] if arguments is None else arguments)
        if command.help:
            _help(command)
            return 0
        config = load(command.config, command.overrides)
        environment.simulate_devices(config.simulated_devices)
        return _train(command, config)
    except UserError as error:
        _complain(error)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the newest checkpoint, if there is one", file=sys.stderr)
        return 128 + signal.SIGINT


def _train(command: flags.Command, config: Any) -> int:
    # Imported when the config is known to be good: the trainer brings all of JAX, Orbax and grain with it.
    from ..framework.stopping import TrainingStopped
    from ..framework.train import train

    try:
        result = train(config, command.workdir)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise UserError(f"workdir {command.workdir} cannot be used: {error}") from error
    except TrainingStopped as error:
        _complain(error)
        return 1
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


def _complain(error: Exception) -> None:
    if isinstance(error.__cause__, RuntimeError):  # not the user's doing: whoever mends it needs to see where it was
        traceback.print_exception(error.__cause__)
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
