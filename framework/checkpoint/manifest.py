"""What describes the arrays of a checkpoint: the parameters by path, the mesh, and the optimizer's own words."""

import dataclasses
from collections.abc import Mapping
from typing import Any

FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A parameter: its shape, the name of its dtype, and how the optimizer treats it."""

    shape: tuple[int, ...]
    dtype: str
    treatment: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What describes the arrays of a checkpoint.

    Attributes:
      mesh: axis -> devices, of the run that has saved it.
      processes: of that run.
      parameters: by path.
      optimizer: its name, as the config has it.
      state: what the optimizer says of its state, as JSON.
    """

    mesh: dict[str, int]
    processes: int
    parameters: dict[str, Parameter]
    optimizer: str
    state: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """As plain dicts and lists."""
        content = dataclasses.asdict(self)
        for parameter in content["parameters"].values():
            parameter["shape"] = list(parameter["shape"])
        return {"format": FORMAT, **content}

    @classmethod
    def from_json(cls, content: Any) -> "Manifest":
        """The inverse of `to_json`; what the optimizer says of its state is left for others to judge.

        Raises:
          ValueError: it is no manifest.
        """
        content = _dict(content, "it")
        if content.get("format") != FORMAT:
            raise ValueError(f"it has the format {content.get('format')!r:.50}, this version reads {FORMAT}")
        for field in dataclasses.fields(cls):
            if field.name not in content:
                raise ValueError(f"it has no {field.name}")
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
        raise ValueError(f"{path} has no {missing[0]}")
    shape = entry["shape"]
    if not isinstance(shape, list) or any(type(length) is not int or length < 0 for length in shape):
        raise ValueError(f"{path} has the shape {shape!r:.50}")
    return Parameter(tuple(shape), _text(entry["dtype"]), _text(entry["treatment"]))


def _dict(content: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(content, Mapping):
        raise ValueError(f"{name} is {content!r:.50} where a JSON object is expected")
    return content


def _whole(value: Any, name: str) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(f"{name} is {value!r:.50}, where a whole number from 1 on is expected")
    return value


def _text(value: Any) -> str:
    # Texts of a manifest are shown to people, and a terminal acts on what cannot be printed.
    if not isinstance(value, str) or not value.isprintable():
        raise ValueError(f"{value!r:.50} where a text is expected")
    return value
