import json
import math
import os
import re
import shlex
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from shampax.launch import sweep

CONFIG = "--config=lm:bytes"


def ran(arguments, capsys):
    """Run the verb; return its exit code and the lines of both outputs."""
    code = sweep.main([str(each) for each in arguments])
    shown = capsys.readouterr()
    return code, shown.out.splitlines(), shown.err.splitlines()


def chosen(*over, **others):
    """Return the trials of a sweep of the byte model."""
    options = SimpleNamespace(over=list(over), random=0, config="lm:bytes", workdir=Path("d"))
    return sweep._trials(SimpleNamespace(**vars(options) | others), ())


def measured(workdir, losses, complete=False):
    """Write what a run has measured at its evaluations."""
    workdir.mkdir(parents=True)
    lines = [
        {"step": 10 * number, "seconds": 1.0, "tokens": 1, "heldout/loss": loss}
        for number, loss in enumerate(losses, start=1)
    ]
    (workdir / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    if complete:
        result = {"steps": 1, "seconds": 1.0, "tokens": 1, "heldout_loss": 1.0, "best_heldout_loss": 1.0}
        (workdir / "result.json").write_text(json.dumps(result | {"stopped": None}))


def test_trials_are_all_combinations_and_values_may_have_commas():
    """Faults: a tuple is cut at its commas; the order is not that of the values; two trials share a folder."""
    trials = chosen("schedule.learning_rate=0.01,0.02", "optimizer.early_intervals=((10, 1),),()", "seed=3,4")
    assert len({trial.workdir for trial in trials}) == len({trial.log for trial in trials}) == len(trials) == 8
    first = ("schedule.learning_rate=0.01", "optimizer.early_intervals=((10, 1),)", "seed=3")
    assert trials[0].changes == first and trials[1].changes == (*first[:2], "seed=4")
    assert trials[0].setting == trials[1].setting == first[:2]
    assert trials[2].workdir.name == "learning_rate=0.01,early_intervals=__,seed=3" or re.fullmatch(
        r"learning_rate=0.01,early_intervals=__,seed=3-\w{8}", trials[2].workdir.name
    )


def test_knobs_of_one_name_are_told_apart():
    """Fault: two trials of different settings are one folder."""
    trials = chosen("data.workers=1,2", "input.workers=1,2")
    assert {trial.workdir.name for trial in trials} >= {
        "data.workers=1,input.workers=2",
        "data.workers=2,input.workers=1",
    }


def test_random_trials_stay_the_same_and_fill_the_range():
    """Faults: a rerun trains other trials; a range is even in the value, not in its logarithm."""
    over = ("schedule.learning_rate=1e-4..1e-2", "seed=1,2,3")
    trials = chosen(*over, random=60)
    assert trials == chosen(*over, random=60)
    rates = [float(trial.changes[0].partition("=")[2]) for trial in trials]
    assert min(rates) >= 1e-4 and max(rates) <= 1e-2
    assert 0.35 < sum(rate < 1e-3 for rate in rates) / len(rates) < 0.65


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--over", "schedule.learning_rat=1"], "Did you mean 'config.schedule.learning_rate'?"),
        (["--over", "seed=1,x"], "config.seed='x': expected int"),
        (["--over", "seed"], "--over seed: has no values"),
        (["--over", "seed=1", "seed=2"], "seed has values already"),
        (["--over", "schedule.learning_rate=1e-4..1e-2"], "a range needs --random=N"),
        (["--over", "schedule.learning_rate=1..0", "--random=2"], "must go from a number above 0 to a larger one"),
        (["--over", "seed=1,2", "--halving=3,2"], "--halving=3,2: must rise"),
        (["--over", "seed=1,2", "--halving=x"], "not numbers of evaluations"),
        (["--over", "seed=1,2", "--halving=2", "--slurm"], "do not wait for each other"),
        (["--over", "seed=1,2", "--only=2"], "there are trials 0 to 1"),
        (["--over", "seed=1", "--jobs=0"], "--jobs=0: must be at least 1"),
    ],
)
def test_bad_input_is_one_line_and_trains_nothing(flags, message, tmp_path, capsys):
    """Fault: the tenth trial fails after hours, on a value that could have been refused at once."""
    code, out, [line] = ran([CONFIG, f"--workdir={tmp_path / 'd'}", *flags], capsys)
    assert (code, out) == (2, []) and message in line and not (tmp_path / "d").exists()


