"""Find and run config files; report errors in them with file and line.

A config file is Python with a function `get_config`. FILE.py:VARIANT passes the variant's name to the function; a file
with variants lists them in `VARIANTS`, a dict with their names as keys. In a shipped file, `BASELINES` has the tuned
baseline of a variant. With `TAKES_FOLDERS = True` a variant may also be another text, such as the path of a model.
"""

import importlib
import re
import sys
import traceback
import types
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from ..base import values
from ..base.errors import UserError, did_you_mean

_ROOT = Path(__file__).resolve().parents[2]
_PACKAGE = __name__.partition(".")[0]
_FORM = re.compile(r"(.+?\.py|[\w-]+)(?::(.*))?", re.DOTALL)
_RAISED_BY_USERS = (Exception, SystemExit)  # a config file may raise anything


def run(spec: str) -> ConfigDict:
    """Return the ConfigDict that `get_config` of a file returns.

    Args:
      spec: "lm:sample", short for the shipped "shampax/configs/lm.py:sample", or any other FILE.py[:VARIANT]. Shipped
        files are found from any directory.

    Raises:
      UserError: the file or variant does not exist, or the file fails. The message has file and line.
    """
    match = _FORM.fullmatch(spec)
    if match is None:
        raise UserError(f"--config={spec}: must be FILE.py, FILE.py:VARIANT or a shipped config, e.g. lm:sample.")
    name, variant = match.groups()
    path = name if name.endswith(".py") else _shipped_file(name)
    module = _load(path)
    known = tuple(getattr(module, "VARIANTS", ()))
    takes_more = getattr(module, "TAKES_FOLDERS", False)
    if known and variant is not None and variant not in known and not takes_more:
        raise UserError(f"{path} has no variant {variant!r}{did_you_mean(variant, known)}")
    try:
        config = module.get_config() if variant is None else module.get_config(variant)
    except _RAISED_BY_USERS as error:
        raise UserError(_explain(error, path, module.__file__)) from error
    if not isinstance(config, ConfigDict):
        raise UserError(f"{path}: get_config returned {type(config).__name__}. Return base.get_config(), changed.")
    return config


def baseline_of(spec: str) -> str | None:
    """Return the shipped config that is the tuned baseline of another one, None if there is no such config."""
    match = _FORM.fullmatch(spec)
    name, variant = match.groups() if match else ("", None)
    file = Path(name)
    if file.stem not in shipped() or (file.suffix and file.parent.name != "configs"):
        return None
    found = getattr(module_of(file.stem), "BASELINES", {}).get(variant or "sample")
    return f"{file.stem}:{found}" if found else None


def shipped() -> list[str]:
    """Return the names of the shipped configs, such as "lm"."""
    files = (_ROOT / "configs").glob("*.py")
    return sorted(file.stem for file in files if file.stem not in ("__init__", "base"))


def module_of(name: str) -> types.ModuleType:
    """Import a shipped config by its name."""
    return importlib.import_module(f"{_PACKAGE}.configs.{name}")


def _shipped_file(name: str) -> str:
    if name not in shipped():
        raise UserError(f"no shipped config {name!r}; a file of yours ends in .py{did_you_mean(name, shipped())}")
    return f"{_PACKAGE}/configs/{name}.py"


def _load(path: str) -> types.ModuleType:
    try:
        file = _find(path)
    except (OSError, ValueError) as error:  # the name is too long, or has a null character
        raise UserError(f"cannot read config file {path!r}: {error}") from None
    try:
        if file.parent == _ROOT / "configs":  # a module of the package, which may import relatively
            return module_of(file.stem)
        return _execute(file)
    except _RAISED_BY_USERS as error:
        raise UserError(_explain(error, path, str(file))) from error


def _find(path: str) -> Path:
    inside = path.removeprefix(f"{_PACKAGE}/")
    for candidate in (Path(path).expanduser(), _ROOT / inside if inside.startswith("configs/") else Path(path)):
        if candidate.is_file():
            return candidate.resolve()
    names = [f"{name}.py" for name in shipped()]
    raise UserError(
        f"no config file {path!r} in {Path.cwd()} or {_PACKAGE}/configs{did_you_mean(Path(path).name, names)}"
    )


def _execute(file: Path) -> types.ModuleType:
    """Run a file as a module, without reading or writing bytecode beside the user's file."""
    name = f"config_{re.sub(r'[^0-9A-Za-z_]', '_', file.stem)}"
    module = types.ModuleType(name)
    module.__file__ = str(file)
    sys.modules[name] = module  # dataclasses defined in the file look up their annotations here
    exec(compile(file.read_bytes(), str(file), "exec"), vars(module))
    return module


def _explain(error: BaseException, path: str, file: str | None) -> str:
    if isinstance(error, SyntaxError) and error.filename == file:
        return f"{path}:{error.lineno}: {error.msg}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    where = f"{path}:{lines[-1]}" if lines else path
    reason = error if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    return f"{where}: {_misuse(error) or reason}"


def _misuse(error: BaseException) -> str | None:
    """Return a one-line message for an unknown key or a wrong type that ConfigDict found, or None.

    ConfigDict's own messages are paragraphs and lack the type and the known keys. The frame that raised the error knows
    the section, the key and the value.
    """
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    scope: dict[str, Any] = frame.f_locals
    section, key = scope.get("self"), scope.get("attribute", scope.get("key"))
    if not isinstance(section, ConfigDict) or not isinstance(key, str):
        return None
    if isinstance(error, (AttributeError, KeyError)) and key not in section:
        return f"unknown key {key!r}{did_you_mean(key, section.keys())}"
    if isinstance(error, TypeError) and "value" in scope:
        return f"{key}={scope['value']!r}: expected {values.describe(type(section[key]))}."
    return None
