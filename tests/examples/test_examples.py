"""The examples run as a user runs them."""

import json
import os
import re
import runpy
import sys
from pathlib import Path

import pytest

from shampax.launch.train import main

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # a user stands in the folder that holds `examples`


@pytest.fixture
def here(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("JAX_NUM_CPU_DEVICES", raising=False)


def trained(variant, workdir, *flags):
    assert main([f"--config=examples/config.py{variant}", f"--workdir={workdir}", *flags]) == 0
    return json.loads((workdir / "result.json").read_text())


def test_own_model_data_and_optimizer_train_and_resume(here, tmp_path):
    """Fault: the contracts have changed, and a user's own classes no longer run."""
    stopped = trained("", tmp_path, "--config.duration=20 steps", "--config.may_change=duration,schedule")
    assert (stopped["steps"], stopped["optimizer"], stopped["skipped_steps"]) == (20, "LionOptions", 0)
    result = trained("", tmp_path, "--config.may_change=duration,schedule")
    assert result["steps"] == 60
    assert result["heldout_loss"] < 0.7 and result["accuracy"] > 0.75  # guessing has 1.386 and 0.25
    assert (tmp_path / "restored.txt").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "accuracy"), [(":nnx", 0.75), (":shampoo", 0.75)])
def test_variants_train(here, tmp_path, variant, accuracy):
    """Fault: an adapter or an optimizer that treats a user's model otherwise."""
    assert trained(variant, tmp_path)["accuracy"] > accuracy


def test_shampoo_trains_in_a_loop_of_ones_own(capsys):
    """Fault: the optimizer does not work without the trainer."""
    runpy.run_path(str(ROOT / "examples" / "plain_optax.py"))
    before, after = map(float, re.findall(r"loss \w+: (\S+)", capsys.readouterr().out))
    assert before > 0.45 and after < 0.1


@pytest.mark.parametrize("file", sorted(path.name for path in (ROOT / "examples").glob("*.py")))
def test_every_example_says_how_to_run_it(file):
    """Fault: a command that names another file or a class that is gone."""
    text = (ROOT / "examples" / file).read_text()
    assert file == "__init__.py" or re.search(
        r"^    python (-m shampax\.launch\.train --config=)?examples/", text, re.M
    )
    for path in re.findall(r"`?shampax/([\w/]+\.py)`?|`(\w+\.py)`", text):
        assert os.path.exists(ROOT / (path[0] or f"examples/{path[1]}")), path
