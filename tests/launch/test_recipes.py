"""Run the commands of docs/recipes.md, with fewer steps."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text()
COMMANDS = "".join(re.findall(r"^```sh\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)).replace("\\\n", "").splitlines()
# Of a twentieth of the steps, in one layer; the text is one that a user could have.
SMALL = ["--config.task.layers=1", "--config.evaluation.batches=1", "--config.data.max_records=20"]
SMALL += ["--config.checkpoint.every=5 steps", "--config.optimizer.early_intervals=()"]


def shorter(word):
    return re.sub(r"(\d+) steps", lambda match: f"{int(match[1]) // 20} steps", word)


@pytest.mark.slow
def test_every_recipe_works(tmp_path):
    """Faults: a flag of the page is refused; a longer run starts over; a branch changes its origin."""
    (tmp_path / "texts").mkdir()
    for number in range(12):
        (tmp_path / "texts" / f"{number}.txt").write_text(f"Text {number} is short. " * 40)
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    environ.pop("JAX_NUM_CPU_DEVICES", None)
    for command in COMMANDS:
        name, verb, *words = map(shorter, shlex.split(command))
        assert name == "shampax"
        if verb == "sweep":  # tests/launch/test_sweep.py trains one
            continue
        if verb == "train":
            first = [] if any("duration" in word for word in words) else ["--config.duration=15 steps"]
            words += [*SMALL, *first]
        done = subprocess.run(
            [sys.executable, "-m", "shampax", verb, *words],
            cwd=tmp_path,
            env=environ,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, (command, done.stdout[-2000:], done.stderr[-2000:])
        if "lm:bytes" in command and verb == "train":
            assert ("resuming from" in done.stdout) == ("--change" in command), command
    runs = {path.parent.name: json.loads(path.read_text()) for path in (tmp_path / "runs").glob("*/result.json")}
    assert {name: run["steps"] for name, run in runs.items()} == {"first": 25, "cooler": 25, "tuned": 5}
    assert len(list((tmp_path / "runs/first/changes").iterdir())) == 2
    assert (tmp_path / "runs/report/index.html").exists() and (tmp_path / "weights.safetensors").exists()
