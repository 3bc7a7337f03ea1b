import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("launch", "configs", "framework", "models", "optimizers", "benchmarks")
# A config file is Python, and the parts it chooses are named by import string: these two run code of the user's. The
# front door imports by names of its own.
RUNS_CONFIG_FILES = {"framework/config/files.py"}
IMPORTS_BY_NAME = RUNS_CONFIG_FILES | {"framework/config/components.py", "__init__.py"}
EXECUTING_MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "code", "runpy"}
EXECUTING_CALLS = {"eval", "exec", "compile", "__import__"}


def faults(source, name):
    """Line and text of everything in a module that may execute what it reads."""
    found = []

    def fault(node, allowed=frozenset()):
        if name not in allowed:
            found.append(f"{name}:{node.lineno}: {ast.unparse(node)}")

    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import) and {alias.name.partition(".")[0] for alias in node.names} & EXECUTING_MODULES:
            fault(node)
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in EXECUTING_MODULES:
            fault(node)
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if called in EXECUTING_CALLS or called.startswith(("pickle.", "marshal.")):
            fault(node)
        if called.endswith(".exec_module"):
            fault(node, RUNS_CONFIG_FILES)
        if called.endswith("import_module") and not isinstance(node.args[0], ast.Constant):
            fault(node, IMPORTS_BY_NAME)
        if keywords.get("allow_pickle", "False") != "False" or keywords.get("shell", "False") != "False":
            fault(node)
        if called in ("np.load", "numpy.load", "jnp.load") and "allow_pickle" not in keywords:
            fault(node)
    return found


def test_nothing_that_is_read_is_executed():
    """Fault: data, checkpoints or values of the command line that can run code; config files alone may."""
    modules = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")] + [ROOT / "__init__.py"]
    assert len(modules) > 50
    assert [line for path in modules for line in faults(path.read_text(), path.relative_to(ROOT).as_posix())] == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from cloudpickle import loads",
        "eval(text)",
        "exec(text)",
        "spec.loader.exec_module(module)",
        "importlib.import_module(name)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "np.save(path, x, allow_pickle=True)",
        "subprocess.run(text, shell=True)",
    ],
)
def test_the_search_finds_what_it_is_for(line):
    assert faults(line, "framework/x.py") == [f"framework/x.py:1: {line}"]
