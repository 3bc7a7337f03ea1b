"""A loss spike in the data: the run goes back to a checkpoint and passes over the batches up to it."""

import json

import jax
import numpy as np
import pytest
from toy_runs import ADAMW, SHAMPOO, arrays, lines, make_config, saved, two

from shampax.configs import base
from shampax.framework.base.errors import TrainingStopped
from shampax.framework.checkpoint import verify
from shampax.framework.loop import Run
from shampax.framework.reporting import journal
from shampax.framework.train import train

# With this sum of tokens, batches 17, 41 and 51 of the toy data hold an example whose loss is a spike.
SPIKE_SUM = 22


HOSTED = base.component(SHAMPOO, block_size=8, interval=3, refresh="host")


def config(*, spikes=True, optimizer=HOSTED, **changes):
    return make_config(
        task={"spike_sum": SPIKE_SUM if spikes else -1},
        optimizer=optimizer,
        **{
            "duration": "30 steps",
            "schedule.warmup": "2 steps",
            "evaluation.every": "8 steps",  # the best checkpoint, of step 16, is newer than the regular one of step 15
            "guard.on_spike": "rollback",
            "guard.spike_window": 8,
        }
        | changes,
    )


@pytest.fixture(scope="module")
def rolled_back(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("rollback") / "run"
    return workdir, train(config(), workdir, devices=two())


def test_goes_back_to_the_newest_regular_checkpoint_and_past_the_spike(rolled_back, tmp_path, monkeypatch):
    """Catches a wrong number of batches passed over, state or roots in flight that stay behind, lost counts."""
    workdir, result = rolled_back
    assert (result["steps"], result["rollbacks"], result["batches_passed_over"]) == (30, 1, 3)
    assert (result["loss_spikes"], result["skipped_steps"], result["stopped"]) == (1, 0, None)
    steps = [line["step"] for line in lines(workdir) if "train/loss" in line]
    assert steps == [1, *range(2, 31, 2)]
    # The same by hand: stop where it went back to, and say that three batches are to be left out.
    monkeypatch.setattr(Run, "signal", lambda self: "SIGINT" if self.step == 15 else None)
    train(config(spikes=False), tmp_path, devices=two())
    monkeypatch.undo()
    checkpoint = tmp_path / "checkpoints" / "15"
    kept = checkpoint / "record" / "metadata"
    kept.write_text(json.dumps(json.loads(kept.read_text()) | {"batches_passed_over": 3}))
    verify.write(checkpoint, 0, 1)
    train(config(spikes=False), tmp_path, devices=two())
    jax.tree.map(np.testing.assert_array_equal, arrays(tmp_path, 30), arrays(workdir, 30))


@pytest.mark.slow
@pytest.mark.parametrize("step", [18, 19])
def test_stopped_around_the_spike_and_resumed_is_bitwise_the_same(rolled_back, tmp_path, monkeypatch, step):
    """Catches a spike that a stop hides, and a rollback to a checkpoint that only the stop has made."""
    workdir, result = rolled_back
    asked = []

    def once(self):
        asked.append(self.step)
        return "SIGTERM" if self.step == step and asked.count(step) == 1 else None

    monkeypatch.setattr(Run, "signal", once)
    stopped = train(config(), tmp_path, devices=two())
    monkeypatch.undo()
    assert stopped["stopped"] == "SIGTERM"
    again = train(config(), tmp_path, devices=two())
    for key in ("rollbacks", "batches_passed_over", "heldout_loss", "loss_spikes"):
        assert again[key] == result[key]
    jax.tree.map(np.testing.assert_array_equal, arrays(tmp_path, 30), arrays(workdir, 30))
    assert lines(tmp_path) == lines(workdir)


@pytest.mark.slow
def test_checkpoints_of_the_way_that_is_given_up_are_gone(rolled_back, tmp_path, monkeypatch):
    """Catches a step that is not saved anew because the run has once come by it in another way."""
    keeping = {"checkpoint.keep_last": 20}
    monkeypatch.setattr(Run, "signal", lambda self: "SIGTERM" if self.step == 17 else None)
    train(config(**keeping), tmp_path, devices=two())
    assert saved(tmp_path)[-1] == 17
    monkeypatch.undo()
    train(config(**keeping), tmp_path, devices=two())
    assert 17 not in saved(tmp_path) and 15 in saved(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, arrays(tmp_path, 30), arrays(rolled_back[0], 30))


@pytest.mark.slow
def test_killed_after_the_rollback_comes_to_the_same_end(rolled_back, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    went_back = journal.Journal.went_back

    def die(self, *arguments, **options):
        went_back(self, *arguments, **options)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(journal.Journal, "went_back", die)
        with pytest.raises(Killed):
            train(config(), tmp_path, devices=two())
    assert train(config(), tmp_path, devices=two())["rollbacks"] == 1
    jax.tree.map(np.testing.assert_array_equal, arrays(tmp_path, 30), arrays(rolled_back[0], 30))


@pytest.mark.slow
def test_back_to_the_first_step_and_no_further_than_the_limit(tmp_path):
    """Catches a run without a checkpoint to go back to, and one that goes back for ever."""
    changes = {"checkpoint.every": "0 steps", "duration": "60 steps", "guard.max_rollbacks": 1}
    early = config(optimizer=base.component(ADAMW), **changes)
    with pytest.raises(
        TrainingStopped, match=r"step 24 has a loss spike after 1 rollbacks \(config.guard.max_rollbacks=1\)"
    ):
        train(early, tmp_path, devices=two())
    stored = json.loads((tmp_path / "result.json").read_text())
    assert (stored["rollbacks"], stored["batches_passed_over"]) == (1, 18)
    assert 0 in saved(tmp_path)
