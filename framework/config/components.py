"""Parts of a run that a config selects by import string: its task, its data, its optimizer.

A component is a frozen dataclass named "package.module:Class". Its section of the config has the key `name`, that
string, and one key per field, with the defaults and types the class declares: nothing is declared twice.
"""

import dataclasses
import difflib
import importlib
import re
import typing
from collections.abc import Iterable
from typing import Any

from ml_collections import ConfigDict, FieldReference

from ..base import values
from ..base.errors import UserError

_IMPORT_STRING = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def component(name: str, **fields: Any) -> Any:
    """The locked ConfigDict section of a component, `fields` in place of the defaults of its class.

    A field may be a reference into another section (`section.get_ref("vocab_size")`): then one override moves both. A
    field without a default that is not given is None until it is set; `build` refuses it.

    Args:
      name: import string of a dataclass, "shampax.models.lm:LMTask".
      **fields: values of its fields.

    Raises:
      UserError: it cannot be imported, is no dataclass, lacks a given field, or a value has another type.
    """
    hints = field_types(name)
    section = ConfigDict({"name": name})
    for field, hint in hints.items():
        section[field] = _default(load_class(name), field, hint)
    for field, value in fields.items():
        if field not in hints:
            raise UserError(f"{name} has no field {field!r}{did_you_mean(field, hints)}")
        if isinstance(value, FieldReference):
            _convert(name, field, value.get(), hints[field])
        else:
            value = _convert(name, field, value, hints[field])
        with section.ignore_type():
            section[field] = value
    return section.lock()


def build(section: Any) -> Any:
    """The dataclass instance that a component's section describes.

    Raises:
      UserError: the section names no component, its fields are not those of the class, or the class rejects a value.
    """
    if not section.name:
        raise UserError("no component is chosen; set one by base.component('package.module:Class', ...)")
    hints = field_types(section.name)
    for field in section:
        if field != "name" and field not in hints:
            raise UserError(f"{section.name} has no field {field!r}{did_you_mean(field, hints)}")
    given = {field: _convert(section.name, field, section[field], hints[field]) for field in hints}
    try:
        return load_class(section.name)(**given)
    except (ValueError, ArithmeticError) as error:  # a value may be too large for what the class computes from it
        raise UserError(f"{section.name}: {error}") from error


def is_component(section: Any) -> bool:
    """Whether part of a config is the section of a component: only these have a `name`."""
    return isinstance(section, ConfigDict) and "name" in section


def load_class(name: str) -> type:
    """The dataclass with an import string.

    Raises:
      UserError: there is none; the message says which half of the string is at fault.
    """
    if not isinstance(name, str) or not _IMPORT_STRING.fullmatch(name):
        raise UserError(f"{name!r} is no import string; write 'package.module:Class'")
    module_name, _, class_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UserError(f"cannot import {name!r}: {error}; is it installed, or in this directory?") from error
    except Exception as error:  # the code of the user's module may raise anything
        raise UserError(f"cannot import {name!r}: {type(error).__name__}: {error}") from error
    found = getattr(module, class_name, None)
    if not isinstance(found, type) or not dataclasses.is_dataclass(found):
        others = [
            key for key, value in vars(module).items() if isinstance(value, type) and dataclasses.is_dataclass(value)
        ]
        raise UserError(f"{module_name} has no dataclass {class_name!r}{did_you_mean(class_name, others)}")
    return found


def field_types(name: str) -> dict[str, Any]:
    """Type annotation of every field of a component, in the order of declaration.

    Raises:
      UserError: there is no such component, or it cannot have a section: a field is called `name`, an annotation
        means nothing.
    """
    cls = load_class(name)
    try:
        hints = typing.get_type_hints(cls)
    except NameError as error:
        raise UserError(f"{name}: the type of a field cannot be read: {error}") from error
    fields = [field.name for field in dataclasses.fields(cls) if field.init]
    if "name" in fields:
        raise UserError(f"{name} has a field 'name', which in its section is the import string; rename the field")
    return {field: hints[field] for field in fields}


def did_you_mean(unknown: str, known: Iterable[str]) -> str:
    """The end of an error message: the known name nearest to an unknown one, or all of them where none is near."""
    names = list(known)
    close = difflib.get_close_matches(unknown, names, n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; there is {', '.join(names)}" if names else ""


def _default(cls: type, name: str, hint: Any) -> Any:
    field = next(field for field in dataclasses.fields(cls) if field.name == name)
    if field.default is not dataclasses.MISSING:
        value = field.default
    elif field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        return None
    return _convert(f"{cls.__module__}:{cls.__qualname__}", name, value, hint)


def _convert(component_name: str, field: str, value: Any, hint: Any) -> Any:
    try:
        return values.convert(value, hint)
    except TypeError:
        given = "nothing" if value is None else repr(value)
        message = f"{component_name}.{field}: expected {values.describe(hint)}, given {given}"
        raise UserError(message) from None
