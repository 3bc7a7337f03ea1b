"""Train: `shampax train --config=FILE.py[:VARIANT] --workdir=DIR [--config.KEY=VALUE ...]`.

Rerun the same command to resume from the latest checkpoint. A shipped config has a short name, as in
--config=lm:sample; `shampax models` lists them. --help lists all knobs, with --config also their values; `--help WORD`
lists those with a word.

In a run of several processes, each runs this command. Slurm, GKE and Open MPI tell each process its number;
elsewhere set JAX_COORDINATOR_ADDRESS=HOST:PORT (of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID. All processes end
together. `shampax local` starts several on this machine.

Exit codes: 0, complete; 1, training cannot continue (a checkpoint is saved), or this process failed with a traceback;
2, invalid input, or input that differs between processes (no run has begun); 75, another process died, failed or did
not connect, or the run hung: rerun to resume; 130 and 143, stopped by Ctrl-C or SIGTERM (a checkpoint is saved): rerun
to resume.
"""

import argparse
import errno
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from ..configs import base
from ..framework.base.errors import UserError
from ..framework.config import files
from ..framework.config.check import load
from ..framework.distributed import cluster, sameness
from ..framework.distributed.processes import Group
from . import environment, flags, interruptible, knobs

_UNUSABLE = ("EEXIST", "ENOTDIR", "EACCES", "EPERM", "EROFS", "ENAMETOOLONG", "ENOSPC", "EDQUOT")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the verb and return its exit code. `arguments` defaults to those of this process."""
    return flags.run(lambda: _main(sys.argv[1:] if arguments is None else arguments), explain)


def parser(*, helps: bool = False) -> flags.Parser:
    """Return the parser of the verb's flags. With `helps`, none is required."""
    usage = "%(prog)s --config=FILE.py[:VARIANT] --workdir=DIR [--config.KEY=VALUE ...]"
    made = flags.Parser("train", __doc__, usage=usage, add_help=False)
    made.add_argument("--config", required=not helps, metavar="FILE.py[:VARIANT]")
    made.add_argument("--workdir", required=not helps, metavar="DIR", help="rerun with the same DIR to resume")
    made.add_argument(
        "--change",
        action="append",
        default=[],
        metavar="KEY[=VALUE]",
        help="resume with another value of this knob, as in --change duration='80 steps'",
    )
    made.add_argument(
        "--help", "-h", nargs="*", metavar="WORD", help="list all knobs, or those with these words; see below"
    )
    return made


def _main(arguments: Sequence[str]) -> int:
    helps = not {"--help", "-h"}.isdisjoint(arguments)
    options, overrides = parser(helps=helps).parse(arguments)
    if helps:
        _help(options.config, overrides, options.help)
        return 0
    place = cluster.place()
    if place is None:
        return _train(options, overrides, None)
    group = Group(place)
    try:
        code = _train(options, overrides, group)
    except BaseException as error:
        group.fail(error, explain(error))
    group.leave()
    return code


def _help(file: str | None, overrides: Sequence[str], words: Sequence[str]) -> None:
    config = load(file, overrides) if file else base.get_config()
    listed = knobs.table(config, words)
    if not words:
        parser(helps=True).print_help()
        print(f"\nKnobs and their {'values; * marks what is not the default' if file else 'defaults'}:\n")
    elif not listed:
        raise UserError(f"--help {shlex.join(words)}: no knob has these words. Try fewer.")
    print(listed)
    if not file:
        print("\nWith --config=NAME:VARIANT also the knobs of its task, data and optimizer.")


def _train(options: argparse.Namespace, overrides: Sequence[str], group: Group | None) -> int:
    config = load(options.config, overrides, options.change)
    environment.simulate_devices(config.simulated_devices)
    if group is not None:
        group.join(sameness.identity(config, options.workdir), **config.processes)
    # Imported after the config is checked: the trainer imports JAX, Orbax and grain.
    import jax

    from ..framework.train import train

    interruptible()
    if group is None and (count := jax.process_count()) > 1:
        raise UserError(
            f"JAX sees {count} processes. Set {cluster.ADDRESS}, {cluster.COUNT} and {cluster.INDEX} in each."
        )
    try:
        result = train(config, options.workdir)
    except OSError as error:
        if errno.errorcode.get(error.errno or 0) not in _UNUSABLE:
            raise
        raise UserError(
            f"--workdir={options.workdir}: cannot be used ({error}). Use another folder, or free some space."
        ) from error
    _show_result(options, overrides, config, result)
    return 128 + signal.Signals[result["stopped"]] if result["stopped"] else 0


def _show_result(options: argparse.Namespace, overrides: Sequence[str], config: Any, result: dict[str, Any]) -> None:
    from ..framework.distributed.console import say

    workdir = options.workdir
    say(f"\nResults: {workdir} (result.json, metrics.jsonl, config.json, checkpoints/, TensorBoard events)")
    if result["stopped"]:
        say(f"Stopped by {result['stopped']} after step {result['steps']}. Rerun the same command to resume.")
    else:
        python = os.path.relpath(sys.executable)
        shampax = f"{'python' if python.startswith('..') else python} -m shampax"
        say(f"Draw it: {shampax} report {workdir}")
        if words := baseline(options.config, [*overrides, *options.change], config, workdir):
            say(f"A baseline at a rate of its own: {shampax} {words}")


def baseline(spec: str, changes: Sequence[str], config: Any, workdir: str) -> str:
    """Return the verb and flags that train a fair baseline from scratch, "" for a run that is one.

    It is the shipped one whose rate has been tuned, or else a sweep of AdamW's rate. Changes of the optimizer, of its
    rate and of the checkpoint to resume are the run's own and stay out.
    """
    if config.optimizer.name.startswith(base.ADAMW.partition(":")[0]):
        return ""
    own = ("optimizer.", "schedule.learning_rate=", "resume_from=")
    kept = [f"--config.{each}" for each in changes if "=" in each and not each.startswith(own)]
    tuned = files.baseline_of(spec)
    if tuned:
        return shlex.join(["train", f"--config={tuned}", *kept, f"--workdir={workdir}_{tuned.partition(':')[2]}"])
    rates = ["--over", "schedule.learning_rate=3e-4,1e-3,3e-3,1e-2"]
    adamw = f"--config.optimizer.name={base.ADAMW}"
    return shlex.join(["sweep", f"--config={spec}", *kept, adamw, f"--workdir={workdir}_adamw", *rates])


def explain(error: BaseException) -> tuple[int, str] | None:
    """Return the exit code and the last words for an error that needs no traceback, else None."""
    known = flags.explain(error)
    if known is None:
        return None
    code, words = known
    if isinstance(error, KeyboardInterrupt):
        words = "interrupted. Rerun the same command to resume from the latest checkpoint."
    if isinstance(error.__cause__, RuntimeError):  # a bug, not the user's input: whoever fixes it needs its place
        words = "".join(traceback.format_exception(error.__cause__)) + words
    return code, words


if __name__ == "__main__":
    sys.exit(main())
