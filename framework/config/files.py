"""Config files: finding one, running it, and saying in one line what is wrong with it and where.

A config file is Python with a function `get_config`. Written as FILE.py:VARIANT, the function gets the variant's name;
a file that has variants lists them in `VARIANTS`, a dict from name to anything.
"""

import importlib
import importlib.machinery
import importlib.util
import inspect
import re
import sys
import traceback
import types
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from ..base import values
from ..base.errors import UserError
from .components import did_you_mean

_ROOT = Path(__file__).resolve().parents[2]
_PACKAGE = __name__.partition(".")[0]
_FORM = re.compile(r"(?P<path>.+?\.py)(:(?P<variant>.*))?", re.DOTALL)


def run(spec: str) -> ConfigDict:
    """What `get_config` of a file returns.

    Args:
      spec: "shampax/configs/lm.py:sample" or "configs/lm.py:sample" from any directory, or any other FILE.py[:VARIANT].

    Raises:
      UserError: no such file or variant, or the file fails; the message has file and line.
    """
    path, variant = _parse(spec)
    module = _load(path)
    get_config = getattr(module, "get_config", None)
    if not callable(get_config):
        raise UserError(f"{path} defines no function get_config")
    known = ", ".join(getattr(module, "VARIANTS", ())) or "it has none"
    arguments = () if variant is None else (variant,)
    try:
        inspect.signature(get_config).bind(*arguments)
    except TypeError:
        wrong = "needs a variant" if variant is None else f"takes no variant, given {variant!r}"
        raise UserError(f"{path} {wrong}; variants: {known}") from None
    if variant is not None and variant not in getattr(module, "VARIANTS", (variant,)):
        raise UserError(f"{path} has no variant {variant!r}{did_you_mean(variant, module.VARIANTS)}")
    try:
        config = get_config(*arguments)
    except (Exception, SystemExit) as error:  # whatever the user's code raises is an error in the file
        raise UserError(_explain(error, path, module.__file__)) from error
    if not isinstance(config, ConfigDict):
        raise UserError(f"{path}: get_config returned {type(config).__name__}, not the ConfigDict of base.get_config()")
    return config


def variants(spec: str) -> tuple[str, ...]:
    """Names of the variants that the file of a spec lists.

    Raises:
      UserError: no such file, or it fails.
    """
    return tuple(getattr(_load(_parse(spec)[0]), "VARIANTS", ()))


def _parse(spec: str) -> tuple[str, str | None]:
    match = _FORM.fullmatch(spec)
    if match is None:
        raise UserError(f"config {spec!r} is no FILE.py or FILE.py:VARIANT, such as shampax/configs/lm.py:sample")
    return match["path"], match["variant"]


def _load(path: str) -> types.ModuleType:
    try:
        file = _find(path)
    except (OSError, ValueError) as error:  # a name too long for a file, or with a null character
        raise UserError(f"config file {path!r} cannot be read: {error}") from None
    try:
        if file.parent == _ROOT / "configs":
            # As a module of the package, so that it may import relatively from wherever it is run.
            return importlib.import_module(f"{_PACKAGE}.configs.{file.stem}")
        return _execute(file)
    except (Exception, SystemExit) as error:  # whatever the user's code raises is an error in the file
        raise UserError(_explain(error, path, str(file))) from error


def _find(path: str) -> Path:
    shipped = path.removeprefix(f"{_PACKAGE}/")
    for candidate in (Path(path).expanduser(), _ROOT / shipped if shipped.startswith("configs/") else Path(path)):
        if candidate.is_file():
            return candidate.resolve()
    names = sorted(file.name for file in (_ROOT / "configs").glob("*.py") if file.stem not in ("__init__", "base"))
    close = did_you_mean(Path(path).name, names)
    raise UserError(f"no config file {path!r} in {Path.cwd()} or among those in {_PACKAGE}/configs{close}")


def _execute(file: Path) -> types.ModuleType:
    name = f"config_{re.sub(r'[^0-9A-Za-z_]', '_', file.stem)}"
    loader = _FromSource(name, str(file))
    module_spec = importlib.util.spec_from_file_location(name, file, loader=loader)
    assert module_spec is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[name] = module  # where dataclasses defined in the file look for their annotations
    loader.exec_module(module)
    return module


class _FromSource(importlib.machinery.SourceFileLoader):
    """Writes no bytecode beside the user's file, and takes none: a file written twice in a second has two contents."""

    def get_code(self, fullname: str) -> types.CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)


def _explain(error: BaseException, path: str, file: str | None) -> str:
    if isinstance(error, SyntaxError) and error.filename == file:
        return f"{path}:{error.lineno}: {error.msg}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    where = f"{path}:{lines[-1]}" if lines else path
    return (
        f"{where}: {_misuse(error) or (error if isinstance(error, UserError) else f'{type(error).__name__}: {error}')}"
    )


def _misuse(error: BaseException) -> str | None:
    """What was wrong with a key, if ConfigDict raised the error.

    ConfigDict's messages are paragraphs of their own and name neither the type nor all keys, but the frame that
    raised the error knows the section, the key and the value.
    """
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    scope: dict[str, Any] = frame.f_locals
    section, key = scope.get("self"), scope.get("attribute", scope.get("key"))
    if not isinstance(section, ConfigDict) or not isinstance(key, str):
        return None
    if isinstance(error, (AttributeError, KeyError)) and key not in section:
        return f"unknown key {key!r}{did_you_mean(key, section.keys())}"
    if isinstance(error, TypeError) and "value" in scope:
        return f"key {key!r}: expected {values.describe(type(section[key]))}, given {scope['value']!r}"
    return None
