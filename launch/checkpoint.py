"""Look after checkpoints: `python -m shampax.launch.checkpoint VERB ...`; --help and VERB --help say how.

A PATH is a workdir, whose newest whole checkpoint is meant, or one checkpoint, WORKDIR/checkpoints/STEP. Nothing is
executed that a checkpoint holds, and no accelerator is touched: a run that is at work meanwhile keeps its own.

Exit codes: 0; 1, `verify` (or `list --verify`) has found a fault, or `diff` a difference; 2, something given cannot
work.
"""

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..framework.base.errors import UserError
from . import environment, flags


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the verb and return its exit code. `arguments` defaults to those of this process."""
    options = _parser().parse_args(sys.argv[1:] if arguments is None else arguments)
    environment.without_accelerator()
    return flags.run(lambda: options.verb(options))


# Each verb imports its modules when it runs, so that --help does not wait for JAX and Orbax.


def _list(options: argparse.Namespace) -> int:
    from ..framework.checkpoint import inspect

    text, intact = inspect.listing(options.workdir, verified=options.verify)
    _say(*text.split("\n"))
    return 0 if intact else 1


def _inspect(options: argparse.Namespace) -> int:
    from ..framework.checkpoint import inspect

    told = inspect.describe(inspect.read(_locate(options.path, intact=False)))
    text = json.dumps(told, indent=2) if options.json else inspect.as_text(told, arrays=options.arrays)
    _say(*text.split("\n"))
    return 0


def _verify(options: argparse.Namespace) -> int:
    from ..framework.checkpoint import inspect, store

    intact = True
    for given in options.paths:
        path = given.expanduser()
        for checkpoint in [path] if store.is_checkpoint(path) else store.in_workdir(path):
            faults = inspect.faults(checkpoint)
            intact = intact and not faults
            for fault in faults:
                _say(f"{checkpoint}: {fault}")
            if not faults:
                _say(f"{checkpoint}: intact")
    return 0 if intact else 1


def _diff(options: argparse.Namespace) -> int:
    from ..framework.checkpoint import diff, inspect

    sides = []
    for name, given in (("A", options.a), ("B", options.b)):
        path = _locate(given, intact=True)
        found = inspect.read(path)
        mesh = ", ".join(f"{axis} {size}" for axis, size in found.manifest.mesh.items())
        _say(f"{name}: {path}, step {found.record.step}, mesh {mesh}, {found.manifest.optimizer}")
        sides.append(found)
    counts = {"equal": 0, "different": 0, "only in A": 0, "only in B": 0}
    for finding in diff.compare(*sides):
        verdict = f"only in {finding.only_in}" if finding.only_in else "different" if finding.difference else "equal"
        counts[verdict] += 1
        if verdict != "equal" or options.all:
            _say(f"{finding.name}: {finding.difference or verdict}")
    _say(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    return 0 if counts["equal"] == sum(counts.values()) else 1


def _export(options: argparse.Namespace) -> int:
    from ..framework.checkpoint import inspect
    from ..framework.checkpoint.export import export

    path = _locate(options.path, intact=True)
    count, size = export(
        inspect.read(path),
        options.file.expanduser(),
        source=str(path),
        model_state=options.model_state,
        force=options.force,
    )
    _say(f"{options.file}: {count} arrays, {size:,} bytes, from {path}")
    return 0


def _prune(options: argparse.Namespace) -> int:
    from ..framework.checkpoint import ownership, saving, store, verify

    workdir = options.workdir.expanduser()
    store.in_workdir(workdir)
    # A dry run writes nothing, not even the lock.
    with contextlib.nullcontext() if options.dry_run else ownership.lock(workdir):
        pruning = saving.pruning(workdir, keep_last=options.keep_last, keep_best=options.keep_best)
        for path in pruning.kept:
            _say(f"{path}: kept")
        for path, why in pruning.damaged:
            _say(f"{path}: left alone, it is damaged ({why})")
        would = "would be " if options.dry_run else ""
        try:
            sizes = {path: verify.size(path) for path in pruning.doomed}
            if not options.dry_run:
                saving.delete(sizes)
        except OSError as error:
            raise UserError(f"not all of {workdir} could be pruned ({error}); fix that and retry") from error
        for path, size in sizes.items():
            _say(f"{path}: {would}deleted, {size:,} bytes")
    _say(f"{len(sizes)} checkpoints, {sum(sizes.values()):,} bytes {would}freed")
    return 0


def _locate(given: Path, *, intact: bool) -> Path:
    from ..framework.checkpoint import store

    path, damaged = store.locate(given, intact=intact)
    for other, why in damaged:
        print(flags.printable(f"warning: checkpoint {other} is damaged ({why}); using {path}"), file=sys.stderr)
    return path


def _say(*lines: str) -> None:
    print(*map(flags.printable, lines), sep="\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m shampax.launch.checkpoint",
        description="Look after the checkpoints of training runs.",
        epilog="PATH is a workdir, whose newest whole checkpoint is meant, or one: WORKDIR/checkpoints/STEP.",
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    def verb(name: str, work: Callable[[argparse.Namespace], int], told: str) -> argparse.ArgumentParser:
        made = verbs.add_parser(name, help=told, description=f"{told[0].upper()}{told[1:]}.", epilog=parser.epilog)
        made.set_defaults(verb=work)
        return made

    made = verb("list", _list, "the checkpoints of a workdir, a line for each")
    made.add_argument("workdir", type=Path, metavar="WORKDIR", help="of a training run")
    made.add_argument("--verify", action="store_true", help="read every file and compare it with its checksum")

    made = verb("inspect", _inspect, "what a checkpoint holds: record, sizes, parameters, blocks")
    made.add_argument("path", type=Path, metavar="PATH", help="a workdir or a checkpoint")
    made.add_argument("--arrays", action="store_true", help="every array, too, with shape, dtype and bytes")
    made.add_argument("--json", action="store_true", help="all of it, arrays included, as one JSON object")

    made = verb(
        "verify", _verify, "compare every file with its checksum, and the parts of a checkpoint with each other"
    )
    made.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="a checkpoint, or a workdir: all it has")

    made = verb("diff", _diff, "compare the arrays of two checkpoints, blocks of the optimizer by parameter and block")
    made.add_argument("a", type=Path, metavar="A", help="a workdir or a checkpoint")
    made.add_argument("b", type=Path, metavar="B", help="another one")
    made.add_argument("--all", action="store_true", help="name what is equal, too")

    made = verb("export", _export, "write the parameters to a safetensors file, keys joined by dots")
    made.add_argument("path", type=Path, metavar="PATH", help="a workdir or a checkpoint")
    made.add_argument("file", type=Path, metavar="FILE.safetensors", help="to write; it is there whole or not at all")
    made.add_argument("--model_state", action="store_true", help="the other collections, too: COLLECTION.path")
    made.add_argument("--force", action="store_true", help="replace the file if it is there")

    made = verb("prune", _prune, "delete all checkpoints but the newest and the best whole ones")
    made.add_argument("workdir", type=Path, metavar="WORKDIR", help="of a run that is not at work")
    made.add_argument("--keep_last", type=_from(1), required=True, metavar="N", help="how many of the newest to keep")
    made.add_argument("--keep_best", type=_from(0), required=True, metavar="M", help="how many of the best to keep")
    made.add_argument("--dry_run", action="store_true", help="only say what would be deleted")
    return parser


def _from(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is less than {least}")
        return value

    return number


def _unraisable(unraisable: Any) -> None:
    # Where one array cannot be read, Orbax abandons those that it reads beside it, and as each of them ends TensorStore
    # raises this into nowhere: a page of tracebacks around the one line that tells what is wrong.
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


if __name__ == "__main__":
    sys.unraisablehook = _unraisable
    sys.exit(main())
