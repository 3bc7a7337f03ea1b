import math

import jax
import numpy as np
import pytest
from shrunk import TRANSLATION as SMALL
from wmt14 import prepare_wmt14
from workdirs import cut_short, history

from shampax.configs import translation
from shampax.framework.config import components
from shampax.framework.config.check import load
from shampax.framework.train import train

SHAMPOO = ("optimizer.block_size=16", "optimizer.early_intervals=()", "optimizer.interval=2")


def run(workdir, *changes, variant="sample"):
    shampoo = {"sample": SHAMPOO, "base": SHAMPOO[:1], "paper": SHAMPOO[:1], "sample_adam": ()}[variant]
    config = load(
        f"shampax/configs/translation.py:{variant}",
        [*SMALL, *shampoo, "schedule.decay=constant", "evaluation.every=3 steps", *changes],
    )
    return train(config, workdir, devices=jax.devices()[:2])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Train the shrunk sample to its end on two devices."""
    workdir = tmp_path_factory.mktemp("translation") / "whole"
    return workdir, run(workdir, "duration=6 steps")


def test_the_sample_is_trained_and_judged(whole):
    """Faults: the held-out loss has label smoothing; BLEU is missing or of only some examples."""
    workdir, result = whole
    assert (result["steps"], result["devices"], result["skipped_steps"]) == (6, 2, 0)
    assert result["heldout_loss"] == result["nats_per_token"] < history(workdir, "heldout/loss")[0] < math.log(400)
    assert 0 <= result["bleu"] <= 100
    assert history(workdir, "heldout/bleu") == [result["bleu"]]
    assert result["refreshes"] > 0


@pytest.mark.slow
def test_a_resumed_run_is_the_same_bit_for_bit(whole, tmp_path):
    """Fault: a resumed run restarts dropout or the order of the rows."""
    workdir, result = whole
    first = cut_short(workdir, tmp_path / "first", 3)
    again = run(tmp_path / "second", "duration=6 steps", f"resume_from={first}")
    assert (again["heldout_loss"], again["bleu"]) == (result["heldout_loss"], result["bleu"])
    assert history(tmp_path / "second", "train/loss") == history(workdir, "train/loss")[3:]


def test_golden_steps(whole):
    """Fault: an unintended change of initialisation, data, dropout, model, loss or optimizer."""
    golden = {
        "train/loss": [5.99876, 5.72383, 5.19674],
        "train/gradient_norm": [0.30568, 0.89702, 0.29083],
        "train/update_norm": [1.64028, 2.32112, 1.82273],
    }
    for key, values in golden.items():
        np.testing.assert_allclose(history(whole[0], key)[:5:2], values, rtol=2e-3, err_msg=key)


@pytest.mark.slow
def test_the_baseline_trains(tmp_path):
    """Faults: a baseline does not build; it is not AdamW on the sample's data."""
    result = run(tmp_path, "duration=2 steps", "evaluation.batches=1", variant="sample_adam")
    assert (result["optimizer"], result["steps"]) == ("AdamWOptions", 2)
    assert np.isfinite(result["heldout_loss"])


@pytest.fixture(scope="module")
def wmt14(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tfds")
    words = np.random.default_rng(0).integers(0, 9, (52, 8))
    pairs = [(" ".join(f"le{word}" for word in row), " ".join(f"the{word}" for word in row)) for row in words]
    for config in ("fr-en", "de-en"):
        prepare_wmt14(directory, config, {"train": pairs[:40], "validation": pairs[40:44], "test": pairs[44:]})
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["base", "paper"])
def test_wmt14_config_trains(variant, wmt14, tmp_path, capsys):
    """Faults: a shipped config for real data cannot find, read, compile or train on them, or not on two slices."""
    slices = {"base": 1, "paper": 2}[variant]
    result = run(tmp_path, f"data.data_dir={wmt14}", "duration=3 steps", f"slices={slices}", variant=variant)
    assert (result["steps"], result["devices"], result["skipped_steps"]) == (3, 2, 0)
    assert np.isfinite(result["heldout_loss"]) and 0 <= result["bleu"] <= 100
    assert "sacrebleu nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:" in capsys.readouterr().out


@pytest.mark.parametrize(("variant", "millions"), [("base", 60.8), ("paper", 209.7)])
def test_sizes_are_those_of_vaswani_et_al(variant, millions):
    """Faults: a layer is missing; the head is untied. The published 65 M and 213 M are with 37,000 tokens and
    biases."""
    config = translation.get_config(variant)
    task, data = components.build(config.task), components.build(config.data)
    spec = {name: jax.ShapeDtypeStruct((1, *x.shape), x.dtype) for name, x in data.spec().items()}
    shapes = jax.eval_shape(lambda: task.init(jax.random.key(0), spec))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) / 1e6 == pytest.approx(millions, abs=0.05)
