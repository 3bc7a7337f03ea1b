"""List the knobs for --help: each key, its value, and the comment beside it in the source.

The comments in `framework/config/schema.py` and in the dataclasses of components are the only documentation of a knob.
"""

import dataclasses
import inspect
import re
import shutil
import textwrap
from collections.abc import Iterator
from typing import Any

from ..configs import base
from ..framework.config.components import is_component, load_class

_WIDEST_VALUE = 32
# A key or a field at the first indentation, and its comment: on the same line, or on the next after a parenthesis.
_DECLARED = re.compile(r"^    (?:config\.)?([\w.]+)(?::| =).*?(?:  |\(\n +)# (.*)$", re.MULTILINE)


def table(config: Any) -> str:
    """Return one line per knob: key, value, comment. The knobs of components are included where these are chosen."""
    rows = [(f"--config.{key}", _short(value), reason) for key, value, reason in _rows(config)]
    keys, values = (max(len(row[column]) for row in rows) for column in (0, 1))
    width = max(shutil.get_terminal_size().columns, keys + values + 44)
    lines = []
    for key, value, reason in rows:
        start = f"  {key:<{keys}}  {value:<{values}}  "
        lines += textwrap.wrap(reason, width, initial_indent=start, subsequent_indent=" " * len(start)) or [start]
    return "\n".join(line.rstrip() for line in lines)


def reasons(declaration: Any) -> dict[str, str]:
    """Return the comment beside each `config.KEY = ...` of a function, or beside each field of a class, by key."""
    return dict(_DECLARED.findall(inspect.getsource(declaration)))


def _rows(config: Any) -> Iterator[tuple[str, Any, str]]:
    for key, reason in reasons(base.get_config).items():
        section, _, last = key.rpartition(".")
        value = (config[section] if section else config)[last]
        if not is_component(value):
            yield key, value, reason
            continue
        yield f"{key}.name", value.name, reason
        if value.name:
            cls = load_class(value.name)
            fields = [field.name for field in dataclasses.fields(cls) if field.init]
            explained = {name: text for part in reversed(cls.__mro__[:-1]) for name, text in reasons(part).items()}
            yield from ((f"{key}.{field}", value[field], explained.get(field, "")) for field in fields)


def _short(value: Any) -> str:
    text = value if isinstance(value, str) and value.isprintable() and value else repr(value)
    return text if len(text) <= _WIDEST_VALUE else f"{text[: _WIDEST_VALUE - 3]}..."
