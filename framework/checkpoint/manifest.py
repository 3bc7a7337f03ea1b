"""The manifest of a checkpoint: it describes mesh, parameters by path, and the optimizer's state."""

import dataclasses
from collections.abc import Mapping
from typing import Any

FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Parameter:
    """Shape, name of the dtype and treatment of a parameter."""

    shape: tuple[int, ...]
    dtype: str
    treatment: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Describes the arrays of a checkpoint.

    Attributes:
      mesh: axis -> devices, of the run that saved it.
      processes: number of processes of that run.
      parameters: path -> parameter.
      optimizer: its name in the config.
      state: the optimizer's description of its state, as JSON.
    """

    mesh: dict[str, int]
    processes: int
    parameters: dict[str, Parameter]
    optimizer: str
    state: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Return the manifest as plain dicts and lists."""
        content = dataclasses.asdict(self)
        for parameter in content["parameters"].values():
            parameter["shape"] = list(parameter["shape"])
        return {"format": FORMAT, **content}

    @classmethod
    def from_json(cls, content: Any) -> "Manifest":
        """Return the manifest that `to_json` has written. The optimizer's description is not checked.

        Raises:
          ValueError: the content is not a manifest.
        """
        content = _dict(content, "the manifest")
        if content.get("format") != FORMAT:
            raise ValueError(f"format {content.get('format')!r:.50}, this version reads {FORMAT}")
        for field in dataclasses.fields(cls):
            if field.name not in content:
                raise ValueError(f"{field.name} is missing")
        return cls(
            mesh={
                _text(axis): _whole(size, f"mesh axis {axis}") for axis, size in _dict(content["mesh"], "mesh").items()
            },
            processes=_whole(content["processes"], "processes"),
            parameters={
                _text(path): _parameter(path, entry)
                for path, entry in _dict(content["parameters"], "parameters").items()
            },
            optimizer=_text(content["optimizer"]),
            state=dict(_dict(content["state"], "state")),
        )


def _parameter(path: str, content: Any) -> Parameter:
    entry = _dict(content, path)
    if missing := [field for field in ("shape", "dtype", "treatment") if field not in entry]:
        raise ValueError(f"{path}: {missing[0]} is missing")
    shape = entry["shape"]
    if not isinstance(shape, list) or any(type(length) is not int or length < 0 for length in shape):
        raise ValueError(f"{path}: invalid shape {shape!r:.50}")
    return Parameter(tuple(shape), _text(entry["dtype"]), _text(entry["treatment"]))


def _dict(content: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(content, Mapping):
        raise ValueError(f"{name} must be a JSON object, not {content!r:.50}")
    return content


def _whole(value: Any, name: str) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(f"{name} must be an integer above 0, not {value!r:.50}")
    return value


def _text(value: Any) -> str:
    # Texts of a manifest are shown to people, and a terminal acts on control characters.
    if not isinstance(value, str) or not value.isprintable():
        raise ValueError(f"must be printable text, not {value!r:.50}")
    return value
