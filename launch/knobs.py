"""List the knobs for --help: each as the flag that sets its value, with the comment beside it in the source.

The comments in `framework/config/schema.py` and in the dataclasses of components are the only documentation of a knob.
"""

import dataclasses
import inspect
import re
import shlex
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from ..configs import base
from ..framework.config.components import component, is_component, load_class

_COLUMN = 48  # where comments begin
_SPECIAL = frozenset('$`"\\!')  # to a shell, inside of double quotes
# A key or a field at the first indentation, and its comment: on the same line, or on the next after a parenthesis.
_DECLARED = re.compile(r"^    (?:config\.)?([\w.]+)(?::| =).*?(?:  |\(\n +)# (.*)$", re.MULTILINE)


class Knob(NamedTuple):
    """A knob: its key, its value in a config, whether this is not its default, and what it does."""

    key: str
    value: Any
    changed: bool
    reason: str

    @property
    def flag(self) -> str:
        """The flag that sets the value, as a shell reads it."""
        text = self.value if isinstance(self.value, str) and self.value.isprintable() else repr(self.value)
        readable = "'" in text and not _SPECIAL.intersection(text)
        quoted = f'"{text}"' if readable else shlex.quote(text)
        return f"--config.{self.key}={quoted}"


def table(config: Any, words: Sequence[str] = ()) -> str:
    """Return the knobs by section; a star marks values that are not the default.

    Knobs of components are included where these are chosen. With `words`, only knobs whose line holds all of them.
    """
    lines, section = [], None
    for knob in knobs(config):
        if not all(word.lower() in f"{knob.key} {knob.reason}".lower() for word in words):
            continue
        above = knob.key.rpartition(".")[0]
        if above != section:
            lines += [""] * bool(lines) + [above or "run"]
            section = above
        lines += _lines(f"{'*' if knob.changed else ' '} {knob.flag}", knob.reason)
    return "\n".join(lines)


def knobs(config: Any) -> Iterator[Knob]:
    """Yield every knob of a config: those of the run, then those of each section."""
    defaults = base.get_config()
    reason_of = reasons(base.get_config)
    for key in sorted(reason_of, key=lambda key: "." in key or is_component(_at(config, key))):
        value, reason = _at(config, key), reason_of[key]
        if not is_component(value):
            yield Knob(key, value, value != _at(defaults, key), reason)
            continue
        yield Knob(f"{key}.name", value.name, bool(value.name), reason)
        if value.name:
            cls, plain = load_class(value.name), component(value.name)
            fields = [field.name for field in dataclasses.fields(cls) if field.init]
            explained = {name: text for part in reversed(cls.__mro__[:-1]) for name, text in reasons(part).items()}
            for field in fields:
                yield Knob(f"{key}.{field}", value[field], value[field] != plain[field], explained.get(field, ""))


def reasons(declaration: Any) -> dict[str, str]:
    """Return the comment beside each `config.KEY = ...` of a function, or beside each field of a class, by key."""
    return dict(_DECLARED.findall(inspect.getsource(declaration)))


def _at(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = config[part]
    return config


def _lines(start: str, reason: str) -> list[str]:
    width = max(shutil.get_terminal_size().columns, _COLUMN + 44)
    wrapped = textwrap.wrap(reason, width, initial_indent=" " * _COLUMN, subsequent_indent=" " * _COLUMN)
    if wrapped and len(start) <= _COLUMN - 2:
        return [start.ljust(_COLUMN) + wrapped[0].lstrip(), *wrapped[1:]]
    return [start, *wrapped]
