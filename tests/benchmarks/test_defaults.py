import json

import pytest

from shampax.benchmarks import defaults
from shampax.framework.config import components
from shampax.framework.config.check import load


def write(folder, change, rate, seed, loss, stopped=None):
    folder.mkdir(parents=True, exist_ok=True)
    trial = defaults.Trial(change, rate, seed)
    content = {
        "steps": 200,
        "heldout": [{"step": 200, "loss": loss}],
        "stopped": stopped,
        "settings": {},
        "fingerprint": "",
    }
    (folder / f"{trial.name}.json").write_text(json.dumps(content))


def test_every_change_is_valid_and_differs_from_the_defaults(recwarn):
    """Faults: a change is invalid, which only shows after hours; a change equals the defaults."""
    ours = components.build(load("shampax/configs/lm.py:sample").optimizer)
    changed = list(defaults.variants(ours).values())
    assert changed[0].beta1 == 0.9 and changed[0].early
    assert len(set(changed)) == len(changed)
    assert all("/" not in name and ";" not in name for name in defaults.CHANGES)  # names of files, and of --changes
    assert not recwarn.list


def test_a_change_is_compared_with_the_defaults_over_the_same_seeds(tmp_path, capsys):
    """Faults: means are over different seeds; a diverged run counts; the best rate is that of another change."""
    folder = tmp_path / "learn"
    for seed, loss in ((0, 5.0), (1, 4.0)):
        write(folder, "defaults", 6e-3, seed, loss)
        write(folder, "defaults", 1.2e-2, seed, loss + 0.5)
        write(folder, "beta1 0.8", 6e-3, seed, loss - 0.25)
    write(folder, "nesterov", 6e-3, 0, 5.5)
    write(folder, "nesterov", 1.2e-2, 0, 5.125)
    write(folder, "graft sign", 6e-3, 0, None, "the loss was not finite")
    page = tmp_path / "page.md"
    page.write_text("<!-- defaults begin -->\n<!-- defaults end -->\n")
    assert defaults.main(["table", f"--workdir={tmp_path}", "--seeds=0,1", f"--markdown={page}"]) == 0
    rows = {row["change"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert list(rows) == ["beta1 0.8", "defaults", "nesterov"]
    assert rows["beta1 0.8"]["behind_defaults"] == -0.25 and rows["beta1 0.8"]["seeds"] == 2
    assert (rows["nesterov"]["best"], rows["nesterov"]["behind_defaults"]) == (5.125, 0.125)
    assert "| nesterov | 1 | 5.5000 | 5.1250 | +0.1250 |" in page.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--changes=none such"], "--changes=none such: unknown change"), ([], "no runs to compare")],
)
def test_user_errors_are_one_line(tmp_path, capsys, arguments, message):
    """Fault: a traceback instead of one line."""
    assert defaults.main(["table", f"--workdir={tmp_path}", *arguments]) == 2
    assert message in capsys.readouterr().err
