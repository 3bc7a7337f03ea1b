"""The flags of a command: --config and one --config.KEY for every knob, --workdir, and what a command has besides."""

import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from ..framework.base.errors import UserError

_EXAMPLES = {"--config": "--config=shampax/configs/lm.py:sample", "--workdir": "--workdir=runs/quickstart"}
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
    given, overrides, wants_help = read(arguments, _EXAMPLES, _SHORT)
    for flag, example in _EXAMPLES.items():
        if flag not in given and not wants_help:
            raise UserError(f"{flag} is missing; add for example {example}")
    return Command(given.get("--config", ""), given.get("--workdir", ""), overrides, wants_help)


def read(
    arguments: Sequence[str], examples: Mapping[str, str], short: Mapping[str, str] = MappingProxyType({})
) -> tuple[dict[str, str], tuple[str, ...], bool]:
    """Values by flag, the overrides of knobs, and whether --help is among the flags.

    Args:
      arguments: of a command line.
      examples: the flags that there are, each as it may be given.
      short: other names of knobs.

    Raises:
      UserError: a flag is unknown, given twice or without a value.
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
        flag = short.get(flag, flag)
        if flag not in examples and not flag.startswith("--config."):
            known = ", ".join([*examples, "--config.KEY", *short])
            raise UserError(f"unknown flag {flag!r}; there are {known} and --help")
        if not equals:
            value = next(rest, "--")
        if value.startswith("--") or (flag in examples and not value):
            raise UserError(f"{flag} has no value; write {examples.get(flag, f'{flag}=VALUE')}")
        if flag.startswith("--config."):
            overrides.append(f"{flag.removeprefix('--config.')}={value}")
        elif flag in given:
            raise UserError(f"{flag} is given twice: {given[flag]!r} and {value!r}; leave one")
        else:
            given[flag] = value
    return given, tuple(overrides), wants_help
