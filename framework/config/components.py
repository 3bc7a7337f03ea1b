"""Select task, data and optimizer of a run by import string.

A component is a frozen dataclass "package.module:Class". Its section of the config has the key `name`, which is that
string, and one key per field, with the defaults and types that the class declares.
"""

import dataclasses
import importlib
import inspect
import re
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict, FieldReference

from ..base import values
from ..base.errors import UserError, did_you_mean

_ROOT = Path(__file__).resolve().parents[2]
_PACKAGE = __name__.partition(".")[0]
# Section of the config -> methods of its class, with the arguments that the trainer gives them ("key=": by name). The
# contracts in framework/task.py, framework/dataset.py and framework/optimizer.py describe them.
CONTRACTS: dict[str, dict[str, tuple[str, ...]]] = {
    "task": {
        "init": ("key", "batch_spec"),
        "loss": ("variables", "batch", "key=", "train="),
        "logical_axes": ("variables",),
        "flops": ("batch_spec",),
    },
    "data": {"prepare": ("cache",), "examples": ("split", "cache")},
    "optimizer": {"build": ("learning_rate", "mesh=", "axis_names=", "param_specs=")},
}
_IMPORT_STRING = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def component(name: str, **fields: Any) -> Any:
    """Return the locked ConfigDict section of a component; `fields` replace defaults of its class.

    A field may be a reference into another section (`section.get_ref("vocab_size")`), so that one override changes
    both. A field that has no default and is not given is None until it is set; `build` refuses it.

    Args:
      name: import string of a dataclass, "shampax.models.lm:LMTask".
      **fields: values of its fields.

    Raises:
      UserError: the class cannot be imported or is not a dataclass, or a field is unknown or has the wrong type.
    """
    hints = field_types(name)
    _refuse_unknown(name, fields, hints)
    section = ConfigDict({"name": name})
    for field in dataclasses.fields(load_class(name)):
        if field.init:
            value = fields.get(field.name, _default(field))
            plain = value.get() if isinstance(value, FieldReference) else value
            converted = None if plain is None else _convert(name, field.name, plain, hints[field.name])
            section[field.name] = converted if plain is value else value
    return section.lock()


def build(section: Any) -> Any:
    """Return the dataclass instance that a component's section describes.

    Raises:
      UserError: the section has no name or other fields than the class, or the class refuses a value.
    """
    if not section.name:
        raise UserError("name is empty. Set the section with base.component('package.module:Class', ...).")
    hints = field_types(section.name)
    _refuse_unknown(section.name, section, hints)
    given = {field: _convert(section.name, field, section[field], hint) for field, hint in hints.items()}
    try:
        return load_class(section.name)(**given)
    except (ValueError, ArithmeticError) as error:  # ArithmeticError: the class computes from a value that is too large
        raise UserError(f"{section.name}: {error}") from error


def build_all(config: Any) -> tuple[Any, Any, Any]:
    """Return the task, the data set and the optimizer's options of a config.

    Raises:
      UserError: as `build`, or a class does not have the methods of its contract.
    """
    task, data, optimizer = (fitting(key, build(config[key])) for key in CONTRACTS)
    return task, data, optimizer


def fitting(key: str, built: Any) -> Any:
    """Return a component, after a check that it has the methods of a section's contract.

    Raises:
      UserError: it lacks one.
    """
    for method, arguments in CONTRACTS[key].items():
        by_name = {name.removesuffix("="): None for name in arguments if name.endswith("=")}
        try:
            inspect.signature(getattr(built, method)).bind(*arguments[: len(arguments) - len(by_name)], **by_name)
        except (AttributeError, TypeError):
            raise UserError(
                f"config.{key}.name={_import_string(type(built))}: has no method {method}({', '.join(arguments)}). Add "
                "it to the class, or name another class."
            ) from None
    return built


def known(key: str) -> list[str]:
    """Return the import strings of this package's classes for a section of the config."""
    text = "".join(path.read_text() for path in (_ROOT / "configs").glob("*.py"))
    modules = map(importlib.import_module, sorted(set(re.findall(rf"\b{_PACKAGE}\.[\w.]+(?=:[A-Z])", text))))
    classes = (cls for module in modules for cls in vars(module).values() if dataclasses.is_dataclass(cls))
    whole = (cls for cls in classes if not inspect.isabstract(cls))
    return sorted({_import_string(cls) for cls in whole if all(hasattr(cls, name) for name in CONTRACTS[key])})


def _import_string(cls: Any) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"


def is_component(section: Any) -> bool:
    """Return whether part of a config is the section of a component: only these have a `name`."""
    return isinstance(section, ConfigDict) and "name" in section


def load_class(name: str) -> type:
    """Import the dataclass of an import string, or raise UserError that says which half is wrong."""
    if not isinstance(name, str) or not _IMPORT_STRING.fullmatch(name):
        raise UserError(f"{name!r} is not an import string. Write 'package.module:Class'.")
    module_name, _, class_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a user's module may raise anything
        raise UserError(f"cannot import {name!r}: {type(error).__name__}: {error}") from error
    found = {key: cls for key, cls in vars(module).items() if isinstance(cls, type) and dataclasses.is_dataclass(cls)}
    if class_name not in found:
        raise UserError(f"{module_name} has no dataclass {class_name!r}{did_you_mean(class_name, found)}")
    return found[class_name]


def field_types(name: str) -> dict[str, Any]:
    """Return the type annotation of every field of a component, in the order of declaration.

    Raises:
      UserError: the component cannot be imported, an annotation is invalid, or a field is called `name`.
    """
    cls = load_class(name)
    try:
        hints = typing.get_type_hints(cls)
    except NameError as error:
        raise UserError(f"{name}: cannot read the type of a field: {error}") from error
    fields = [field.name for field in dataclasses.fields(cls) if field.init]
    if "name" in fields:
        raise UserError(f"{name} has a field 'name', which its section needs for the import string. Rename the field.")
    return {field: hints[field] for field in fields}


def _refuse_unknown(name: str, fields: Iterable[str], known: Iterable[str]) -> None:
    for field in fields:
        if field != "name" and field not in known:
            raise UserError(f"{name} has no field {field!r}{did_you_mean(field, known)}")


def _default(field: dataclasses.Field) -> Any:
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return None if value is dataclasses.MISSING else value


def _convert(component_name: str, field: str, value: Any, hint: Any) -> Any:
    try:
        return values.convert(value, hint)
    except TypeError:
        given = f"{component_name}.{field}" + (" is missing" if value is None else f"={value!r}")
        raise UserError(f"{given}: expected {values.describe(hint)}.") from None
