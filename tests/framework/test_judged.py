"""Test metrics over all held-out examples together, and augmented examples, with the trainer."""

import json
from types import SimpleNamespace

import jax
import pytest
import toy

from shampax.configs import base
from shampax.framework import hooks
from shampax.framework.base.errors import UserError
from shampax.framework.train import train


def make_config(**changes):
    config = base.get_config()
    config.task = base.component("toy_judged:JudgedTask")
    config.data = base.component("toy_judged:AugmentedData", heldout_rows=21)
    config.optimizer = base.component("shampax.optimizers.baselines:AdamWOptions")
    config.duration = "12 steps"
    config.batch_size = 8
    config.evaluation.every = "3 steps"
    config.evaluation.judge_every = "6 steps"
    config.checkpoint.every = "4 steps"
    config.checkpoint.keep_best = 0
    config.update_from_flattened_dict(changes)
    return config


def heldout(workdir):
    read = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in read if "heldout/loss" in line}


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """Train a complete run on 4 devices."""
    workdir = tmp_path_factory.mktemp("judged")
    return workdir, train(make_config(), workdir, devices=jax.devices()[:4])


def test_judged_metrics_are_over_all_examples(judged):
    """Faults: padding examples are judged; the mean of the batches' medians is used as the median of all."""
    workdir, result = judged
    assert result["examples"] == 21
    assert {step for step, line in heldout(workdir).items() if "heldout/median" in line} == {6, 12}
    assert heldout(workdir)[12]["heldout/median"] == result["median"]


def test_judged_metrics_are_the_same_on_another_mesh(judged, tmp_path):
    """Fault: predictions are in the order of devices."""
    again = train(make_config(**{"mesh.fsdp": 2}), tmp_path, devices=jax.devices()[:2])
    assert again["median"] == pytest.approx(judged[1]["median"], rel=1e-5)


def test_a_judged_example_is_logged(tmp_path, capsys):
    """Faults: the line is missing; the text is not of the first example; the limit of batches is ignored."""
    config = make_config(**{"duration": "2 steps", "evaluation.batches": 1, "evaluation.sample": False})
    assert train(config, tmp_path, devices=jax.devices()[:2])["examples"] == 8
    text = " ".join(map(str, toy.ToySource(21, 2)[0]["tokens"]))
    assert f"judged from '{text}' on" in capsys.readouterr().out


def test_augmented_run_resumes_bitwise(tmp_path):
    """Fault: a resumed run uses the augmentation of its first steps or none."""

    def run(duration, workdir, **changes):
        config = make_config(**{"schedule.decay": "constant", "schedule.warmup": "0 steps"} | changes)
        config.duration = duration
        return train(config, tmp_path / workdir, devices=jax.devices()[:4])

    whole = run("12 steps", "whole")
    run("8 steps", "first")
    again = run("12 steps", "second", resume_from=str(tmp_path / "first"))
    assert (again["heldout_loss"], again["median"]) == (whole["heldout_loss"], whole["median"])


def test_several_held_out_sets(tmp_path):
    """Faults: a set is measured on another's examples; checkpoints cannot be ranked by a set."""
    changes = {"evaluation.sets": ("other.heldout_rows=13", "more.heldout_rows=21"), "duration": "6 steps"}
    changes |= {"evaluation.best_metric": "other/median", "evaluation.best_mode": "min"}
    result = train(make_config(**changes), tmp_path, devices=jax.devices()[:4])
    assert (result["examples"], result["other/examples"], result["more/examples"]) == (21, 13, 21)
    assert result["more/loss"] == result["heldout_loss"] != result["other/loss"]
    measured = heldout(tmp_path)
    assert measured.keys() == {3, 6} and measured[6]["heldout/other/median"] == result["other/median"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evaluation.sets": ("heldout_rows=13",)}, "'heldout_rows=13' is not of the form name.knob=value"),
        ({"evaluation.sets": ("a.rows_held=1",)}, "config.evaluation.sets: a: unknown key 'config.data.rows_held'"),
        ({"evaluation.sets": ("a.name=toy_long:LongData",)}, r"a: an example has .*int32\[17\].* Use the same shapes"),
        ({"evaluation.best_metric": "a/loss"}, "best_metric='a/loss': must be one of accuracy, loss, median, examples"),
    ],
)
def test_further_held_out_sets_are_checked_before_training(changes, message, tmp_path):
    """Fault: a wrong set is found at the first evaluation, hours into a run."""
    with pytest.raises(UserError, match=message):
        train(make_config(**changes), tmp_path, devices=jax.devices()[:2])


def test_only_process_0_judges(tmp_path, monkeypatch):
    """Fault: every process of a large job scores all held-out examples."""
    first = SimpleNamespace(first=lambda work: [{"median": 1.0, "examples": 2.0}, ""])
    monkeypatch.setattr(hooks, "agreement", first)
    assert train(make_config(duration="2 steps"), tmp_path, devices=jax.devices()[:2])["median"] == 1.0
