"""Paste the commands of docs/recipes.md into a terminal, with fewer steps, as someone does who reads the page."""

import json
import os
import re
import shlex
import sys
from pathlib import Path

import pexpect
import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "recipes.md").read_text()
RECIPES = {
    title: [line for block in re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
            for line in block.replace("\\\n", "").splitlines()]
    for title, text in re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)
}  # fmt: skip
ADAMW = "shampax.optimizers.baselines:AdamWOptions"  # compiles sooner
# A twentieth of the steps, in one small layer.
SMALL = (
    "task.layers=1",
    "task.embed_dim=16",
    "evaluation.batches=1",
    "evaluation.every=0 steps",
    "data.max_records=3",
    "checkpoint.every=5 steps",
    "trackers=()",
)
PROMPT = "READY>"
# Runs commands in one process, which imports the package once.
ERRANDS = """
import json, sys
from shampax.launch.main import main
for words in json.load(open(sys.argv[1])):
    print(*words, flush=True)
    code = main(words[1:])
    if code:
        sys.exit(code)
"""


class Terminal:
    """A shell in a terminal, in a folder with the files that a user could have."""

    def __init__(self, folder):
        command = folder / "bin" / "shampax"
        command.parent.mkdir()
        command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m shampax "$@"\n')
        command.chmod(0o755)
        environ = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "PATH": f"{command.parent}{os.pathsep}{os.environ['PATH']}",
            "PS1": PROMPT,
        }
        environ.pop("JAX_NUM_CPU_DEVICES", None)
        options = {"cwd": folder, "env": environ, "encoding": "utf-8", "timeout": 300, "dimensions": (50, 200)}
        self.folder, self.pasted = folder, {"A first run, and a longer one"}
        self._shell = pexpect.spawn("bash", ["--norc", "--noprofile", "--noediting"], **options)
        self._shell.expect_exact(PROMPT)
        self.run("stty -echo")

    def run(self, command, stop_at=None):
        """Return the output of a command, and its exit code; press Ctrl-C when `stop_at` appears."""
        self._shell.sendline(command)
        shown = ""
        if stop_at:
            self._shell.expect(stop_at)
            shown = self._shell.before
            self._shell.sendintr()
        self._shell.expect_exact(PROMPT)
        shown += self._shell.before
        self._shell.sendline("echo code $?")
        self._shell.expect(r"code (\d+)\r")
        code = int(self._shell.match[1])
        self._shell.expect_exact(PROMPT)
        return shown, code

    def paste(self, title):
        """Run the commands of a recipe, shrunk, and return the output of the last."""
        self.pasted.add(title)
        shown = ""
        for command in RECIPES[title]:
            shown, code = self.run(shrunk(command))
            assert code == 0, (command, shown[-3000:])
        return shown

    def paste_all(self, *titles):
        """Run the commands of recipes, shrunk, in one process, and return their output."""
        self.pasted.update(titles)
        commands = [shlex.split(shrunk(command)) for title in titles for command in RECIPES[title]]
        (self.folder / "errands.json").write_text(json.dumps(commands))
        shown, code = self.run(shlex.join([sys.executable, "-c", ERRANDS, "errands.json"]))
        assert code == 0, shown[-3000:]
        return shown

    def result(self, name):
        return json.loads((self.folder / "runs" / name / "result.json").read_text())


def shrunk(command):
    shorter = re.sub(r"(\d+) steps", lambda match: f"{int(match[1]) // 20} steps", command)
    words = shlex.split(shorter)
    if words[1] == "train":
        own = "examples/config.py" in command
        words += [f"--config.{knob}" for knob in SMALL if not own]
        if "LionOptions" not in command and not own:
            words.append(f"--config.optimizer.name={ADAMW}")
        if "duration" not in command:
            words.append("--config.duration=10 steps")
    if words[1] == "sweep":
        words = [word for word in words if not word.startswith("seed=")]
        words += [f"--config.{knob}" for knob in (*SMALL, "duration=4 steps", f"optimizer.name={ADAMW}")]
    return shlex.join(words)


@pytest.mark.slow
def test_every_errand_needs_what_its_recipe_says(tmp_path):
    """Faults: a flag of the page is refused; a longer run starts over; a branch changes its origin; a sweep refuses the
    flags of `train`, or prepares data for each trial."""
    (tmp_path / "texts").mkdir()
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    for number in range(12):
        (tmp_path / "texts" / f"{number}.txt").write_text(f"Text {number} is short. " * 40)
    terminal = Terminal(tmp_path)

    first, longer = RECIPES["A first run, and a longer one"]
    shown, code = terminal.run(shrunk(first), stop_at=r"step +1/10 ")
    assert code == 130, shown
    shown, code = terminal.run(shrunk(first))
    assert code == 0 and "resuming from" in shown, shown
    shown, code = terminal.run(shrunk(longer))
    assert code == 0 and "resuming from" in shown, shown
    assert terminal.result("first")["steps"] == 20

    shown = terminal.paste_all(
        "Another learning rate from a checkpoint",
        "Your own text",
        "Your own optimizer",
        "Fine-tuning",
        "Comparing runs",
        "The mean of several checkpoints",
        "Text from a model",
        "The weights",
    )
    assert "warm-up and decay begin at step 20 and end at step 25" in shown
    assert [terminal.result(name)["steps"] for name in ("first", "cooler", "texts", "tuned")] == [20, 25, 10, 5]
    assert terminal.result("own_optimizer")["optimizer"] == "LionOptions"
    assert "the mean of 2 checkpoints" in shown and "decode" in shown
    assert (tmp_path / "runs/report/index.html").exists() and (tmp_path / "weights.safetensors").exists()
    terminal.paste("Your own model")
    assert terminal.result("own_model")["accuracy"] > 0
    shown, rates = terminal.paste("A sweep"), tmp_path / "runs/rates"
    assert {line.split()[0] for line in shown.splitlines() if "complete" in line.split()} == {"0.01", "0.02"}
    assert len([*rates.glob("*/result.json")]) == 2
    assert (rates / "data").is_dir() and not [*rates.glob("*/data")]
    assert "resuming from" in terminal.paste("Another mesh")
    assert (terminal.result("first")["steps"], terminal.result("first")["devices"]) == (25, 2)
    assert len(list((tmp_path / "runs/first/changes").iterdir())) == 2
    assert terminal.pasted == {*RECIPES}
