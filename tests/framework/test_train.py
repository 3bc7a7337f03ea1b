import contextlib
import functools
import json
import os
import re
import shutil
import signal
import time
import types

import jax
import numpy as np
import pytest
import toy
from toy_runs import ADAMW, SHAMPOO, arrays, lines, make_config, saved, two

from shampax.configs import base
from shampax.framework import hooks
from shampax.framework.base.errors import TrainingStopped, UserError
from shampax.framework.checkpoint import origin, ownership
from shampax.framework.checkpoint.record import Record
from shampax.framework.distributed.signals import StopSignals
from shampax.framework.loop import Run
from shampax.framework.reporting import journal
from shampax.framework.reporting.runs import LAYER_METRICS, read_run
from shampax.framework.step.state import TrainState
from shampax.framework.train import train
from shampax.launch import train as launch_train
from shampax.optimizers.linalg import lapack


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    before = dict(toy.TRACES)
    result = train(make_config(), workdir, devices=two())
    traced = {name: toy.TRACES[name] - before[name] for name in before}
    return workdir, result, traced


def test_a_run_writes_all_its_files(uninterrupted):
    workdir, result, traced = uninterrupted
    assert result == json.loads((workdir / "result.json").read_text())
    assert (result["steps"], result["tokens"], result["stopped"]) == (12, 12 * 8 * 8, None)
    assert (result["optimizer"], result["devices"], result["parameters"]) == ("AdamWOptions", 2, 16 * 16 + 2 * 16 * 32)
    assert (result["skipped_steps"], result["refreshes"]) == (0, 0)
    assert 0 < result["seconds"] < result["seconds_to_first_step"] + 600
    assert result["best_heldout_loss"] == result["heldout_loss"] < 2.7 < np.log(16)
    assert 0 < result["accuracy"] < 1
    assert traced["train"] == 1
    history = lines(workdir)
    assert [line["step"] for line in history if "train/loss" in line] == [*range(1, 13)]
    heldout = {line["step"]: line["heldout/loss"] for line in history if "heldout/loss" in line}
    assert list(heldout) == [4, 8, 12]
    assert heldout[12] == result["heldout_loss"]
    assert all(line["tokens"] == line["step"] * 64 for line in history)
    assert {"train/gradient_norm", "train/update_norm", "train/learning_rate", "train/skipped"} < set(history[0])
    assert json.loads((workdir / "config.json").read_text())["batch_size"] == 8
    assert "hidden/kernel" in (workdir / "parameters.txt").read_text()


def test_a_run_that_waits_for_its_input_says_so(tmp_path, monkeypatch, capsys):
    """Faults: the wait is not measured; the metric is missing."""
    read = toy.ToySource.__getitem__

    def slow(self, index):
        time.sleep(0.02)
        return read(self, index)

    monkeypatch.setattr(toy.ToySource, "__getitem__", slow)
    changes = {"duration": "6 steps", "input.threads": 1, "input.ahead": 1, "evaluation.every": "0 steps"}
    train(make_config(**changes | {"checkpoint.every": "0 steps"}), tmp_path / "run", devices=two())
    written = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["throughput/input_wait"] > 0.5 for line in written if "throughput/input_wait" in line] == [True] * 3
    assert re.search(r"tokens/s  waits for input \d+%", capsys.readouterr().out)


def test_heldout_loss_is_the_weighted_mean_over_all_rows_without_padding(uninterrupted):
    workdir, result, _ = uninterrupted
    source = toy.ToySource(20, 2)  # 20 rows in batches of 8: the last one is half padding
    batch = {name: np.stack([source[i][name] for i in range(20)]) for name in source[0]}
    variables = {"params": arrays(workdir, 12)["params"], "counters": {"batches": 0}}
    loss, _ = toy.ToyTask().loss(variables, batch, key=None, train=False)
    assert result["heldout_loss"] == pytest.approx(float(loss), rel=1e-5)


def test_keeps_last_and_best(uninterrupted):
    workdir, _, _ = uninterrupted
    assert saved(workdir) == [10, 12]  # the best is the last here