def test_settings_are_ranked_by_the_mean_of_their_seeds(tmp_path):
    """Faults: the best seed wins; a diverged run is the best; a rung is judged by a later evaluation."""
    options = SimpleNamespace(metric="loss", higher=False)
    losses = {"0.1": ([9, 2], [9, 9]), "0.2": ([9, 4], [9, 5]), "0.3": ([9, math.nan], [9, 1]), "0.4": ([3, 8], [9, 8])}
    trials = []
    for rate, seeds in losses.items():
        for seed, values in enumerate(seeds):
            trials.append(sweep.Trial((f"rate={rate}", f"seed={seed}"), tmp_path / f"{rate} {seed}"))
            measured(trials[-1].workdir, values)
    order = [setting.trials[0].changes[0].partition("=")[2] for setting in sweep._best(trials, options)]
    assert order == ["0.2", "0.1", "0.4", "0.3"]
    assert sweep._best(trials, options, 1)[0].trials[0].changes[0] == "rate=0.4"
    options.higher = True
    assert [each.mean for each in sweep._best(trials, options)] == [8, 5.5, 4.5, math.inf]


def test_complete_trials_are_not_repeated_and_paused_ones_are_behind(tmp_path, capsys, monkeypatch):
    """Faults: a rerun trains everything again; a trial that halving has paused looks the best."""
    monkeypatch.setattr(sweep, "_start", lambda *_: pytest.fail("trained again"))
    monkeypatch.setattr(sweep, "_prepared", lambda *_: ["--config.data.prepared=p"])
    for rate, losses, complete in ((0.1, [5, 4, 3], True), (0.2, [5, 4, 2.5], True), (0.3, [6, 1], False)):
        measured(tmp_path / f"learning_rate={rate}", losses, complete)
    # 0.3 is the worst of three at evaluation 1, and halving keeps two.
    flags = [CONFIG, f"--workdir={tmp_path}", "--over", "schedule.learning_rate=0.1,0.2,0.3", "--halving=1"]
    code, out, _ = ran(flags, capsys)
    assert code == 0
    rows = [line.split() for line in out if line.startswith("0.")]
    assert rows == [
        ["0.2", "2.5", "1", "complete"],
        ["0.1", "3", "1", "complete"],
        ["0.3", "1", "1", "not", "complete"],
    ]
    assert out[-1] == "Best: shampax train --config=lm:bytes --config.schedule.learning_rate=0.2 --workdir=WORKDIR"
    assert (tmp_path / "index.html").stat().st_size > 10_000


def test_a_job_array_trains_each_trial(tmp_path, capsys):
    """Faults: a task trains all trials; a value with spaces is cut; the array has one task too few."""
    flags = [CONFIG, f"--workdir={tmp_path}", "--over", "duration=5 steps,6 steps", "seed=1,2,3", "--slurm"]
    code, out, _ = ran(flags, capsys)
    text = (tmp_path / "sweep.sbatch").read_text()
    assert code == 0 and "#SBATCH --array=0-5\n" in text
    command = shlex.split(text.splitlines()[-1])
    assert command[4:] == ["sweep", *flags[:-1], "--only=$SLURM_ARRAY_TASK_ID"]
    assert shlex.split(out[-1])[1:] == ["sweep", *flags[:-1]]


# Trains nothing: writes an evaluation every $PAUSE seconds, the better the larger the rate, continues where it was
# stopped, and fails at a rate of 1.
TRAINER = """
import json, os, pathlib, signal, sys, time
flags = dict(word.partition("=")[::2] for word in sys.argv[1:])
workdir, rate = pathlib.Path(flags["--workdir"]), float(flags["--config.schedule.learning_rate"])
if rate == 1:
    sys.exit(print("error: diverged") or 2)
workdir.mkdir(exist_ok=True)
(workdir / "cores").write_text(f"{len(os.sched_getaffinity(0))}")
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
metrics = workdir / "metrics.jsonl"
for number in range(len(metrics.read_text().splitlines()) + 1 if metrics.exists() else 1, 9):
    with metrics.open("a") as file:
        line = {"step": number, "seconds": 1.0, "tokens": 1, "heldout/loss": 1 / rate}
        print(json.dumps(line), file=file, flush=True)
    time.sleep(float(os.environ.get("PAUSE", "0.03")))
ends = dict.fromkeys(("steps", "seconds", "tokens", "heldout_loss", "best_heldout_loss"), 1.0)
(workdir / "result.json").write_text(json.dumps(ends | {"stopped": None}))
"""


