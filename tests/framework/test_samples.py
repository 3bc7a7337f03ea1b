"""Test samples of text during training, with the trainer."""

import json

import jax
import numpy as np
import pytest
from toy_runs import arrays, lines, make_config, saved, two
from workdirs import cut_short

from shampax.configs import base
from shampax.framework.base.errors import UserError
from shampax.framework.train import train


def speaking(**changes):
    config = make_config(
        **{"samples.every": "6 steps", "samples.prompts": ("a", "10b"), "samples.tokens": 5, **changes}
    )
    config.task = base.component("toy_speaking:SpeakingTask")
    config.data = base.component("toy_speaking:SpeakingData")
    return config


def samples(workdir):
    return [json.loads(line) for line in (workdir / "samples.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Train a complete run with samples on two devices."""
    workdir = tmp_path_factory.mktemp("samples") / "run"
    train(speaking(trackers=("tensorboard",)), workdir, devices=two())
    return workdir


def test_samples_are_written_and_shown(run, capsys):
    """Faults: samples of other steps or prompts; the last step has none; TensorBoard cannot read them."""
    found = samples(run)
    assert [(each["step"], each["prompt"]) for each in found] == [(6, "a"), (6, "10b"), (12, "a"), (12, "10b")]
    assert all(len(each["text"]) == 5 for each in found)
    tensorboard = pytest.importorskip("tensorboard.backend.event_processing.event_file_loader")
    (events,) = run.glob("events.out.tfevents.*")
    values = [value for event in tensorboard.EventFileLoader(str(events)).Load() for value in event.summary.value]
    texts = [value for value in values if value.metadata.plugin_data.plugin_name == "text"]
    assert [value.tag for value in texts] == ["samples/0", "samples/1"] * 2
    assert texts[0].tensor.string_val[0].decode() == f"**a**{found[0]['text']}"


def test_the_run_does_not_depend_on_samples(run, tmp_path):
    """Faults: samples change the parameters or the history; they are on by default."""
    train(speaking(**{"samples.every": "0 steps"}), tmp_path / "silent", devices=two())
    assert not (tmp_path / "silent" / "samples.jsonl").exists()
    assert lines(run) == lines(tmp_path / "silent")
    with_samples, without = (arrays(path, saved(path)[-1]) for path in (run, tmp_path / "silent"))
    for mine, other in zip(*map(jax.tree.leaves, (with_samples, without)), strict=True):
        np.testing.assert_array_equal(mine, other)


def test_a_resumed_run_has_the_same_samples(run, tmp_path):
    """Faults: samples after the checkpoint stay, or come twice."""
    copy = cut_short(run, tmp_path / "copy", 10)
    train(speaking(), copy, devices=two())
    assert samples(copy) == samples(run)


def test_what_cannot_speak_is_refused(tmp_path):
    """Fault: a run fails at its first sample instead of its start."""
    config = make_config(**{"samples.every": "50%"})
    with pytest.raises(
        UserError, match=r"config.samples.every=50%: config.task.name=toy:ToyTask cannot continue texts"
    ):
        train(config, tmp_path / "a", devices=two())
    config.task = base.component("toy_speaking:SpeakingTask")
    with pytest.raises(UserError, match=r"config.data.name=toy:ToyData cannot continue texts. Use 0 steps"):
        train(config, tmp_path / "b", devices=two())
    with pytest.raises(UserError, match=r"config.samples.prompts=\(\): no text to continue"):
        train(speaking(**{"samples.prompts": ()}), tmp_path / "c", devices=two())
