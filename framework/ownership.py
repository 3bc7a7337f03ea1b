"""A workdir belongs to one config, and its run is over once it holds a result: the files that say so."""

import json
import math
from pathlib import Path
from typing import Any

import jax

from . import config as config_lib
from . import workdir as layout
from .errors import UserError


def refuse_foreign(workdir: Path, config: Any) -> None:
    """Make sure that the workdir is new or belongs to this config.

    Raises:
      UserError: it belongs to another one; the message names the keys that differ.
    """
    stored = workdir / layout.CONFIG
    if not stored.exists():
        return
    changed = config_lib.differences(stored.read_text(errors="replace"), config, config.may_change)
    if changed:
        raise UserError(config_lib.foreign(workdir, changed))


def finished(workdir: Path) -> dict[str, Any] | None:
    """The result of a run that went to its end, or None."""
    result = layout.read_result(workdir)
    return result if result is not None and result["stopped"] is None else None


def claim(workdir: Path, config: Any) -> None:
    """Make the workdir and write the config into it; the result of an earlier, stopped run goes."""
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / layout.RESULT).unlink(missing_ok=True)
        _write(workdir / layout.CONFIG, config_lib.to_json(config))


def finish(workdir: Path, result: dict[str, Any]) -> dict[str, Any]:
    """Write the result and return what was written: numbers that are not finite become None."""
    result = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in result.items()
    }
    if jax.process_index() == 0:
        _write(workdir / layout.RESULT, json.dumps(result, indent=2) + "\n")
    return result


def _write(path: Path, content: str) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(content)
    partial.replace(path)
