"""Check the folders: they are small, imports point to lower floors and are at the top of a file."""

from pathlib import Path

import pytest
from imports import Import, cycle, imports, modules

ROOT = Path(__file__).resolve().parents[1]
PRODUCT = ("launch", "configs", "framework", "models", "optimizers", "benchmarks")
IMPORTS = imports(ROOT, modules(ROOT, PRODUCT))
LARGEST_FOLDER = 20

# Lowest floor first. A room imports only from lower floors; rooms of one floor do not import each other.
FLOORS = {
    "": (
        ("models", "optimizers"),
        ("framework",),
        ("configs",),
        ("launch",),
        ("benchmarks", "__init__.py", "__main__.py"),
    ),
    "framework": (
        ("base",),
        ("dataset.py",),
        ("task.py",),
        ("config",),
        ("distributed",),
        ("sharding",),
        ("optimizer.py",),
        ("step",),
        ("data",),
        ("generation",),
        ("checkpoint",),
        ("reporting",),
        ("planning",),
        ("setup.py",),
        ("loop.py",),
        ("hooks.py",),
        ("train.py",),
    ),
    "optimizers": (
        ("linalg", "promotion.py"),
        ("diagonal.py", "roots.py"),
        ("preconditioners",),
        ("options.py",),
        ("plan",),
        ("exchange.py",),
        ("refresh.py", "diagnostics.py"),
        ("host",),
        ("checkpoint",),
        ("state.py",),
        ("precondition.py",),
        ("shampoo.py",),
        ("baselines.py", "__init__.py"),
    ),
}
# Start of the importing file's name -> why it may import our own modules inside functions.
DEFERRED = {
    "launch/": "a verb answers --help and a wrong flag in less time than JAX takes to import",
}
# Start of the file's name -> why it may name a component in a string.
NAMES_COMPONENTS = {
    "configs/": "a config chooses its components",
    "benchmarks/": "a benchmark chooses its components",
    "launch/checkpoint.py": "the verb imports and exports the models of one task",
    "launch/trained.py": "Hugging Face folders are models of one task",
    "launch/generate.py": "the verb accepts only the workdirs of one task",
    "launch/translate.py": "the verb accepts only the workdirs of one task",
}


def room(file: str, folder: str) -> str | None:
    """Return the child of a folder that contains a file, or None."""
    inside = file.removeprefix(f"{folder}/") if folder else file
    return None if folder and inside == file else inside.partition("/")[0]


def upward(found: list[Import]) -> list[str]:
    """Return the imports that break FLOORS."""
    faults = []
    for folder, floors in FLOORS.items():
        level = {name: number for number, names in enumerate(floors) for name in names}
        for each in found:
            start, end = room(each.file, folder), room(each.target, folder)
            if start is None or end is None or start == end:
                continue
            if start not in level or end not in level or level[end] >= level[start]:
                faults.append(f"{each.file}:{each.line} imports {each.target}: {start} is not above {end}")
    return faults


def named_components(found: list[Import]) -> list[str]:
    """Return the imports by string in places that do not choose components."""
    return [
        f"{each.file}:{each.line} names {each.target} in a string"
        for each in found
        if each.kind == "string" and not each.file.startswith(tuple(NAMES_COMPONENTS))
    ]


def hidden(found: list[Import]) -> list[str]:
    """Return the imports of our own modules inside functions."""
    return [
        f"{each.file}:{each.line} imports {each.target} in a function"
        for each in found
        if each.deferred and each.kind == "import" and not each.file.startswith(tuple(DEFERRED))
    ]


def folder_cycles(found: list[Import]) -> list[str]:
    """Return for each folder a cycle between the files and folders in it, if there is one."""
    cycles = []
    for folder in ("", *sorted({str(parent) for each in found for parent in Path(each.file).parents} - {"."})):
        rooms = [(room(file, folder), room(target, folder)) for file, target, *_ in found]
        circle = cycle((start, end) for start, end in rooms if start and end and "__init__.py" not in (start, end))
        cycles += [f"{folder or '.'}: {' -> '.join(circle)}"] if circle else []
    return cycles


def test_folders_are_small():
    """Fault: a folder has too many modules to find one."""
    files = modules(ROOT, (*PRODUCT, "tests", "docs", "examples"))
    folders = [Path(file).parent.as_posix() for file in files if not file.endswith("__init__.py")]
    assert {"framework", "optimizers", "tests/support"} <= set(folders)
    assert {name: count for name in folders if (count := folders.count(name)) > LARGEST_FOLDER} == {}


def test_imports_point_to_lower_floors():
    """Fault: the trainer depends on a model or optimizer, or a folder on a higher one."""
    assert len(IMPORTS) > 400
    named = [f"{folder}/{name}" for folder, floors in FLOORS.items() for names in floors for name in names]
    assert [path for path in named if not (ROOT / path.lstrip("/")).exists()] == []
    assert upward(IMPORTS) == []


def test_there_is_no_cycle_between_modules():
    """Fault: two modules cannot be read, tested or imported separately."""
    assert cycle((each.file, each.target) for each in IMPORTS) == []


def test_there_is_no_cycle_between_folders():
    """Fault: two folders without an order depend on each other."""
    assert folder_cycles(IMPORTS) == []


def test_only_configs_name_components_in_strings():
    """Fault: an import by string hides that the trainer depends on a model or a config."""
    assert named_components(IMPORTS) == []


def test_own_modules_are_imported_at_the_top_of_a_file():
    """Fault: an import inside a function hides a cycle."""
    assert hidden(IMPORTS) == []


@pytest.mark.parametrize(
    ("line", "kind", "deferred"),
    [
        ("from ..b import c", "import", False),
        ("from ..b.c import D", "import", False),
        ("import shampax.b.c as d", "import", False),
        ("def f():\n    from ..b.c import D", "import", True),
        ("importlib.import_module('shampax.b.c')", "string", False),
        ("importlib.import_module('..b.c', __package__)", "string", False),
        ("__import__('shampax.b.c')", "string", False),
        ("TASK = 'shampax.b.c:D'", "string", False),
        ("'shampax.b.c:D'  # a docstring", None, False),
    ],
)
def test_every_form_of_import_is_found(tmp_path, line, kind, deferred):
    """Fault: the checks above overlook an import."""
    for name, text in {"a/x.py": line, "b/c.py": "", "b/__init__.py": ""}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    found = imports(tmp_path, modules(tmp_path, ("a", "b")))
    assert [(each.target, each.kind, each.deferred) for each in found] == ([("b/c.py", kind, deferred)] if kind else [])


def test_a_cycle_is_found():
    """Fault: the search for cycles stops at the first dead end."""
    assert cycle([("a", "b"), ("b", "c"), ("a", "d"), ("d", "e"), ("e", "a")]) == ["a", "d", "e", "a"]
    assert cycle([("a", "b"), ("b", "c"), ("a", "c")]) == []
