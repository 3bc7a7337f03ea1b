"""The flags of a training command: --config, --workdir, one --config.KEY for every knob, and a short form of one."""

import dataclasses
from collections.abc import Sequence

from ..framework.errors import UserError

_EXAMPLES = {"--config": "--config=shampax/configs/lm.py:sample", "--workdir": "--workdir=runs/quickstart"}
_KNOWN = "there are --config, --workdir, --config.KEY, --profile_steps and --help"
_SHORT = {"--profile_steps": "--config.profile_steps"}


@dataclasses.dataclass(frozen=True)
class Command:
    """A command line, read.

    Attributes:
      config: the file and variant, "" where --help needs none.
      workdir: where the run lives, "" where --help needs none.
      overrides: "key=value", in the order given.
      help: whether --help is among the flags.
    """

    config: str
    workdir: str
    overrides: tuple[str, ...]
    help: bool


def parse(arguments: Sequence[str]) -> Command:
    """Read the flags; `--flag=value` and `--flag value` are the same.

    Raises:
      UserError: a flag is unknown, missing, given twice or without a value.
    """
    given: dict[str, str] = {}
    overrides = []
    wants_help = False
    rest = iter(arguments)
    for argument in rest:
        if argument in ("--help", "-h"):
            wants_help = True
            continue
        flag, equals, value = argument.partition("=")
        flag = _SHORT.get(flag, flag)
        if flag not in _EXAMPLES and not flag.startswith("--config."):
            raise UserError(f"unknown flag {flag!r}; {_KNOWN}")
        if not equals:
            value = next(rest, "--")
        if value.startswith("--") or (flag in _EXAMPLES and not value):
            raise UserError(f"{flag} has no value; write {_EXAMPLES.get(flag, f'{flag}=VALUE')}")
        if flag.startswith("--config."):
            overrides.append(f"{flag.removeprefix('--config.')}={value}")
        elif flag in given:
            raise UserError(f"{flag} is given twice: {given[flag]!r} and {value!r}; leave one")
        else:
            given[flag] = value
    for flag, example in _EXAMPLES.items():
        if flag not in given and not wants_help:
            raise UserError(f"{flag} is missing; add for example {example}")
    return Command(given.get("--config", ""), given.get("--workdir", ""), tuple(overrides), wants_help)
