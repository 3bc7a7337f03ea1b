import pathlib

import numpy as np
import pytest

from shampax.framework.reporting import page
from shampax.framework.reporting.curves import Group
from shampax.framework.reporting.runs import Run

STEPS = np.arange(10, 61, 10)


def made(label, *curves, key="heldout/loss", hours=0.001):
    points = [
        tuple(
            {"step": step, "seconds": 3600 * hours * step, "tokens": 100 * step, key: value}
            for step, value in zip(STEPS.tolist(), np.asarray(curve, float).tolist(), strict=True)
        )
        for curve in curves
    ]
    return Group(label, tuple(Run(pathlib.Path(label), each, {}, None, ()) for each in points))


@pytest.mark.parametrize(("axis", "scale"), [("step", 1), ("seconds", 3.6), ("tokens", 100)])
def test_a_run_is_drawn_as_measured(axis, scale):
    group = made("run", 60 - STEPS)
    (line,) = page.chart([group], ("heldout/loss", "train/loss"), axis).data
    np.testing.assert_allclose(line.x, scale * STEPS)
    np.testing.assert_allclose(line.y, 60 - STEPS)


def test_a_long_run_is_thinned_between_its_ends():
    """Fault: the page of a long run has a million points."""
    points = tuple({"step": step, "seconds": 1.0, "tokens": 1, "loss": float(step)} for step in range(1, 5001))
    (line,) = page.chart([Group("long", (Run(pathlib.Path("long"), points, {}, None, ()),))], ("loss",)).data
    assert (len(line.x), line.x[0], line.x[-1]) == (1000, 1, 5000)
    np.testing.assert_array_equal(line.x, line.y)


def test_the_time_of_a_long_run_is_in_hours():
    figure = page.chart([made("run", STEPS, hours=0.5)], ("heldout/loss", "train/loss"), "seconds")
    assert "hours" in figure.layout.xaxis.title.text
    assert figure.data[0].x[-1] == 30


def test_images_are_not_called_tokens():
    keys = ("heldout/loss", "train/loss")
    for key, expected in (("throughput/examples_per_second", "examples"), ("throughput/tokens_per_second", "tokens")):
        figure = page.chart([made("run", STEPS, key=key)], keys, "tokens")
        assert figure.layout.xaxis.title.text == expected


def test_seeds_are_drawn_as_their_mean_with_their_range():
    band, line = page.chart([made("seeds", STEPS, STEPS + 1, STEPS + 5)], ("heldout/loss", "train/loss")).data
    np.testing.assert_allclose(line.y, STEPS + 2)
    assert {y for x, y in zip(band.x, band.y, strict=True) if x == 60} == {60, 65}


def test_values_over_many_decades_have_a_logarithmic_axis():
    key = "optimizer/residual_max"
    for values, kind in ((10.0 ** -(STEPS / 10), "log"), (STEPS, None), (0 * STEPS, None), (STEPS - 10, None)):
        figure = page.chart([made("run", values, key=key)], (key,))
        assert figure.layout.yaxis.type == kind
        assert figure.layout.title.text == "residual_max"


def test_the_race_takes_the_highest_end_as_the_target():
    slow, fast = made("slow", 62 - STEPS), made("fast", 62 - 2 * STEPS)
    heading, *rows = page.race([fast, slow])
    assert heading[0] == "falls to 2.0000, the end of slow, after"
    assert rows == [
        ["fast", "30 (50%)", "108 (50%)", "3,000 (50%)"],
        ["slow", "60 (100%)", "216 (100%)", "6,000 (100%)"],
    ]
    assert page.race([fast]) == []
