import json
import os
import shutil
import signal
import stat
import sys

import pytest
from ml_collections import ConfigDict

from shampax.benchmarks import contest
from shampax.benchmarks.grid import Metric, Trial, best_rates, crossings
from shampax.framework.base import workdir
from shampax.framework.base.errors import UserError

TRAINER = """#!{python}
import json, pathlib, sys
given = dict(argument.removeprefix("--").split("=", 1) for argument in sys.argv[3:])
path = pathlib.Path(given["workdir"])
with open(path.parent / "calls", "a") as calls:
    calls.write(json.dumps(sys.argv[1:]) + "\\n")
if given["config"].endswith(":fail"):
    sys.exit("error: out of memory")
path.mkdir(exist_ok=True)
rate = float(given["config.schedule.learning_rate"])
config = {{"seed": int(given["config.seed"]), "schedule": {{"learning_rate": rate}}, "batch_size": 4}}
config |= {{"duration": "10 steps", "microbatches": 1}}
(path / "config.json").write_text(json.dumps(config))
line = {{"step": 10, "seconds": 1, "tokens": 1, "heldout/loss": 1 / rate}}
(path / "metrics.jsonl").write_text(json.dumps(line))
loss = 1 / rate
result = {{"steps": 10, "seconds": 1.0, "tokens": 100, "heldout_loss": loss, "best_heldout_loss": loss}}
result |= {{"bits_per_character": 1.0, "stopped": None}}
(path / "result.json").write_text(json.dumps(result))
"""


@pytest.fixture
def trainer(tmp_path, monkeypatch):
    """Replace the trainer by a script that writes a workdir and logs its arguments; replace configs by small ones."""

    def load(spec, settings):
        assert spec.startswith("shampax/configs/lm.py:")
        values = dict(setting.split("=") for setting in settings)
        rate, batch_size = float(values["schedule.learning_rate"]), int(values.get("batch_size", 4))
        config = {"seed": int(values["seed"]), "schedule": {"learning_rate": rate}, "batch_size": batch_size}
        return ConfigDict(config | {"duration": "10 steps", "microbatches": 1, "may_change": ("may_change",)})

    monkeypatch.setattr(contest, "load", load)
    script = tmp_path / "python"
    script.write_text(TRAINER.format(python=sys.executable))
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sys, "executable", str(script))


