"""The manifest of a checkpoint: it describes mesh, parameters by path, and the optimizer's state."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ..base.json_files import build

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
        if not isinstance(content, Mapping) or content.get("format") != FORMAT:
            found = content.get("format") if isinstance(content, Mapping) else content
            raise ValueError(f"format {found!r:.50}, this version reads {FORMAT}")
        found = build(cls, {key: value for key, value in content.items() if key != "format"}, "manifest")
        if not all(size > 0 for size in (found.processes, *found.mesh.values())):
            raise ValueError(f"processes {found.processes} and mesh {found.mesh} must be above 0")
        return found
