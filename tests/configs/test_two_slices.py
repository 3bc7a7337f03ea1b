import jax
import numpy as np
import pytest
import shrunk
from workdirs import history

from shampax.framework.config.check import load
from shampax.framework.train import train

# name -> (overrides, block size). Tests of other models train one of their variants on two slices.
SMALL = {
    "dlrm": ((*shrunk.DLRM, shrunk.DLRM_ROWS, "task.sparse_updates=True", "optimizer.weight_decay=0.0"), 4),
    "resnet": (shrunk.RESNET, 8),
}
CHANGES = (
    "mesh.fsdp=2",
    "optimizer.interval=2",
    "optimizer.early_intervals=()",
    "duration=4 steps",
    "evaluation.every=4 steps",
    "checkpoint.every=0 steps",
)


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_samples_train_on_two_slices_as_on_one(name, tmp_path):
    """Faults: a model does not compile for several slices; its loss, statistics or metrics are those of one slice."""
    changes, block_size = SMALL[name]
    for slices in (1, 2):
        own = (f"slices={slices}", f"optimizer.block_size={block_size}")
        config = load(f"shampax/configs/{name}.py:sample", [*changes, *CHANGES, *own])
        result = train(config, tmp_path / str(slices), devices=jax.devices()[:4])
        assert (result["steps"], result["devices"], result["skipped_steps"]) == (4, 4, 0) and result["refreshes"] > 0
    for key in ("train/loss", "train/update_norm", "heldout/loss"):
        one, two = (history(tmp_path / slices, key) for slices in ("1", "2"))
        np.testing.assert_allclose(two, one, rtol=1e-4, err_msg=key)