def write(folder, trial, heldout, *, stopped=None, seconds_per_step=1.0):
    """Write a finished workdir with held-out losses `heldout` at steps 10, 20, ...; return its outcome."""
    path = folder / trial.name
    path.mkdir(parents=True)
    lines = [
        {"step": step, "seconds": step * seconds_per_step, "tokens": step, "heldout/loss": loss}
        for step, loss in zip(range(10, 10 * len(heldout) + 1, 10), heldout, strict=True)
    ]
    (path / workdir.METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = {
        "steps": lines[-1]["step"],
        "seconds": lines[-1]["seconds"],
        "tokens": lines[-1]["tokens"],
        "heldout_loss": heldout[-1],
        "best_heldout_loss": heldout[-1],
        "bits_per_character": heldout[-1] / 2,
        "stopped": stopped,
    }
    (path / workdir.RESULT).write_text(json.dumps(result))
    return contest.read_outcome(trial, path)


@pytest.fixture
def outcomes(tmp_path):
    """Write runs of variants a and b, two rates, two seeds. The mean final loss of b at its best rate is 3.0."""
    losses = {
        ("a", 0.1, 0): [6.0, 3.5, 2.5, 2.0],
        ("a", 0.1, 1): [6.0, 4.0, 3.0, 2.4],
        ("a", 0.2, 0): [6.0, 1.0, 1.0, 1.0],
        ("a", 0.2, 1): [6.0, 9.0, 9.0, 9.0],
        ("b", 0.1, 0): [7.0, 6.0, 4.0, 2.8],
        ("b", 0.1, 1): [7.0, 6.0, 4.0, 3.2],
        ("b", 0.2, 0): [7.0, 6.0, 5.0, 4.0],
        ("b", 0.2, 1): [7.0, 6.0, 5.0, 4.0],
    }
    return [
        write(tmp_path, Trial(*cell), heldout, seconds_per_step=2.0 if cell[0] == "a" else 1.0)
        for cell, heldout in losses.items()
    ]


def test_grid_has_every_combination_once_ordered_by_seed():
    grid = contest.trials({"a": [0.1, 0.2], "b": [0.1, 0.2]}, [0, 1])
    assert [trial.name for trial in grid[:4]] == [
        "a-lr0.1-seed0",
        "b-lr0.1-seed0",
        "a-lr0.2-seed0",
        "b-lr0.2-seed0",
    ]
    assert len({trial.name for trial in grid}) == len(grid) == 8


def test_best_rate_has_the_lowest_mean_not_the_lowest_run(outcomes):
    assert best_rates(outcomes) == {"a": 0.1, "b": 0.1}


def test_rate_with_a_diverged_seed_is_not_eligible(outcomes, tmp_path):
    low = write(tmp_path, Trial("a", 0.3, 0), [1.0, 0.1])
    stopped = write(tmp_path, Trial("a", 0.3, 1), [1.0, 0.1], stopped="8 steps in a row were not finite")
    assert best_rates([*outcomes, low, stopped])["a"] == 0.1
    with pytest.raises(UserError, match="Try lower rates"):
        best_rates([stopped])


def test_crossings_are_interpolated_per_seed_as_a_share_of_the_baseline(outcomes):
    first, second = crossings(outcomes[0:2], outcomes[4:6])
    assert first == {
        "variant": "a",
        "reaches": "b",
        "target": 3.0,
        "seed": 0,
        "steps": pytest.approx(25.0),  # halfway from 3.5 at 20 to 2.5 at 30
        "evaluated_at": 30,
        "fraction_of_steps": pytest.approx(25 / 40),
        "seconds": pytest.approx(50.0),
        "fraction_of_seconds": pytest.approx(50 / 40),
    }
    assert (second["seed"], second["steps"], second["evaluated_at"]) == (1, pytest.approx(30.0), 30)


def test_a_target_that_is_never_reached_is_null(outcomes):
    analysis = contest.analyse(outcomes)
    b_to_a = [entry for entry in analysis["crossings"] if entry["variant"] == "b"]
    assert [entry["fraction_of_steps"] for entry in b_to_a] == [None, None]
    assert "| b | a's 2.2000 | 0 | not reached |" in contest.markdown(analysis, "command")


def test_analysis_is_json_and_its_tables_have_every_run(outcomes):
    analysis = json.loads(json.dumps(contest.analyse(outcomes, shown=["bits_per_character"]), allow_nan=False))
    text = contest.markdown(analysis, "python -m grid")
    assert "`python -m grid`" in text
    assert "| a | 0.2 | 1 | 9.0000 | 4.5000 | 40 | 80 | complete |" in text
    assert "| a | 0.1 | 2 | 2.2000 | best |" in text
    assert "| a | b's 3.0000 | 0 | 25 | 62.5% | 30 | 50 | 125.0% |" in text
    assert "The best rate of a is at the edge" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 3 * 2 + 4 + 4 + 8


def test_trial_config_is_the_shipped_variant_with_rate_seed_and_settings():
    trial = Trial("sample_adamw", 2e-5, 7)
    config = contest.config_of(trial, "shampax/configs/lm.py", ["batch_size=4", "seed=1"])
    assert (config.schedule.learning_rate, config.seed, config.batch_size) == (2e-5, 7, 4)
    assert "AdamW" in config.optimizer.name


def test_a_metric_where_higher_is_better(tmp_path):
    """Faults: the worst rate counts as the best; a crossing is where the curve leaves the target."""

    def run(variant, rate, accuracies):
        outcome = write(tmp_path, Trial(variant, rate, 0), [1.0] * len(accuracies))
        lines = (tmp_path / outcome.trial.name / workdir.METRICS).read_text().splitlines()
        lines = [json.loads(line) | {"heldout/accuracy": value} for line, value in zip(lines, accuracies, strict=True)]
        (tmp_path / outcome.trial.name / workdir.METRICS).write_text("\n".join(map(json.dumps, lines)))
        result = json.loads((tmp_path / outcome.trial.name / workdir.RESULT).read_text())
        result["accuracy"] = accuracies[-1]
        (tmp_path / outcome.trial.name / workdir.RESULT).write_text(json.dumps(result))
        return contest.read_outcome(outcome.trial, tmp_path / outcome.trial.name)

    outcomes = [run("a", 0.1, [0.2, 0.6, 0.9]), run("a", 0.2, [0.1, 0.2, 0.3]), run("b", 0.1, [0.3, 0.5, 0.8])]
    accuracy = Metric("accuracy", higher=True)
    assert best_rates(outcomes, accuracy) == {"a": 0.1, "b": 0.1}
    (entry,) = crossings(outcomes[:1], outcomes[2:], accuracy)
    assert entry["target"] == 0.8
    assert entry["steps"] == pytest.approx(20 + 10 * 2 / 3)
    assert entry["evaluated_at"] == 30
    text = contest.markdown(contest.analyse(outcomes, accuracy, ["bits_per_character"]), "command")
    assert "| a | 0.1 | 0 | 0.9000 | 0.5000 | 30 | 30 | complete |" in text


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["a=1,2", "b=1"], "'a': 2, 'b': 1"),
        (["a=1,2"], "same number of rates to each of a, b"),
        (["1,two"], "numbers separated by commas"),
        (["1,2", "c=1,2"], "same number of rates to each of a, b"),
    ],
)
def test_uneven_grids_are_refused(tmp_path, capsys, given, words):
    """Fault: one variant is tuned with more rates than another."""
    assert contest.main(["--variants=a,b", f"--output={tmp_path / 'grid'}", "--learning_rates", *given]) == 2
    assert words in capsys.readouterr().err


