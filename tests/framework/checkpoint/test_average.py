import jax
import numpy as np
import pytest
from toy_runs import arrays, make_config, saved, two

from shampax.framework.checkpoint import origin
from shampax.framework.train import train
from shampax.launch.checkpoint import main


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return the workdir of a run with three checkpoints, whose parameters two devices share."""
    workdir = tmp_path_factory.mktemp("run") / "run"
    sharded = {"mesh.data": 1, "mesh.fsdp": 2, "checkpoint.every": "2 steps", "checkpoint.keep_last": 3}
    train(make_config(duration="6 steps", **sharded), workdir, devices=two())
    assert saved(workdir) == [2, 4, 6]
    return workdir


def test_the_mean_of_the_newest_checkpoints(run, tmp_path, capsys):
    """Faults: the oldest are averaged; a sum in place of a mean; the result cannot be trained on."""
    assert main(["average", str(run), "--last=2", f"--workdir={tmp_path / 'mean'}"]) == 0
    assert "the mean of 2 checkpoints" in capsys.readouterr().out
    found, first, second = (arrays(*each) for each in ((tmp_path / "mean", 0), (run, 4), (run, 6)))

    def check(mean, a, b):
        assert mean.dtype == a.dtype
        np.testing.assert_allclose(mean, (a.astype(np.float64) + b) / 2, rtol=1e-6, atol=1e-7)

    jax.tree.map(check, found["params"], first["params"], second["params"])
    jax.tree.map(np.testing.assert_array_equal, found["model_state"], second["model_state"])
    assert origin.find(tmp_path / "new", resume_from="", init_from=str(tmp_path / "mean")).kind == "init"
    tuned = make_config(duration="2 steps", init_from=str(tmp_path / "mean"))
    train(tuned, tmp_path / "tuned", devices=jax.devices()[:1])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--last=4"], "has 3 checkpoints. Use --last=3, or train with --config.checkpoint.keep_last=4."),
        ([], "6 is the only checkpoint. Give several, or a larger --last."),
        (["{run}/checkpoints/nine"], "nine is not a directory"),
    ],
)
def test_too_few_checkpoints_are_refused(run, tmp_path, capsys, words, told):
    words = [word.format(run=run) for word in words]
    assert main(["average", str(run), *words, f"--workdir={tmp_path / 'mean'}"]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "mean").exists()
