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
    names = ["throughput/steps_per_second", "throughput/examples_per_second", "throughput/tokens_per_second"]
    assert meter.read(11, 35.0) == dict(zip(names, (2, 8, 128), strict=True))  # the peak of a CPU is not known
    assert meter.read(31, 40.0) == dict(zip(names, (4, 16, 256), strict=True))
    assert meter.remaining(31, 40.0) == pytest.approx(69 / 3)


def test_images_and_clicks_are_not_counted_as_tokens():
    """Fault: 32 images a second are shown as 32 tokens/s."""
    mesh = meshes.make_mesh({"data": -1})
    meter = progress.Speedometer(mesh, total_steps=9, examples_per_step=32, tokens_per_step=32, flops_per_step=1.0)
    meter.warmed_up(1, 0.0)
    speed = meter.read(2, 0.01)
    assert "throughput/tokens_per_second" not in speed
    values = {"train/loss": 2.5, "train/learning_rate": 0.01, "train/skipped": 0}
    assert progress.progress_line(2, 9, values | speed, None).endswith("  100 steps/s  3.2k examples/s")


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