def test_each_variant_may_have_its_own_rates(tmp_path, trainer):
    """Fault: a variant is trained with the rates of another."""
    given = ["--learning_rates", "a=1,2", "b=3,4"]
    assert contest.main(["--variants=a,b", "--seeds=0", f"--output={tmp_path / 'grid'}", *given]) == 0
    calls = [json.loads(call)[3].rpartition("/")[2] for call in (tmp_path / "grid" / "calls").read_text().splitlines()]
    assert calls == ["a-lr1-seed0", "b-lr3-seed0", "a-lr2-seed0", "b-lr4-seed0"]


def test_only_finalists_are_trained_with_the_other_seeds(tmp_path, trainer, capsys):
    """Faults: a rate that is not a finalist is trained with more seeds; a rate with one seed is reported as best."""
    given = ["--learning_rates", "a=1,4,2", "b=5,3,2", "--finalists=1", "--seeds=0,1"]
    assert contest.main(["--variants=a,b", f"--output={tmp_path / 'grid'}", *given]) == 0
    calls = [json.loads(call)[3].rpartition("/")[2] for call in (tmp_path / "grid" / "calls").read_text().splitlines()]
    assert calls[6:] == ["a-lr4-seed1", "b-lr5-seed1"]
    assert json.loads(capsys.readouterr().out)["best"] == {"a": 4, "b": 5}


def test_best_rate_needs_runs_of_all_seeds(outcomes, tmp_path):
    low = write(tmp_path, Trial("a", 0.3, 0), [1.0, 0.1])
    assert best_rates([*outcomes, low])["a"] == 0.1


@pytest.mark.parametrize(("variant", "setting"), [("sampel", "batch_size=4"), ("sample", "batch_sise=4")])
def test_misspelt_variant_or_setting_is_refused_before_training(tmp_path, capsys, variant, setting):
    given = [f"--variants={variant}", "--learning_rates=1", f"--output={tmp_path / 'grid'}", "--set", setting]
    assert contest.main(given) == 2
    assert "Did you mean" in capsys.readouterr().err
    assert not (tmp_path / "grid").exists()


