"""Compare what the processes of a run are about to do.

JAX notices a difference only if the programs differ, by hanging, or never: with another learning rate in one process,
the parameters of its devices drift apart.
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

from ..base import paths
from ..config import check as config_lib
from ..config.overrides import flat

_ROOT = Path(__file__).resolve().parents[2]
_PACKAGE = __name__.partition(".")[0]
_LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")  # they make the steps and files
_SHOWN = 5


def identity(config: Any, workdir: str | Path) -> dict[str, str]:
    """Return what this process will do, by name: config, workdir, source files, versions of Python and of libraries.

    Args:
      config: a checked config, so that the modules of its components are imported.
      workdir: the workdir; a relative path is made absolute.
    """
    keys = flat(json.loads(config_lib.to_json(config)))
    return (
        {f"config.{key}": json.dumps(value) for key, value in keys}
        | {"--workdir": str(paths.of(workdir))}
        | {f"the code of {name}": hashlib.sha256(path.read_bytes()).hexdigest()[:8] for name, path in _sources(config)}
        | {f"the version of {library}": importlib.metadata.version(library) for library in _LIBRARIES}
        | {"the version of Python": platform.python_version()}
    )


def difference(identities: Mapping[int, Mapping[str, str]]) -> str | None:
    """Return one line that names the first process that differs from most others, and the difference, or None.

    Args:
      identities: the identities of all processes, by index.
    """
    alike = collections.defaultdict(list)
    for index in sorted(identities):
        alike[json.dumps(identities[index], sort_keys=True)].append(index)
    if len(alike) == 1:
        return None
    usual = max(alike.values(), key=len)[0]
    odd = min(index for group in alike.values() for index in group if usual not in group)
    mine, others = identities[odd], identities[usual]
    differing = [
        f"{name} ({mine.get(name, 'absent')}, and {others.get(name, 'absent')} in process {usual})"
        for name in sorted(mine.keys() | others.keys())
        if mine.get(name) != others.get(name)
    ]
    more = f" and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else ""
    return (
        f"process {odd} differs from process {usual} in {', '.join(differing[:_SHOWN])}{more}. Give all processes of a "
        "run the same config, workdir and code."
    )


def _sources(config: Any) -> Iterator[tuple[str, Path]]:
    # Only packages: a checkout may also contain environments and workdirs.
    for folder in (_ROOT, *sorted(package.parent for package in _ROOT.glob("*/__init__.py"))):
        for path in sorted(folder.glob("*.py") if folder == _ROOT else folder.rglob("*.py")):
            yield str(path.relative_to(_ROOT)), path
    for section in (config.task, config.data, config.optimizer):
        module = section.name.partition(":")[0]
        file = getattr(sys.modules.get(module), "__file__", None)
        if file and not module.startswith(f"{_PACKAGE}."):
            yield module, Path(file)
