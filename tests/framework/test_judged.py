"""Test metrics over all held-out examples together, and augmented examples, with the trainer."""

import json

import jax
import pytest
import toy

from shampax.configs import base
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
