import pytest
from ml_collections import ConfigDict

from shampax.configs import lm
from shampax.framework.distributed import sameness


def differing(**changes):
    """Return identities of four processes with changes: of_INDEX={name: value}."""
    identities = {index: {"config.seed": "0", "the code of a.py": "12"} for index in range(4)}
    for index, change in changes.items():
        identities[int(index.removeprefix("of_"))].update(change)
    return identities


def test_equal_processes_have_no_differences():
    assert sameness.difference(differing()) is None


@pytest.mark.parametrize(
    ("identities", "message"),
    [
        (
            differing(of_2={"config.seed": "1"}),
            "process 2 differs from process 0 in config.seed (1, and 0 in process 0).",
        ),
        (
            differing(of_0={"config.seed": "1"}),
            "process 0 differs from process 1 in config.seed (1, and 0 in process 1). Give all processes",
        ),
        (differing(of_3={"config.new": '"x"'}), 'process 3 differs from process 0 in config.new ("x", and absent in'),
        (
            differing(of_1={"the code of a.py": "13"}, of_3={"config.seed": "2"}),
            "process 1 differs from process 0 in the code of a.py (13, and 12 in process 0)",
        ),
        (differing(of_1={f"config.k{n}": "1" for n in range(8)}), "config.k4 (1, and absent in process 0) and 3 more."),
    ],
)
def test_the_differing_process_and_its_difference_are_named(identities, message):
    """Fault: process 0 counts as right although all others agree."""
    found = sameness.difference(identities)
    assert message in found
    assert "\n" not in found


def test_identities_differ_between_configs_workdirs_and_code(tmp_path, monkeypatch):
    """Fault: an edited file of the package, or of the user's own task, is not noticed."""
    config = lm.get_config()
    module = tmp_path / "mine.py"
    module.write_text("class Task: pass\n")
    monkeypatch.setitem(__import__("sys").modules, "mine", ConfigDict({"__file__": str(module)}))
    before = sameness.identity(config, "runs/a")
    assert before == sameness.identity(lm.get_config(), "runs/a")
    assert before["config.optimizer.beta1"] == "0.8"
    assert {"the code of framework/train.py", "the code of __init__.py", "the version of jaxlib"} <= before.keys()
    assert not [name for name in before if "tests" in name or ".venv" in name]

    with config.unlocked():
        config.task = {"name": "mine:Task"}
    mine = sameness.identity(config, "runs/b")
    assert mine["--workdir"] != before["--workdir"]
    assert mine["config.task.name"] == '"mine:Task"'
    module.write_text("class Task: x = 1\n")
    assert sameness.difference({0: mine, 1: sameness.identity(config, "runs/b")}).startswith(
        "process 1 differs from process 0 in the code of mine ("
    )
