"""docs/new_model.md: its files are made and its commands run, by real processes in an empty folder."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "new_model.md").read_text()
FILES = dict(re.findall(r"^`([\w/]+\.py)`: .*?^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE))
SHELL = "".join(re.findall(r"^```sh\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)).replace("\\\n", "")
COMMANDS = [shlex.split(line) for line in SHELL.splitlines()]


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    """The folder, and (command, what it printed) in order."""
    folder = tmp_path_factory.mktemp("new_model")
    for name, text in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    environment = {name: value for name, value in os.environ.items() if name != "JAX_NUM_CPU_DEVICES"}
    environment["PYTHONPATH"] = str(ROOT.parent) if ROOT.name == "shampax" else ""
    printed = []
    for command in COMMANDS:
        assert command[0] == "python"
        done = subprocess.run(
            [sys.executable, *command[1:]], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, (command, done.stdout[-2000:], done.stderr[-3000:])
        printed.append((" ".join(command), done.stdout))
    return folder, printed


def test_the_page_shows_what_it_speaks_of():
    """Fault: a block that the walk leaves out because its heading has another form."""
    assert list(FILES) == ["waves/data.py", "waves/linen_model.py", "waves/nnx_model.py", "waves/config.py"]
    assert len(FILES) == PAGE.count("```python")
    assert len(COMMANDS) == 7


@pytest.mark.slow
def test_a_model_of_ones_own_is_planned(walked):
    """Fault: a plan that knows our own models only."""
    plan = next(out for command, out in walked[1] if "launch.plan" in command)
    for words in ("4 x cpu (data 4)", "statistics", "by the task's formula"):
        assert words in plan


@pytest.mark.slow
@pytest.mark.parametrize("library", ["linen", "nnx"])
def test_a_model_of_ones_own_trains_and_resumes(walked, library):
    """Fault: a page that has fallen behind the code, or a task from outside that the trainer cannot run."""
    folder, printed = walked
    result = json.loads((folder / "runs" / library / "result.json").read_text())
    again = json.loads((folder / "runs" / f"{library}_again" / "result.json").read_text())
    assert (result["steps"], result["devices"], result["skipped_steps"]) == (30, 2, 0)
    assert result["refreshes"] > 0
    assert result["heldout_loss"] < 1.1 and result["accuracy"] > 0.4  # guessing has 1.386 and 0.25
    assert again["heldout_loss"] == result["heldout_loss"]
    resumed = next(out for command, out in printed if f"runs/{library}_again " in command)
    assert re.search(r"continuing the run of resume_from .*/runs/\w+/checkpoints/20", resumed), resumed[:2000]
    compared = next(out for command, out in printed if "diff" in command and library in command)
    assert re.search(r"^\d\d+ equal, 0 different, 0 only in A, 0 only in B$", compared, re.MULTILINE), compared


@pytest.mark.slow
def test_both_libraries_make_the_same_model(walked):
    """Fault: an adapter under whose names parameters are treated otherwise, or that trains something else besides."""
    folder, _ = walked
    linen, nnx = (
        sorted((folder / "runs" / name / "parameters.txt").read_text().splitlines()) for name in ("linen", "nnx")
    )
    assert linen == nnx
