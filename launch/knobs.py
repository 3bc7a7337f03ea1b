"""List the knobs for --help: each key, its value, and the comment beside it in the source.

The comments in `framework/config/schema.py` and in the dataclasses of components are the only documentation of a knob.
"""

import ast
import dataclasses
import inspect
import io
import shutil
import textwrap
import tokenize
from collections.abc import Iterator
from typing import Any

from ..configs import base
from ..framework.config.components import is_component, load_class

_WIDEST_VALUE = 32


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
    source = textwrap.dedent(inspect.getsource(declaration))
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    found = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)
            reason = next((comments[line] for line in lines if line in comments), None)
            if reason:
                found[ast.unparse(target).removeprefix("config.")] = reason
    return found


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
