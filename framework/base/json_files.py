"""Read JSON files that a run has written, or that a user may have damaged."""

import json
from typing import Any

from . import paths
from .errors import UserError, told
from .paths import Path

_DEEPEST = 32  # levels of nesting; our files have far fewer, and readers that recurse can walk through so many


def read_object(path: Path) -> dict[str, Any] | None:
    """Return the object in a JSON file, or None if the file does not exist.

    Raises:
      UserError: the file cannot be read or holds something else.
    """
    if not path.is_file():
        return None
    try:
        content = parse_object(paths.read_text(path))
    except paths.errors() as error:
        raise UserError(f"{path} cannot be read ({told(error)}). Check its permissions.") from error
    if content is None:
        raise UserError(f"{path} is not a JSON object. Restore it or use another workdir.")
    return content


def parse_object(text: str) -> dict[str, Any] | None:
    """Return the JSON object in a text, or None if the text holds something else or is nested too deeply."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):  # not JSON, an integer of thousands of digits, or thousands of levels
        return None
    return content if isinstance(content, dict) and _is_shallow(content) else None


def is_number(value: Any) -> bool:
    """Return whether a value read from JSON is a number that fits a float64. Booleans are not numbers."""
    return isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63)


def _is_shallow(content: Any) -> bool:
    level = [content]
    for _ in range(_DEEPEST):
        level = [inner for outer in level for inner in (outer.values() if isinstance(outer, dict) else outer)]
        level = [inner for inner in level if isinstance(inner, (dict, list))]
        if not level:
            return True
    return False
