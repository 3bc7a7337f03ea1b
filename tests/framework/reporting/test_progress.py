import numpy as np
import pytest

from shampax.framework.reporting import progress
from shampax.framework.reporting.progress import Clock, seconds_since_process_start
from shampax.framework.sharding import meshes
from shampax.framework.step.evaluation import evaluate


def test_speed_leaves_the_first_step_out():
    mesh = meshes.make_mesh({"data": -1})
    meter = progress.Speedometer(mesh, total_steps=100, examples_per_step=4, tokens_per_step=64, flops_per_step=1e9)
    assert meter.read(1, 30.0) == {}
    meter.warmed_up(1, 30.0)
    assert meter.read(1, 30.0) == {}
    assert meter.remaining(1, 30.0) is None
    names = [f"throughput/{each}" for each in ("steps_per_second", "examples_per_second", "tokens_per_second")]
    wait = {"throughput/input_wait": 0.0}
    assert meter.read(11, 35.0) == dict(zip(names, (2, 8, 128), strict=True)) | wait  # the peak of a CPU is not known
    assert meter.read(31, 40.0) == dict(zip(names, (4, 16, 256), strict=True)) | wait
    assert meter.remaining(31, 40.0) == pytest.approx(69 / 3)


def test_the_share_of_the_time_that_the_input_takes():
    """Faults: the wait before the first step, while the readers start, counts; a wait counts in two intervals; a run
    that waits for its disk looks like one that computes."""
    mesh = meshes.make_mesh({"data": -1})
    meter = progress.Speedometer(mesh, total_steps=9, examples_per_step=32, tokens_per_step=32, flops_per_step=1.0)
    meter.waited_for_input(50.0)
    meter.warmed_up(1, 60.0)
    values = {"train/loss": 2.5, "train/learning_rate": 0.01, "train/skipped": 0}
    for step, seconds, waits, shown in ((2, 62.0, (0.5, 1.0), True), (3, 64.0, (0.05,), False)):
        for wait in waits:
            meter.waited_for_input(wait)
        speed = meter.read(step, seconds)
        assert speed["throughput/input_wait"] == pytest.approx(sum(waits) / 2)
        line = progress.progress_line(step, 9, values | speed, None)
        assert line.endswith("examples/s  waits for input 75%" if shown else "examples/s")


def test_images_and_clicks_are_not_counted_as_tokens():
    """Fault: 32 images a second are shown as 32 tokens/s."""
    mesh = meshes.make_mesh({"data": -1})
    meter = progress.Speedometer(mesh, total_steps=9, examples_per_step=32, tokens_per_step=32, flops_per_step=1.0)
    meter.warmed_up(1, 0.0)
    speed = meter.read(2, 0.01)
    assert "throughput/tokens_per_second" not in speed
    values = {"train/loss": 2.5, "train/learning_rate": 0.01, "train/skipped": 0}
    assert progress.progress_line(2, 9, values | speed, None).endswith("  100 steps/s  3.2k examples/s")


def test_padding_is_no_speed(monkeypatch):
    """Faults: a batch of padding counts as trained tokens; the shares of an earlier interval count again."""
    monkeypatch.setattr(progress.chips, "peak_flops", lambda kind: 1e12)
    mesh = meshes.make_mesh({"data": -1})
    meter = progress.Speedometer(mesh, total_steps=9, examples_per_step=4, tokens_per_step=64, flops_per_step=8e12)
    meter.warmed_up(1, 0.0)
    for real in (1.0, 0.5):
        meter.step_done(real)
    speed = meter.read(3, 2.0)
    assert speed["throughput/tokens_per_second"] == 0.75 * 64
    assert speed["throughput/mfu"] == pytest.approx(0.75)
    assert speed["throughput/examples_per_second"] == 4
    meter.step_done(0.25)
    assert meter.read(4, 3.0)["throughput/tokens_per_second"] == 0.25 * 64


def test_mfu_is_relative_to_the_peak_of_all_devices(monkeypatch):
    monkeypatch.setattr(progress.chips, "peak_flops", lambda kind: 1e12)
    mesh = meshes.make_mesh({"data": -1})
    meter = progress.Speedometer(mesh, total_steps=100, examples_per_step=4, tokens_per_step=64, flops_per_step=1e12)
    meter.warmed_up(1, 0.0)
    speed = meter.read(5, 2.0)
    assert speed["throughput/mfu"] == pytest.approx(2 / 8)
    values = {"train/loss": 2.5, "train/learning_rate": 0.01, "train/skipped": 3} | speed
    assert progress.progress_line(5, 100, values, 61) == (
        "step   5/100  loss 2.5000  learning rate 1.00e-02  skipped 3  2 steps/s  128 tokens/s  MFU 25.0%  ETA 0:01:01"
    )
    assert "  skipped 3  " in progress.progress_line(5, 100, values, 61)


def test_clock_counts_only_while_entered(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    clock = Clock(5.0)
    now[0] += 10
    assert clock.seconds == 5.0
    with clock:
        now[0] += 2
        assert clock.seconds == 7.0
    now[0] += 10
    assert clock.seconds == 7.0


def test_process_start_time():
    first = seconds_since_process_start()
    assert 0 < first < seconds_since_process_start() + 1e-9 < 86_400


def test_evaluation_adds_up_in_order_and_divides_once():
    batches = [(1.0, 1.0), (30.0, 3.0), (0.0, 0.0)]
    step = lambda variables, batch: {"loss": batch, "none": (0.0, 0.0)}  # noqa: E731
    values = evaluate(step, None, batches)
    assert values["loss"] == 31 / 4
    assert np.isnan(values["none"])
