import json

import numpy as np
import pytest

from shampax.framework.base import workdir
from shampax.framework.base.errors import UserError
from shampax.framework.reporting import runs


def write(path, lines, tail=""):
    path.mkdir(parents=True, exist_ok=True)
    (path / workdir.METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)


def point(step, **values):
    return {"step": step, "seconds": step / 2, "tokens": step * 100} | values


def test_curve_has_only_points_with_the_key(tmp_path):
    write(tmp_path, [point(1, a=3.0), point(2, b=9.0), point(3, a=2.5), point(4, a=None), point(5, a=1)])
    x, y = runs.read_run(tmp_path).curve("a", "seconds")
    np.testing.assert_array_equal(x, [0.5, 1.5, 2.0, 2.5])
    np.testing.assert_array_equal(y, [3.0, 2.5, np.nan, 1.0])


def test_curve_of_a_key_never_measured_is_empty(tmp_path):
    write(tmp_path, [point(1, a=3.0)])
    x, y = runs.read_run(tmp_path).curve("b", "step")
    assert x.shape == y.shape == (0,)


def test_lines_of_one_step_are_one_point(tmp_path):
    write(tmp_path, [point(10, **{"train/loss": 2.0}), point(10, **{"heldout/loss": 3.0})])
    run = runs.read_run(tmp_path)
    assert {axis: values.tolist() for axis, values in run.points.axes.items()} == {
        "step": [10],
        "seconds": [5],
        "tokens": [1000],
    }
    assert (run.last("train/loss"), run.last("heldout/loss")) == (2, 3)
    assert run.keys() == ["heldout/loss", "train/loss"]


def test_truncated_last_line_is_left_out_with_a_note(tmp_path):
    write(tmp_path, [point(1, a=1.0)], tail='{"step": 2, "a": 0.')
    run = runs.read_run(tmp_path)
    assert (run.steps, run.last("a")) == (1, 1)
    assert any("line 2" in note for note in run.notes)


def test_result_and_config_are_read_and_their_absence_allowed(tmp_path):
    write(tmp_path, [point(1, a=1.0)])
    assert runs.read_run(tmp_path).result is None
    assert runs.read_run(tmp_path).config == {}
    result = {"steps": 1, "seconds": 0.5, "tokens": 9, "heldout_loss": None, "best_heldout_loss": None, "stopped": None}
    (tmp_path / workdir.RESULT).write_text(json.dumps(result))
    (tmp_path / workdir.CONFIG).write_text('{"seed": 3}')
    run = runs.read_run(tmp_path)
    assert (run.result, run.config, run.notes) == (result, {"seed": 3}, ())


@pytest.mark.parametrize("content", [None, "", "not json\n"])
def test_no_metrics_is_a_user_error(tmp_path, content):
    if content is not None:
        (tmp_path / workdir.METRICS).write_text(content)
    with pytest.raises(UserError, match="metrics"):
        runs.read_run(tmp_path)


def test_no_folder_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="not a directory"):
        runs.read_run(tmp_path / "absent")


def test_damaged_result_is_a_user_error(tmp_path):
    write(tmp_path, [point(1, a=1.0)])
    (tmp_path / workdir.RESULT).write_text("{")
    with pytest.raises(UserError, match=r"result\.json"):
        runs.read_run(tmp_path)


def test_layers_are_read_until_their_table_changes(tmp_path):
    """Faults: layers of another optimizer join the table; a damaged line ends the report."""
    write(tmp_path, [point(1)])
    metrics = {name: [1.0, None] for name in runs.LAYER_METRICS}
    lines = [
        {"step": 1, "names": ["other"], **{name: [5.0] for name in runs.LAYER_METRICS}},
        {"step": 2, "names": ["a", "b"], **metrics},
        {"step": 3, "names": 7, **metrics},
        {"step": 4, **metrics, "condition": [1.0]},
    ]
    (tmp_path / workdir.LAYERS).write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 5, "na')
    layers = runs.read_run(tmp_path).layers
    assert layers.names == ("a", "b") and layers.steps.tolist() == [2, 3]
    np.testing.assert_array_equal(layers.values["condition"], [[1, 1], [np.nan, np.nan]])
