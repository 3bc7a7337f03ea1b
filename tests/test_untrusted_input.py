import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("launch", "configs", "framework", "models", "optimizers", "benchmarks")
# A config file is Python and names its components and trackers by import string, so these modules run code of the
# user. The package's __init__ and the command import by name, but only names of their own.
TRACKER = "framework/reporting/trackers/__main__.py"
RUNS_CONFIG_FILES = {"framework/config/files.py"}
IMPORTS_BY_NAME = RUNS_CONFIG_FILES | {"framework/config/components.py", "__init__.py", "launch/main.py", TRACKER}
EXECUTING_MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "code", "runpy"}
EXECUTING_CALLS = {"eval", "exec", "compile", "__import__"}


def faults(source, name):
    """Return line and text of everything in a module that may execute its input."""
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
        if called in EXECUTING_CALLS or called.endswith(".exec_module"):
            fault(node, RUNS_CONFIG_FILES)
        if called.startswith(("pickle.", "marshal.")):
            fault(node)
        if called.endswith("import_module") and not isinstance(node.args[0], ast.Constant):
            fault(node, IMPORTS_BY_NAME)
        if keywords.get("allow_pickle", "False") != "False" or keywords.get("shell", "False") != "False":
            fault(node)
        if called in ("np.load", "numpy.load", "jnp.load") and "allow_pickle" not in keywords:
            fault(node)
    return found


def test_no_input_but_config_files_is_executed():
    """Fault: data, checkpoints or command-line values can run code."""
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
def test_the_search_finds_every_kind_of_execution(line):
    assert faults(line, "framework/x.py") == [f"framework/x.py:1: {line}"]
