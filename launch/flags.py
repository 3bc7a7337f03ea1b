"""Parse the flags of a verb, and turn errors into exit codes."""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from ..framework.base.errors import TrainingStopped, UserError, printable


class Parser(argparse.ArgumentParser):
    """Parse a verb's flags, and `--config.KEY=VALUE` for every knob if there is --config or `knobs` is set.

    Errors raise UserError.
    """

    def __init__(self, verb: str, description: str | None, *, knobs: bool = False, **options: Any):
        self._knobs = knobs
        super().__init__(
            prog=f"shampax {verb}",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            **options,
        )

    def parse(self, arguments: Sequence[str] | None) -> tuple[argparse.Namespace, tuple[str, ...]]:
        """Return the flags, and the overrides of knobs as "KEY=VALUE" in the order given.

        Args:
          arguments: the command line; None takes that of this process.

        Raises:
          UserError: a flag is unknown, missing or without a value.
        """
        flags, overrides = [], []
        takes_knobs = self._knobs or any("--config" in action.option_strings for action in self._actions)
        rest = iter(sys.argv[1:] if arguments is None else arguments)
        for argument in rest:
            if not takes_knobs or not argument.startswith("--config."):
                flags.append(argument)
                continue
            flag, equals, value = argument.partition("=")
            if not equals:
                value = next(rest, "--")
            if value.startswith("--"):
                self.error(f"{flag}: the value is missing. Write {flag}=VALUE")
            overrides.append(f"{flag.removeprefix('--config.')}={value}")
        options = self.parse_args(flags)
        for name, value in vars(options).items():
            if value == "" != self.get_default(name):
                self.error(f"--{name}: the value is missing. Write --{name}=VALUE")
        return options, tuple(overrides)

    def error(self, message: str) -> NoReturn:
        """Raise UserError."""
        raise UserError(f"{message}. See --help.")


def explain(error: BaseException) -> tuple[int, str] | None:
    """Return the exit code and the last line for an error that needs no traceback, else None."""
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT, "interrupted"
    if isinstance(error, BrokenPipeError):  # the reader of the output has ended, as `head` does
        return 128 + signal.SIGPIPE, "the output was closed"
    if isinstance(error, UserError | TrainingStopped):
        return (2 if isinstance(error, UserError) else 1), printable(f"error: {' '.join(str(error).split())}")
    return None


def run(command: Callable[[], int], explain: Callable[[BaseException], tuple[int, str] | None] = explain) -> int:
    """Run a command and return its exit code. An error that `explain` knows ends in one line on stderr."""
    try:
        try:
            code = command()
        except SystemExit as end:  # argparse has printed the help, or an error
            code = int(end.code or 0)
        sys.stdout.flush()
        return code
    except BaseException as error:
        if (known := explain(error)) is None:
            raise
        code, words = known
        if isinstance(error, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it again at exit
        else:
            print(words, file=sys.stderr)
        return code