@pytest.fixture
def trainer(tmp_path, monkeypatch):
    """Let trials run TRAINER, and look often."""
    (tmp_path / "trainer.py").write_text(TRAINER)
    monkeypatch.setattr(sweep, "_SHAMPAX", (sys.executable, str(tmp_path / "trainer.py")))
    monkeypatch.setattr(sweep, "_LOOKING_SECONDS", 0.01)
    monkeypatch.setattr(sweep, "_prepared", lambda *_: [])
    return tmp_path / "d"


def evaluations(folder):
    """Return the number of evaluations of each trial, by its rate."""
    lines = {path.parent.name: len(path.read_text().splitlines()) for path in folder.glob("*/metrics.jsonl")}
    return {name.partition("=")[2]: count for name, count in lines.items()}


def test_halving_pauses_the_worse_half(trainer, capsys):
    """Faults: the worse half trains to the end; the better half stops; a trial is signalled again while it saves; each
    job takes all cores."""
    over = "schedule.learning_rate=0.1,0.2,0.3,0.4"
    code, out, _ = ran([CONFIG, f"--workdir={trainer}", "--over", over, "--halving=2,4", "--jobs=2"], capsys)
    assert code == 0
    rows = [line.split() for line in out if line.startswith("0.")]
    assert [row[0] for row in rows if row[3] == "complete"] == ["0.4"] and len(rows) == 4
    counts = evaluations(trainer)
    assert counts["0.4"] == 8 and 4 <= counts["0.3"] < 8 and all(2 <= counts[rate] < 8 for rate in ("0.1", "0.2"))
    cores = len(os.sched_getaffinity(0))
    assert all(int(path.read_text()) == max(1, cores // 2) for path in trainer.glob("*/cores"))


def test_a_failing_trial_is_told_and_the_others_go_on(trainer, capsys):
    """Fault: a diverged trial ends the sweep, or nobody hears of it."""
    code, out, _ = ran([CONFIG, f"--workdir={trainer}", "--over", "schedule.learning_rate=1,0.2"], capsys)
    assert code == 1 and out[0] == "learning_rate=1: failed with code 2: error: diverged"
    assert evaluations(trainer) == {"0.2": 8}


def test_a_signal_stops_all_trials_and_the_same_command_resumes(trainer, capsys, monkeypatch):
    """Faults: trials continue without the sweep; further ones start; the exit code is 0; a rerun starts over."""
    flags = [CONFIG, f"--workdir={trainer}", "--over", "schedule.learning_rate=0.1,0.2,0.3", "--jobs=2"]

    def interrupt():
        while not evaluations(trainer):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setenv("PAUSE", "5")  # between evaluations, so that no trial ends on a slow machine
    thread = threading.Thread(target=interrupt)
    thread.start()
    code, _, _ = ran(flags, capsys)
    thread.join()
    assert code == 130
    before = evaluations(trainer)
    assert "0.3" not in before and max(before.values()) < 8
    monkeypatch.delenv("PAUSE")
    code, out, _ = ran(flags, capsys)
    assert code == 0 and evaluations(trainer) == dict.fromkeys(("0.1", "0.2", "0.3"), 8)
    assert [line.split()[0] for line in out if line.endswith("complete")] == ["0.3", "0.2", "0.1"]


def test_a_signal_while_a_trial_starts_stops_this_trial_too(trainer, capsys, monkeypatch):
    """Fault: the trial that is being started trains to its end, and the sweep waits for it."""
    start = sweep._start

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return start(*arguments)

    monkeypatch.setattr(sweep, "_start", interrupted)
    monkeypatch.setenv("PAUSE", "5")
    code, _, _ = ran([CONFIG, f"--workdir={trainer}", "--over", "schedule.learning_rate=0.1,0.2"], capsys)
    assert code == 143 and max(evaluations(trainer).values(), default=0) < 8
