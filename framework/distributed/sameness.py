"""What must be the same in all processes of a run, and in what they differ.

JAX would only find out when programs differ, by a hang, or not at all: a learning rate of its own in one process gives
its devices other parameters.
"""

import collections
import hashlib
import importlib.metadata
import json
import platform
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..config import check as config_lib
from ..config import overrides

_ROOT = Path(__file__).resolve().parents[2]
_PACKAGE = __name__.partition(".")[0]
_LIBRARIES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "numpy",
)  # what steps and files are made by
_SHOWN = 5


def identity(config: Any, workdir: str | Path) -> dict[str, str]:
    """What this process has been given to do, and what it does it with, by name.

    The config, each key for itself; the workdir; the sources of this package, each file for itself, and those of the
    modules of task, data and optimizer; the versions of Python and of the libraries.

    Args:
      config: checked, so that the modules of its components are there.
      workdir: as given; relative ones are made absolute.
    """
    keys = overrides.flat(json.loads(config_lib.to_json(config)))
    return (
        {f"config.{key}": json.dumps(value) for key, value in keys}
        | {"--workdir": str(Path(workdir).expanduser().absolute())}
        | {f"the code of {name}": _digest(path) for name, path in _sources(config)}
        | {f"the version of {library}": importlib.metadata.version(library) for library in _LIBRARIES}
        | {"the version of Python": platform.python_version()}
    )


def difference(identities: Mapping[int, Mapping[str, str]]) -> str | None:
    """Who differs from most others and in what, in one line; None where nobody does.

    Args:
      identities: of all processes, by index.
    """
    texts = {index: json.dumps(identities[index], sort_keys=True) for index in sorted(identities)}
    (most, count), *_ = collections.Counter(texts.values()).most_common(1)
    if count == len(texts):
        return None
    usual, *_ = (index for index, text in texts.items() if text == most)
    odd, *more = (index for index, text in texts.items() if text != most)
    mine, others = identities[odd], identities[usual]
    names = [name for name in sorted(mine.keys() | others.keys()) if mine.get(name) != others.get(name)]
    shown = ", ".join(
        f"{name} ({mine.get(name, 'absent')}, and {others.get(name, 'absent')} in process {usual})"
        for name in names[:_SHOWN]
    )
    return (
        f"process {odd} differs from process {usual} in {shown}"
        + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
        + (f"; so do processes {', '.join(map(str, more))}, or in something else" if more else "")
        + "; give all processes of a run the same config, workdir and code"
    )


def _sources(config: Any) -> Iterator[tuple[str, Path]]:
    # Only packages: in a checkout environments and runs lie beside them.
    for folder in (_ROOT, *sorted(package.parent for package in _ROOT.glob("*/__init__.py"))):
        for path in sorted(folder.glob("*.py") if folder == _ROOT else folder.rglob("*.py")):
            yield str(path.relative_to(_ROOT)), path
    for section in (config.task, config.data, config.optimizer):
        module = section.name.partition(":")[0]
        file = getattr(sys.modules.get(module), "__file__", None)
        if file and not module.startswith(f"{_PACKAGE}."):
            yield module, Path(file)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:8]