def arguments(tmp_path, *more):
    grid = ["--variants=a,b", "--learning_rates=1e-1,2e-1", "--seeds=0", f"--output={tmp_path / 'grid'}"]
    return [*grid, "--set", "batch_size=4", *more]


def test_command_trains_the_grid_once_and_writes_the_section(tmp_path, trainer, capsys):
    results = tmp_path / "docs" / "results.md"
    assert contest.main(arguments(tmp_path, f"--markdown={results}")) == 0
    first = capsys.readouterr().out
    calls = [json.loads(line) for line in (tmp_path / "grid" / "calls").read_text().splitlines()]
    assert len(calls) == 4
    assert calls[1] == [
        "-m",
        "shampax.launch.train",
        "--config=shampax/configs/lm.py:b",
        f"--workdir={tmp_path / 'grid' / 'b-lr0.1-seed0'}",
        "--config.batch_size=4",
        "--config.schedule.learning_rate=0.1",
        "--config.seed=0",
    ]
    assert json.loads(first)["best"] == {"a": 0.2, "b": 0.2}
    assert "| b | 0.2 | 1 | 5.0000 | best |" in results.read_text()
    assert "<!-- contest lm begin -->" in results.read_text()
    assert str(tmp_path) not in results.read_text()

    assert contest.main(arguments(tmp_path)) == 0
    assert capsys.readouterr().out == first
    assert len((tmp_path / "grid" / "calls").read_text().splitlines()) == 4


def test_stopped_run_is_resumed_and_finished_ones_are_not(tmp_path, trainer, capsys):
    """Fault: a run that was stopped counts as finished, or finished ones are trained again."""
    assert contest.main(arguments(tmp_path)) == 0
    stopped = tmp_path / "grid" / "a-lr0.2-seed0"
    result = json.loads((stopped / workdir.RESULT).read_text())
    (stopped / workdir.RESULT).write_text(json.dumps(result | {"stopped": "SIGINT"}))
    assert contest.main(arguments(tmp_path)) == 0
    calls = (tmp_path / "grid" / "calls").read_text().splitlines()
    assert [json.loads(call)[3].rpartition("/")[2] for call in calls[4:]] == ["a-lr0.2-seed0"]


def test_failing_trainer_is_one_line_with_the_last_line_of_its_log(tmp_path, trainer, capsys):
    given = ["--variants=fail", "--learning_rates=1", "--seeds=0", f"--output={tmp_path / 'grid'}"]
    assert contest.main(given) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "out of memory" in errors[0]
    assert "exited with code 1" in errors[0]


def test_workdirs_of_another_config_are_refused_before_training(tmp_path, trainer, capsys):
    assert contest.main(arguments(tmp_path)) == 0
    shutil.rmtree(tmp_path / "grid" / "a-lr0.1-seed0")
    assert contest.main([*arguments(tmp_path), "batch_size=8"]) == 2
    assert "batch_size: 4 -> 8" in capsys.readouterr().err
    assert not (tmp_path / "grid" / "a-lr0.1-seed0").exists()


def test_markdown_without_markers_is_refused_before_training(tmp_path, trainer, capsys):
    results = tmp_path / "results.md"
    results.write_text("# Results\n")
    assert contest.main(arguments(tmp_path, f"--markdown={results}")) == 2
    assert not (tmp_path / "grid").exists()
    assert "Add them" in capsys.readouterr().err


def test_interrupted_grid_leaves_no_trainer_behind(tmp_path, monkeypatch):
    script = tmp_path / "python"
    script.write_text(f"#!{sys.executable}\nimport os, time\nprint(os.getpid(), flush=True)\ntime.sleep(60)\n")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sys, "executable", str(script))
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 1.5)
        with pytest.raises(KeyboardInterrupt):
            contest.train(Trial("a", 0.1, 0), tmp_path / "a", "lm.py", [])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "a.log").read_text()), 0)
