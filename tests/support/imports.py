"""List the imports of a source tree, read from its syntax, including imports by string."""

import ast
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

PACKAGE = "shampax"
COMPONENT = re.compile(rf"{PACKAGE}(\.\w+)+:\w+")
IMPORTERS = {"importlib.import_module", "import_module", "__import__"}


class Import(NamedTuple):
    """One import of one module of the tree.

    Attributes:
      file: the importing file, relative to the root.
      target: the imported file, relative to the root.
      line: line number in `file`.
      kind: "import", or "string" for `import_module("...")` and component strings such as "shampax.models.lm:LMTask".
      deferred: whether it stands in a function.
    """

    file: str
    target: str
    line: int
    kind: str
    deferred: bool


def modules(root: Path, folders: Iterable[str]) -> list[str]:
    """Return the Python files of the folders and of the root itself, relative to the root."""
    files = [*root.glob("*.py"), *(path for folder in folders for path in (root / folder).rglob("*.py"))]
    return sorted(path.relative_to(root).as_posix() for path in files)


def imports(root: Path, files: Iterable[str]) -> list[Import]:
    """Return the imports between the files of a tree."""
    known = set(files)
    return [found for file in sorted(known) for found in _of_file(file, (root / file).read_text(), known)]


def _of_file(file: str, source: str, known: set[str]) -> Iterator[Import]:
    tree = ast.parse(source)
    docstrings = _docstrings(tree)
    deferred = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        for kind, name in _named(file, node, docstrings):
            target = _file_of(name, known)
            if target and target != file:
                yield Import(file, target, node.lineno, kind, id(node) in deferred)  # pyright: ignore


def _named(file: str, node: ast.AST, docstrings: set[int]) -> Iterator[tuple[str, str]]:
    """Yield (kind, dotted name) of everything that a node imports."""
    if isinstance(node, ast.Import):
        yield from (("import", alias.name) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = _absolute(file, "." * node.level + (node.module or ""))
        yield from (("import", f"{base}.{alias.name}") for alias in node.names)
    elif isinstance(node, ast.Call) and ast.unparse(node.func) in IMPORTERS:
        if node.args and isinstance(node.args[0], ast.Constant):
            yield "string", _absolute(file, str(node.args[0].value))
    elif isinstance(node, ast.Constant) and COMPONENT.fullmatch(str(node.value)) and id(node) not in docstrings:
        yield "string", str(node.value).replace(":", ".")


def _absolute(file: str, name: str) -> str:
    level = len(name) - len(name.lstrip("."))
    if not level:
        return name
    package = [PACKAGE, *Path(file).parts[:-1]]
    return ".".join([*package[: len(package) - level + 1], *filter(None, [name[level:]])])


def _file_of(name: str, known: set[str]) -> str | None:
    """Return the file of a module, or of the module that holds a name."""
    first, *parts = name.split(".")
    if first != PACKAGE:
        return None
    for end in range(len(parts), -1, -1):
        path = "/".join(parts[:end])
        for candidate in (f"{path}.py", f"{path}/__init__.py".lstrip("/")):
            if candidate in known:
                return candidate
    return None


def _docstrings(tree: ast.AST) -> set[int]:
    """Return the identities of the constants that are docstrings, of attributes too."""
    return {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }


def cycle(edges: Iterable[tuple[str, str]]) -> list[str]:
    """Return the nodes of one cycle of a directed graph, or []."""
    after: dict[str, list[str]] = {}
    for start, end in sorted(set(edges)):
        if start != end:
            after.setdefault(start, []).append(end)
    done: set[str] = set()

    def walk(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return []
        for following in after.get(node, ()):
            found = walk(following, [*path, node])
            if found:
                return found
        done.add(node)
        return []

    return next(filter(None, (walk(node, []) for node in after)), [])
