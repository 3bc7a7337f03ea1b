"""The trackers that a config names, and what they are told of a run."""

import json
import uuid
from typing import Any

from ml_collections import ConfigDict

from ...base import paths
from ...base import workdir as layout
from ...base.errors import UserError, did_you_mean, told
from ...base.paths import Path
from ...config import components, overrides
from ...config.check import to_json
from ...distributed import console
from .tracker import TrackedRun

_SHIPPED = {name.lower(): f"{__package__}.{name.lower()}:{name}" for name in ("TensorBoard", "Wandb", "MLflow", "Aim")}


def chosen(config: Any) -> dict[str, Any]:
    """Return the trackers of `config.trackers` by name, each as the section of a component.

    Raises:
      UserError: a tracker or one of its options does not exist.
    """
    given: dict[str, dict[str, str]] = {}
    for each in config.trackers:
        name, dot, option = each.partition(".")
        knob, equals, value = option.partition("=")
        if dot and not equals:
            raise UserError(f"config.trackers: {each!r} is not of the form name or name.option=value.")
        given.setdefault(name, {}).update({knob: value} if dot else {})
    return {name: _section(name, options) for name, options in given.items()}


def _section(name: str, options: dict[str, str]) -> Any:
    where = options.pop("name", None) or _SHIPPED.get(name)
    if where is None:
        raise UserError(
            f"config.trackers: no tracker is called {name!r}{did_you_mean(name, _SHIPPED)} For one of your own, add "
            f"{name}.name=package.module:Class."
        )
    config = ConfigDict()
    with overrides.about(f"trackers: {name}"):
        config[name] = components.component(where)
        overrides.apply(config.lock(), [f"{name}.{option}={value}" for option, value in options.items()])
        components.build(config[name])
    return config[name]


def tracked(workdir: Path, config: Any) -> TrackedRun:
    """Return what trackers are told of a run. Its id is drawn once, and kept in the workdir."""
    path = workdir / layout.TRACKED
    try:
        id = paths.read_text(path).strip() if path.exists() else ""
        if not id:
            id = uuid.uuid4().hex[:12]
            paths.write_text(path, f"{id}\n")
    except paths.errors() as error:
        id = uuid.uuid4().hex[:12]
        console.say(f"warning: {path}: {told(error)}. When this run resumes, trackers will show another run.")
    return TrackedRun(id, workdir.name, str(workdir), json.loads(to_json(config)))
