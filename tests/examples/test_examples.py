"""Run the examples and the commands of docs/new_model.md as a user does."""

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from shampax.launch.train import main

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
PAGE = (ROOT / "docs" / "new_model.md").read_text()
SHELL = "".join(re.findall(r"^```sh\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)).replace("\\\n", "")
COMMANDS = [shlex.split(line) for line in SHELL.splitlines()]

RUN = """
import json, sys
from shampax.launch.main import main
for words in json.loads(sys.argv[1]):
    code = main(words[1:])
    print("END")
    if code:
        sys.exit(code)
"""

sys.path.append(str(ROOT))  # the user's current folder


def test_own_model_data_and_optimizer_train_and_resume(monkeypatch, tmp_path):
    """Fault: a contract changed, and a user's own classes no longer run."""
    monkeypatch.chdir(ROOT)

    def trained(*flags):
        command = ["--config=examples/config.py", f"--workdir={tmp_path}", "--config.may_change=duration,schedule"]
        command.append("--config.simulated_devices=0")  # those of the tests are there already
        assert main([*command, *flags]) == 0
        return json.loads((tmp_path / "result.json").read_text())

    first = trained("--config.duration=20 steps")
    assert (first["steps"], first["optimizer"], first["skipped_steps"]) == (20, "LionOptions", 0)
    result = trained()
    assert result["steps"] == 60
    assert (tmp_path / "restored.txt").exists()
    assert result["heldout_loss"] < 0.7 and result["accuracy"] > 0.75  # guessing gives 1.386 and 0.25


def test_shampoo_trains_in_a_users_own_loop(capsys):
    """Fault: the optimizer does not work without the trainer."""
    runpy.run_path(str(EXAMPLES / "plain_optax.py"))
    before, after = map(float, re.findall(r"loss \w+: (\S+)", capsys.readouterr().out))
    assert before > 0.45 and after < 0.1


@pytest.mark.parametrize("file", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_every_example_has_a_command_and_is_listed(file):
    """Fault: a docstring or the page names a missing file."""
    text = (EXAMPLES / file).read_text()
    assert file == "__init__.py" or re.search(r"^    (python |shampax train --config=)examples/", text, re.M)
    assert file == "__init__.py" or f"(../examples/{file})" in PAGE
    for ours, beside in re.findall(r"`shampax/([\w/]+\.py)`|`(\w+\.py)`", text):
        assert (ROOT / (ours or f"examples/{beside}")).exists(), ours or beside


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    """Run the page's commands, all but the plan in one process. Return the folder and (command, output) in order."""
    folder = tmp_path_factory.mktemp("new_model")
    shutil.copytree(EXAMPLES, folder / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    environment = {name: value for name, value in os.environ.items() if name != "JAX_NUM_CPU_DEVICES"}
    environment["PYTHONPATH"] = str(ROOT.parent) if ROOT.name == "shampax" else ""
    plan, *others = COMMANDS
    assert plan[1] == "plan" and {command[0] for command in COMMANDS} == {"shampax"}
    printed = []
    for commands in ([plan], others):
        words = [sys.executable, "-c", RUN, json.dumps(commands)]
        done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, (done.stdout[-2000:], done.stderr[-3000:])
        printed += done.stdout.split("END")[:-1]
    return folder, [(" ".join(command), out) for command, out in zip(COMMANDS, printed, strict=True)]


@pytest.mark.slow
def test_plan_works_for_a_users_own_model(walked):
    """Fault: a plan works only for models of this package."""
    plan = next(out for command, out in walked[1] if "shampax plan" in command)
    for words in ("4 x cpu (data 4)", "statistics", "by the task's formula"):
        assert words in plan


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["lion", "shampoo", "nnx"])
def test_variants_train(walked, variant):
    """Fault: the page or an example does not match the code."""
    result = json.loads((walked[0] / "runs" / variant / "result.json").read_text())
    assert (result["steps"], result["devices"], result["skipped_steps"]) == (60, 2, 0)
    assert (result["refreshes"] > 0) == (variant != "lion")
    assert result["heldout_loss"] < 0.7 and result["accuracy"] > 0.75


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["lion", "nnx"])
def test_resumed_runs_have_the_same_bits(walked, variant):
    """Fault: state of a user's own model or optimizer is not restored."""
    printed = walked[1]
    resumed = next(out for command, out in printed if f"runs/{variant}_again " in command)
    assert re.search(r"resume_from .*/runs/\w+/checkpoints/40", resumed), resumed[:2000]
    compared = next(out for command, out in printed if "diff" in command and variant in command)
    assert re.search(r"^\d\d+ equal, 0 different$", compared, re.MULTILINE), compared


@pytest.mark.slow
def test_both_libraries_make_the_same_model(walked):
    """Fault: one library names parameters differently, so that they get another treatment."""
    linen, nnx = (
        sorted((walked[0] / "runs" / name / "parameters.txt").read_text().splitlines()) for name in ("shampoo", "nnx")
    )
    assert linen == nnx
