"""Parts that the command lines of benchmarks share: verbs, and a result as JSON or an error in one line."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..framework.base.errors import UserError

Verb = Callable[[argparse.Namespace], Any]


def report(run: Callable[[], Any]) -> int:
    """Print the result of `run` as JSON. Return the exit code: 0, 2 after a UserError, 130 after an interrupt."""
    try:
        result = run()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; rerun the same command to resume", file=sys.stderr)
        return 130
    print(json.dumps(result, indent=2))
    return 0


def learn_and_table(
    prog: str, description: str, learn: Verb, table: Verb, workdir: Path
) -> tuple[argparse.ArgumentParser, argparse.ArgumentParser, argparse.ArgumentParser]:
    """Return a parser with the verbs learn (train a config's missing runs) and table (report them), and theirs.

    Args:
      prog: the command.
      description: what it does.
      learn: what the first verb runs.
      table: what the second verb runs.
      workdir: default folder of the runs.
    """
    parser = argparse.ArgumentParser(prog=prog, description=description)
    verbs = parser.add_subparsers(required=True, metavar="learn|table")
    for name, function in (("learn", learn), ("table", table)):
        verb = verbs.add_parser(name)
        verb.set_defaults(run=function)
        verb.add_argument("--workdir", type=Path, default=workdir, metavar="DIR", help="%(default)s")
    verbs.choices["table"].add_argument("--markdown", type=Path, metavar="FILE")
    verb = verbs.choices["learn"]
    verb.add_argument("--config", default="shampax/configs/lm.py:bytes", metavar="FILE:VARIANT", help="%(default)s")
    verb.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="config values")
    return parser, verb, verbs.choices["table"]