def test_a_finished_run_does_not_train_again(uninterrupted, capsys):
    workdir, result, _ = uninterrupted
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    traces = dict(toy.TRACES)
    assert train(make_config(), workdir, devices=two()) == result
    assert "complete after 12 steps" in capsys.readouterr().out
    assert traces == toy.TRACES
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*")} == before


@pytest.mark.parametrize(("step", "number"), [(7, signal.SIGINT), (8, signal.SIGTERM)], ids=["SIGINT", "SIGTERM"])
def test_stopped_by_a_signal_and_resumed_is_bitwise_the_uninterrupted_run(
    uninterrupted, tmp_path, monkeypatch, capsys, step, number
):
    whole, whole_result, _ = uninterrupted
    step_done = journal.Journal.step_done

    def kill_then(self, now, *measured):
        if now == step - 1:  # read while step `step` is in flight
            os.kill(os.getpid(), number)
        step_done(self, now, *measured)

    handlers = [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)]
    with monkeypatch.context() as patch:
        patch.setattr(journal.Journal, "step_done", kill_then)
        stopped = train(make_config(), tmp_path, devices=two())
    assert [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)] == handlers
    assert (stopped["stopped"], stopped["steps"]) == (number.name, step)
    assert saved(tmp_path)[-1] == step
    heldout = {line["step"]: line["heldout/loss"] for line in lines(whole) if "heldout/loss" in line}
    assert stopped["heldout_loss"] == heldout[(step - 1) // 4 * 4]  # a stopped run does not evaluate at its last step

    result = train(make_config(), tmp_path, devices=two())
    assert f"resuming from {tmp_path / 'checkpoints' / str(step)}" in capsys.readouterr().out
    history = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    restored = [line for line in history if line.get("checkpoint/restore_bytes", 0) > 1000]
    assert restored and restored[0]["step"] > step and restored[0]["checkpoint/restore_seconds"] > 0
    assert any(line.get("checkpoint/bytes", 0) > 1000 and line["checkpoint/seconds"] > 0 for line in history)
    assert lines(tmp_path) == lines(whole)
    assert saved(tmp_path) == saved(whole)
    jax.tree.map(np.testing.assert_array_equal, arrays(tmp_path, 12), arrays(whole, 12))
    changing = ("seconds", "seconds_to_first_step")
    assert {k: v for k, v in result.items() if k not in changing} == {
        k: v for k, v in whole_result.items() if k not in changing
    }
    assert result["seconds"] > stopped["seconds"]


def test_killed_between_checkpoints_drops_the_repeated_history(uninterrupted, tmp_path, monkeypatch):
    whole, _, _ = uninterrupted

    class Killed(BaseException):
        pass

    step_done = journal.Journal.step_done

    def die_at_8(self, now, *measured):
        if now == 8:
            raise Killed
        step_done(self, now, *measured)

    with monkeypatch.context() as patch:
        patch.setattr(journal.Journal, "step_done", die_at_8)
        with pytest.raises(Killed):
            train(make_config(), tmp_path, devices=two())
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "train/lo')
    assert saved(tmp_path) == [4, 5]
    train(make_config(), tmp_path, devices=two())
    assert lines(tmp_path) == lines(whole)
    jax.tree.map(np.testing.assert_array_equal, arrays(tmp_path, 12), arrays(whole, 12))


HOSTED = {"refresh": "host", "delay": 1}


def shampoo(schedule, **changes):
    return make_config(
        optimizer=base.component(SHAMPOO, block_size=8, interval=3, early_intervals=(), **schedule), **changes
    )


@pytest.fixture(scope="module")
def shampoo_runs(tmp_path_factory):
    """Train uninterrupted runs of `shampoo` on two devices, once each. Return schedule knobs -> (workdir, result)."""

    @functools.cache
    def run(**schedule):
        workdir = tmp_path_factory.mktemp("shampoo") / "whole"
        return workdir, train(shampoo(schedule), workdir, devices=two())

    return run


@pytest.mark.parametrize(
    "schedule",
    [
        pytest.param({}, id="staggered"),
        pytest.param({"refresh": "host"}, id="host", marks=pytest.mark.slow),
    ],
)
def test_shampoo_resumes_bitwise_and_on_another_number_of_devices(shampoo_runs, tmp_path, monkeypatch, schedule):
    """Faults: a checkpoint lacks state; statistics are assigned to other blocks."""
    whole, _ = shampoo_runs(**schedule)
    same, other = tmp_path / "same", tmp_path / "other"
    monkeypatch.setattr(Run, "signal", lambda self: "SIGINT" if self.step == 6 else None)
    train(shampoo(schedule), same, devices=two())
    monkeypatch.undo()
    shutil.copytree(same, other)
    train(shampoo(schedule), same, devices=two())
    assert lines(same) == lines(whole)
    jax.tree.map(np.testing.assert_array_equal, arrays(same, 12), arrays(whole, 12))
    train(shampoo(schedule, **{"mesh.fsdp": 2, "mesh.tensor": 2}), other, devices=jax.devices())
    for line, expected in zip(lines(other), lines(whole), strict=True):
        exact = {key: value for key, value in expected.items() if "residual" not in key}  # rounding error
        assert {key: line[key] for key in exact} == pytest.approx(exact, rel=1e-4)


def test_resumes_on_another_mesh(uninterrupted, tmp_path, monkeypatch):
    whole, _, _ = uninterrupted
    monkeypatch.setattr(Run, "signal", lambda self: "SIGINT" if self.step == 6 else None)
    train(make_config(), tmp_path, devices=two())
    monkeypatch.undo()
    other = make_config(**{"mesh.data": 1, "mesh.fsdp": 2, "mesh.tensor": 2})
    train(other, tmp_path, devices=jax.devices()[:4])
    for line, expected in zip(lines(tmp_path), lines(whole), strict=True):
        assert line == pytest.approx(expected, rel=1e-4)


def test_workdir_of_another_config_is_refused_and_not_changed(uninterrupted):
    workdir, _, _ = uninterrupted
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"belongs to another config .*batch_size: 8 -> 16"):
        train(make_config(batch_size=16), workdir, devices=two())
    assert {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 3}, "config.batch_size=3: must be divisible by 2 data shards. Use 2 or 4."),
        ({"mesh.fsdp": 16}, "needs 16 devices, but there are 2"),
        ({"resume_from": "nowhere"}, "resume_from nowhere has no checkpoint"),
        ({"sharding_rules": (("embed", "pipeline"),)}, 'names the mesh axis "pipeline"'),
        ({"compiler_options": ("xla_foo=1",)}, "XLA has no option xla_foo"),
    ],
    ids=["batch", "mesh", "resume_from", "rules", "compiler"],
)
def test_invalid_configs_are_refused_before_anything_is_written(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        train(make_config(**changes), tmp_path / "run", devices=two())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evaluation.best_metric": "bleu"}, "config.evaluation.best_metric='bleu': must be one of accuracy, loss."),
        ({"schedule.warmup": "20 steps"}, "warmup=20 steps: must be shorter than the run of 12 steps"),
        ({"sharding_rules": (("embed", None), ("mlp", None))}, r'parameter params/.*"vocab" has no rule'),
    ],
    ids=["metric", "warmup", "rule"],
)
def test_errors_found_after_reading_data_leave_no_workdir(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        train(make_config(**changes), tmp_path / "run", devices=two())
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize(("duration", "traces"), [("12 steps", 1), ("1 epochs", 0)])
def test_data_are_prepared_while_the_steps_are_compiled(tmp_path, monkeypatch, duration, traces):
    """Faults: compilation waits for the data; or it does not, although only the data tell the number of steps."""

    def prepare(self, cache):
        raise UserError(f"no data after {toy.TRACES['train'] - before} traces")

    before = toy.TRACES["train"]
    monkeypatch.setattr(toy.ToyData, "spec", _spec, raising=False)
    monkeypatch.setattr(toy.ToyData, "prepare", prepare)
    with pytest.raises(UserError, match=f"no data after {traces} traces"):
        train(make_config(duration=duration), tmp_path / "run", devices=two())
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_wrong_spec_of_the_data_is_refused(tmp_path, monkeypatch):
    """Fault: the step is compiled for other examples than the data have, and its first call ends in a traceback."""
    monkeypatch.setattr(
        toy.ToyData, "spec", lambda self: _spec(self) | {"weights": jax.ShapeDtypeStruct((8,), int)}, raising=False
    )
    with pytest.raises(UserError, match=r"an example has .*'float32\[8\]'.* tells .*'int32\[8\]'"):
        train(make_config(), tmp_path / "run", devices=two())
    assert not (tmp_path / "run" / "config.json").exists()


def _spec(data):
    return {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in toy.ToySource(1, 1)[0].items()}


def test_resume_from_continues_and_init_from_restarts(uninterrupted, tmp_path, capsys):
    whole, _, _ = uninterrupted
    longer = make_config(duration="14 steps", resume_from=str(whole))
    assert train(longer, tmp_path / "resumed", devices=two())["steps"] == 14
    assert f"continuing the run of resume_from {whole}" in capsys.readouterr().out
    assert lines(tmp_path / "resumed")[0]["step"] == 13
    assert lines(tmp_path / "resumed")[0]["tokens"] == 13 * 64

    config = make_config(init_from=str(whole), optimizer=base.component(ADAMW, nesterov=True))
    train(config, tmp_path / "tuned", devices=two())
    assert f"parameters from init_from {whole}" in capsys.readouterr().out
    first = lines(tmp_path / "tuned")[0]
    assert first["step"] == 1
    assert first["train/loss"] < lines(whole)[0]["train/loss"] - 0.2

    shorter = make_config(duration="11 steps", resume_from=str(whole))
    with pytest.raises(UserError, match=r"is at step 12, and config.duration=11 .* --config.duration='23 steps'"):
        train(shorter, tmp_path / "short", devices=two())


def test_another_schedule_from_a_checkpoint_warms_up_again(uninterrupted, tmp_path):
    """Faults: the rate stays near 0, as at the end of the first decay; the next start of the workdir has no warm-up."""
    whole, _, _ = uninterrupted
    assert json.loads((whole / "config.json").read_text())["schedule"]["begin"] == "0 steps"
    knobs = {"schedule.learning_rate": 0.03, "schedule.warmup": "50%", "resume_from": str(whole)}
    with pytest.raises(UserError, match=r"is at step 12, and .*, for example --config.duration='24 steps'"):
        train(make_config(**knobs), tmp_path / "none", devices=two())
    config = make_config(duration="18 steps", **knobs)
    train(config, tmp_path / "run", devices=two())
    assert config.schedule.begin == "auto"  # the caller's config may start further runs
    rates = [line["train/learning_rate"] for line in lines(tmp_path / "run") if "train/loss" in line]
    assert rates[:4] == pytest.approx([0.0075, 0.015, 0.0225, 0.03])  # the warm-up is half of the six steps
    assert rates[3] > rates[4] > rates[5] > 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["schedule"]["begin"] == "12 steps"
    assert train(config, tmp_path / "run", devices=two())["steps"] == 18  # complete, and no other config
    request = ownership.schedule_begin(origin.Origin("own", tmp_path / "run/checkpoints/18"), 18, config)
    assert request == "12 steps"


def test_too_many_skips_stop_the_run_with_a_checkpoint(tmp_path):
    config = make_config(task={"nan_from": 3}, **{"guard.max_consecutive_skips": 3})
    with pytest.raises(TrainingStopped, match=r"4 consecutive steps .*non-finite.*learning_rate.*checkpoint of step 7"):
        train(config, tmp_path, devices=two())
    stored = json.loads((tmp_path / "result.json").read_text())
    assert (stored["steps"], stored["skipped_steps"]) == (7, 4)  # 3, and the one in flight
    assert "4 consecutive steps" in stored["stopped"]
    assert saved(tmp_path)[-1] == 7
    assert int(arrays(tmp_path, 7)["model_state"]["counters"]["batches"]) == 3
    with pytest.raises(TrainingStopped, match=r"5 consecutive steps .*of step 8"):
        train(config, tmp_path, devices=two())


def test_bad_steps_in_a_row_stop_a_run_that_resumes_with_a_higher_limit(tmp_path, capsys):
    """Faults: the stop is forgotten because the step in flight was good; the run does not resume from its checkpoint as
    if it had not stopped; counts are not reported."""

    def config(**changes):
        task = {"nan_steps": (*range(4, 24), 27)}
        return make_config(task=task, duration="30 steps", gradient_clip=0.2, **changes)

    with pytest.raises(TrainingStopped, match=r"20 consecutive steps .*non-finite.*checkpoint of step 24"):
        train(config(), tmp_path / "run", devices=two())
    assert json.loads((tmp_path / "run" / "result.json").read_text())["skipped_steps"] == 20
    higher = config(**{"guard.max_consecutive_skips": 21})
    capsys.readouterr()
    result = train(higher, tmp_path / "run", devices=two())
    output = capsys.readouterr().out
    assert re.search(r"^step 28/30 .* skipped 21 ", output, re.M)
    assert (result["steps"], result["skipped_steps"]) == (30, 21)
    assert result["clipped_steps"] == lines(tmp_path / "run")[-2]["train/clipped"] > 0
    train(higher, tmp_path / "whole", devices=two())
    jax.tree.map(np.testing.assert_array_equal, arrays(tmp_path / "run", 30), arrays(tmp_path / "whole", 30))


def test_shampoo_trains_and_reports_its_diagnostics(shampoo_runs):
    workdir, result = shampoo_runs()
    assert result["optimizer"] == "ShampooOptions"
    assert result["refreshes"] > 0
    assert "optimizer/refreshes" in lines(workdir)[0]
    run = read_run(workdir)
    assert run.layers is not None and set(run.layers.values) == set(LAYER_METRICS)
    assert run.layers.steps[[0, -1]].tolist() == [1, result["steps"]]
    np.testing.assert_array_less(0, run.layers.values["condition"][:, -1])
    assert run.starts[-1]["total_steps"] == result["steps"]
    assert "shampoo" in (workdir / "parameters.txt").read_text()
    assert result["heldout_loss"] < 2.7


def test_a_failed_host_solver_ends_the_run_with_traceback_and_checkpoint(shampoo_runs, tmp_path, monkeypatch):
    """Faults: the run hangs or continues; the cause is not shown; the checkpoint lacks roots in flight."""
    config, broken = shampoo(HOSTED), tmp_path / "broken"
    whole, result = shampoo_runs(**HOSTED)
    assert result["refreshes"] > 0
    assert any(
        line["host/solves"] > 0 for line in map(json.loads, (whole / "metrics.jsonl").open()) if "host/busy" in line
    )
    solve, calls = lapack.inverse_root, []

    def dies(*arguments):
        calls.append(arguments)
        if len(calls) > 60:
            raise MemoryError("no memory left for LAPACK")
        return solve(*arguments)

    monkeypatch.setattr(lapack, "inverse_root", dies)
    with pytest.raises(
        TrainingStopped, match=r"MemoryError: no memory .*; a checkpoint of step \d+ is saved"
    ) as caught:
        train(config, broken, devices=two())
    assert isinstance(caught.value.__cause__.__cause__, MemoryError)
    code, output = launch_train.explain(caught.value)
    assert (code, "in dies" in output) == (1, True)
    assert output.splitlines()[-1].startswith("error: a thread that takes roots on the host died")
    monkeypatch.undo()
    stopped = json.loads((broken / "result.json").read_text())
    assert 2 < stopped["steps"] < 12 and "MemoryError" in stopped["stopped"]
    train(config, broken, devices=two())
    assert lines(broken) == lines(whole)
    jax.tree.map(np.testing.assert_array_equal, arrays(broken, 12), arrays(whole, 12))


def test_all_kinds_of_steps_share_one_trace(tmp_path):
    """Fault: a shape, type or Python value depends on the step, and every such step compiles again."""
    toy.TRACES["train"] = 0
    optimizer = base.component(SHAMPOO, block_size=16, interval=4, early_intervals=((20, 2),), start_step=6)
    config = make_config(
        optimizer=optimizer,
        task={"nan_seed": 1},
        **{
            "duration": "100 steps",
            "evaluation.every": "25 steps",
            "schedule.warmup": "20 steps",
            "log.every": "7 steps",
        },
    )
    result = train(config, tmp_path, devices=two())
    assert result["steps"] == 100 and result["skipped_steps"] > 3 and result["refreshes"] > 100
    assert len([line for line in lines(tmp_path) if "heldout/loss" in line]) >= 4
    assert toy.TRACES["train"] == 1


def test_a_failing_evaluation_loses_no_steps(tmp_path, monkeypatch):
    """Fault: a step is evaluated before it is saved, and all steps since the last save are lost."""

    def fail(*arguments):
        raise RuntimeError("RESOURCE_EXHAUSTED")

    monkeypatch.setattr(hooks, "evaluate", fail)
    with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
        train(make_config(**{"checkpoint.every": "4 steps"}), tmp_path, devices=two())
    assert saved(tmp_path) == [4]


def test_a_signal_ends_an_evaluation_within_a_batch(uninterrupted, tmp_path, monkeypatch):
    """Faults: a signal waits for the end of a long evaluation; an evaluation of some batches counts."""
    asked = []

    def later(self):
        asked.append(self.step)
        return "SIGTERM" if asked.count(8) == 4 else None  # after the step, at its pause and before two batches

    monkeypatch.setattr(Run, "signal", later)
    stopped = train(make_config(), tmp_path, devices=two())
    monkeypatch.undo()
    assert (stopped["stopped"], stopped["steps"], saved(tmp_path)[-1]) == ("SIGTERM", 8, 8)
    assert not [line for line in lines(tmp_path) if line["step"] == 8 and "heldout/loss" in line]
    train(make_config(), tmp_path, devices=two())
    assert lines(tmp_path) == lines(uninterrupted[0])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_was_ignored_at_the_start_stays_ignored(number):
    """Fault: a run in the background of a script stops when somebody presses Ctrl-C."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), number)
            assert signals.reason() is None
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_second_interrupt_aborts():
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.reason() == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_the_host_runs_exactly_one_step_ahead():
    events = []

    class Log:
        most_consecutive_skips, skipped = 0, 0
        speedometer = types.SimpleNamespace(waited_for_input=lambda seconds: None)

        def tokens(self, step):
            return 0

        def due(self, step):
            return step == 6

        def step_done(self, step, *measured):
            events.append(f"read {step} {measured}")

        def flush(self):
            events.append("flush")

    def step(state, batch):
        events.append(f"dispatch {batch}")
        return TrainState(None, None, f"after {batch}", None, None), "metrics"

    def diagnose(opt_state):
        return f"diagnosed {opt_state}", f"layers {opt_state}"

    class Service:
        def install(self, opt_state):
            events.append("install")
            return opt_state

        def take(self, opt_state):
            events.append(f"take {opt_state}")

    class Watch:
        def at(self, phase, step):
            phases.append((phase, step))

    class Clock(contextlib.nullcontext):
        seconds = 0.0

    phases = []
    run = object.__new__(Run)
    request = types.SimpleNamespace(config=base.get_config())
    run.blueprint = types.SimpleNamespace(total_steps=9, request=request)
    run.steps = {"train": step, "diagnose": diagnose}
    run.state, run.step, run.record, run.stopped = TrainState(None, None, None, None, None), 4, Record(), None
    run.service, run.journal, run.watch = Service(), Log(), Watch()
    run._batches, run._clock, run._made = iter("abc"), Clock(), 99
    run.signal = lambda: None
    run.advance(7)
    assert phases == [(phase, step) for step in (4, 5, 6) for phase in ("host roots", "data", "step")]
    assert events == [
        *["install", "dispatch a", "take after a"],
        *["install", "dispatch b", "take after b", "read 5 ('metrics',)"],
        *["install", "dispatch c", "take after c", "read 6 ('metrics', 'diagnosed after b', 'layers after b')"],
        *["read 7 ('metrics',)", "flush"],
    ]
