import imagenet
import jax
import numpy as np
import pytest
from shrunk import VIT
from workdirs import history

from shampax.framework.config.check import load
from shampax.framework.train import train


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tfds")
    imagenet.prepare(directory, {"train": imagenet.photos(40), "validation": imagenet.photos(21, 40)})
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["sample", "s16_adamw", "b16"])
def test_variants_train(variant, tfds_dir, tmp_path):
    """Faults: a shipped config does not build, compile or train; augmented images do not fit the model; an average
    does not follow the parameters; the model does not compile for two slices."""
    changes = [*VIT, "duration=3 steps", "evaluation.every=0 steps"]
    if variant != "sample":
        changes += [f"data.data_dir={tfds_dir}", "data.image_size=32"]
    if variant != "s16_adamw":
        changes += ["optimizer.block_size=16", "optimizer.interval=2"]
    changes += ["slices=2"] if variant == "b16" else []
    config = load(f"shampax/configs/vit.py:{variant}", changes)
    result = train(config, tmp_path, devices=jax.devices()[:2])
    assert (result["steps"], result["skipped_steps"]) == (3, 0)
    assert np.isfinite(result["heldout_loss"]) and 0 <= result["accuracy"] <= result["top5"] <= 1
    assert (result.get("refreshes", 0) > 0) == (variant != "s16_adamw")
    assert len(set(history(tmp_path, "train/loss"))) == 3
