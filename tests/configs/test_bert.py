import jax
import numpy as np
import pytest
from shrunk import BERT as SMALL
from workdirs import cut_short, history

from shampax.configs import bert
from shampax.framework.config import components
from shampax.framework.config.check import load
from shampax.framework.train import train

SHAMPOO = ("optimizer.block_size=16", "optimizer.interval=2", "optimizer.early_intervals=()")
FILE = "shampax/configs/bert.py"


def shrunk(variant, *changes):
    shampoo = () if variant in ("sample_adamw", "sample_lamb") else SHAMPOO
    return load(f"{FILE}:{variant}", [*SMALL, *shampoo, *changes])


@pytest.fixture(scope="module")
def first_phase(tmp_path_factory):
    """Train the shrunk sample for 4 steps; return workdir and result."""
    workdir = tmp_path_factory.mktemp("bert") / "first"
    return workdir, train(shrunk("sample"), workdir, devices=jax.devices()[:1])


def test_golden_steps(first_phase):
    """Faults: an unintended change of initialisation, data, masks, model, loss or optimizer; a missing metric."""
    workdir, result = first_phase
    golden = {"train/loss": [5.42619, 5.09293], "train/gradient_norm": [1.59673, 1.68167]}
    for key, values in golden.items():
        np.testing.assert_allclose(history(workdir, key)[::3], values, rtol=2e-3, err_msg=key)
    assert result["steps"] == 4 and result["skipped_steps"] == 0 and result["refreshes"] > 0
    assert 0 <= result["masked_accuracy"] <= 1 and 0 <= result["next_sentence_accuracy"] <= 1
    assert 4 < result["masked_loss"] < 7


@pytest.mark.slow
def test_resumed_equals_uninterrupted(first_phase, tmp_path):
    """Faults: a resumed run draws other masks or dropout, or restores other bits."""
    workdir, _ = first_phase
    cut = cut_short(workdir, tmp_path / "cut", 2)
    assert train(shrunk("sample"), cut, devices=jax.devices()[:1])["steps"] == 4
    for key in ("train/loss", "train/gradient_norm", "train/update_norm"):
        assert history(cut, key) == history(workdir, key)


@pytest.mark.slow
def test_a_second_phase_continues_with_longer_rows(first_phase, tmp_path, capfd):
    """Fault: a new row length loses optimizer state, the step or the position table."""
    workdir, first = first_phase
    second = ("data.sequence_length=32", "data.predictions=5", "duration=7 steps", "schedule.begin=4 steps")
    capfd.readouterr()
    result = train(shrunk("sample", *second, f"resume_from={workdir}"), tmp_path / "second", devices=jax.devices()[:1])
    out = capfd.readouterr().out
    assert f"continuing the run of resume_from {workdir}/checkpoints/4" in out
    assert "initialised" not in out
    assert result["steps"] == 7
    rates = history(tmp_path / "second", "train/learning_rate")
    assert len(rates) == 3
    assert rates[0] == pytest.approx(rates[1] / 2)  # warm-up from the start of the phase
    assert result["refreshes"] > first["refreshes"]  # the optimizer's count continues; three steps alone have fewer


@pytest.mark.slow
# paper_512 has the task and the optimizer of paper.
@pytest.mark.parametrize("variant", [name for name in bert.VARIANTS if name not in ("sample", "paper_512")])
def test_other_variants_train(variant, tmp_path):
    """Faults: a shipped config does not compile or train; the model does not compile for two slices."""
    slices = 2 if variant == "paper" else 1
    changes = ["duration=1 steps", "schedule.warmup=0 steps", "microbatches=2", f"slices={slices}"]
    result = train(shrunk(variant, *changes), tmp_path, devices=jax.devices()[:slices])
    assert (result["steps"], result["devices"]) == (1, slices)
    assert np.isfinite(result["heldout_loss"])


def test_sizes_are_those_of_the_paper():
    """Fault: a size, batch size or budget is changed by accident."""
    sizes = {"base": 110e6, "paper": 335e6}
    for variant, parameters in sizes.items():
        config = bert.get_config(variant)
        assert config.task.vocab_size == config.data.vocab_size == 30_522
        built, data = components.build(config.task), components.build(config.data)
        spec = {name: jax.ShapeDtypeStruct((2, *struct.shape), struct.dtype) for name, struct in data.spec().items()}
        variables = jax.eval_shape(built.init, jax.random.key(0), spec)
        assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == pytest.approx(parameters, rel=0.01)
    first, second = bert.get_config("paper"), bert.get_config("paper_512")
    assert (first.batch_size, second.batch_size, second.duration) == (65_536, 32_768, "8599 steps")
    assert second.schedule.begin == first.duration
    assert dict(first.task) == dict(second.task)
    assert dict(first.optimizer) == dict(second.optimizer)
