import pathlib

import numpy as np
import pytest

from shampax.framework.reporting import curves
from shampax.framework.reporting.runs import Run, measured


def make_run(path="run", *, config=None, **columns):
    names, values = list(columns), zip(*columns.values(), strict=True)
    points = [
        {"step": i, "seconds": 0, "tokens": 0} | dict(zip(names, row, strict=True)) for i, row in enumerate(values)
    ]
    return Run(pathlib.Path(path), measured(points), config or {}, None)


def make_group(*runs):
    return curves.Group("group", runs)


def test_groups_differ_in_more_than_the_seed():
    runs = [
        make_run("runs/a-seed0", config={"seed": 0, "rate": 1}),
        make_run("runs/b", config={"seed": 0, "rate": 2}),
        make_run("runs/a-seed1", config={"seed": 1, "rate": 1}),
    ]
    first, second = curves.groups(runs)
    assert (first.label, first.runs) == ("a-seed0 and 1 more", (runs[0], runs[2]))
    assert (second.label, second.runs) == ("b", (runs[1],))


def test_runs_without_a_config_are_never_one_group():
    assert len(curves.groups([make_run("a"), make_run("b")])) == 2


@pytest.mark.parametrize(
    ("paths", "labels"),
    [
        (["/x/a"], ["a"]),
        (["/x/a", "/x/b"], ["a", "b"]),
        (["/x/a/run", "/x/b/run"], ["a/run", "b/run"]),
        (["/x/a", "/x/y/b"], ["a", "y/b"]),
    ],
)
def test_labels_are_paths_in_the_common_folder(paths, labels):
    runs = [make_run(path, config={"rate": rate}) for rate, path in enumerate(paths)]
    assert [group.label for group in curves.groups(runs)] == labels


def test_band_of_one_run_is_its_curve_without_gaps():
    run = make_run(step=[1, 2, 4], loss=[3.0, None, 1.0])
    line = curves.band(make_group(run), "loss", "step")
    np.testing.assert_array_equal(line.x, [1, 4])
    for values in (line.mean, line.low, line.high):
        np.testing.assert_array_equal(values, [3, 1])
    assert line.end == 1.0


def test_band_of_seeds_at_common_steps_is_their_mean_and_range():
    runs = [make_run(step=[10, 20], loss=[4.0, low]) for low in (1.0, 2.0, 6.0)]
    line = curves.band(make_group(*runs), "loss", "step")
    np.testing.assert_array_equal(line.x, [10, 20])
    np.testing.assert_allclose(line.mean, [4, 3])
    np.testing.assert_allclose(line.low, [4, 1])
    np.testing.assert_allclose(line.high, [4, 6])


def test_band_interpolates_over_the_common_range_only():
    runs = [make_run(seconds=[0, 4], loss=[8.0, 4.0]), make_run(seconds=[2, 6], loss=[10.0, 2.0])]
    line = curves.band(make_group(*runs), "loss", "seconds")
    np.testing.assert_array_equal(line.x, [2, 4])
    np.testing.assert_allclose(line.low, [6, 4])
    np.testing.assert_allclose(line.high, [10, 6])


def test_band_is_empty_where_a_run_has_no_finite_point():
    runs = [make_run(step=[1], loss=[1.0]), make_run(step=[1], loss=[None])]
    line = curves.band(make_group(*runs), "loss", "step")
    assert line.x.shape == line.mean.shape == (0,)
    assert line.end is None


@pytest.mark.parametrize(
    ("target", "expected"), [(3.0, 15.0), (2.0, 20.0), (4.0, 10.0), (9.0, 10.0), (0.5, None), (1.5, 35.0)]
)
def test_reach_interpolates_to_the_first_crossing(target, expected):
    x = np.array([10.0, 20.0, 30.0, 40.0, 50.0])
    y = np.array([4.0, 2.0, np.nan, 1.0 + 1 / 3, 5.0])
    # Between 20 and 40 the line falls from 2 to 4/3; 1.5 is at three quarters.
    assert curves.reach(x, y, target) == (None if expected is None else pytest.approx(expected))


def test_differences_names_differing_keys():
    configs = [{"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 5}}]
    assert curves.differences(configs) == {"a.c": [2, 5], "d": [3, None]}


def test_a_long_band_is_thinned_to_means_within_its_range():
    """Faults: the page of a long run has a million points; a spike or the last value is lost."""
    y = np.linspace(9, 1, 10_001)
    y[5_000] = 50
    line = curves.thinned(curves.Band(np.arange(10_001.0), y, y, y), 400)
    assert len(line.x) <= 400 and np.all(np.diff(line.x) > 0)
    assert (line.x[0], line.x[-1], line.mean[0], line.mean[-1]) == (0, 10_000, 9, 1)
    assert line.high.max() == 50 and line.mean.max() < 10
    assert np.sum(line.x < 100) > 20  # the beginning of the run on a logarithmic axis
    short = curves.Band(*np.ones((4, 400)))
    assert curves.thinned(short, 400) is short


def test_runs_on_other_data_or_tokenizers_have_other_targets():
    """Faults: losses per token of two tokenizers are compared; a copy of the data counts as other data."""

    def same(**changed):
        config = {"task": {"name": "lm"}, "data": {"source": "a", "vocab_size": 10, "workers": 1}}
        other = {"task": {"name": "lm", "layers": 9}, "data": config["data"] | changed}
        return curves.same_targets([make_group(make_run(config=each)) for each in (config, other)])

    assert same() and same(workers=4) and same(data_dir="/elsewhere")
    assert not same(source="b") and not same(vocab_size=20) and not same(tokenizer="own.json")
