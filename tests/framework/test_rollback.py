"""Test rollbacks: after a loss spike, the run returns to a checkpoint and skips the batches up to the spike."""

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

# With this sum of tokens, batches 17, 41 and 51 of the toy data have an example with a loss spike.
SPIKE_SUM = 22


HOSTED = base.component(SHAMPOO, block_size=8, interval=3, refresh="host")


def config(*, spikes=True, optimizer=HOSTED, **changes):
    return make_config(
        task={"spike_sum": SPIKE_SUM if spikes else -1},
        optimizer=optimizer,
        **{
            "duration": "30 steps",
            "schedule.warmup": "2 steps",
            "evaluation.every": "8 steps",  # the best checkpoint (step 16) is newer than the regular one (step 15)
            "guard.on_spike": "rollback",
            "guard.spike_window": 8,
        }
        | changes,
    )


@pytest.fixture(scope="module")
def rolled_back(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("rollback") / "run"
    return workdir, train(config(), workdir, devices=two())


def test_rolls_back_to_the_newest_regular_checkpoint_and_skips_the_spike(rolled_back, tmp_path, monkeypatch):
    """Faults: a wrong number of batches is skipped; state or roots in flight are kept; counts are lost."""
    workdir, result = rolled_back
    assert (result["steps"], result["rollbacks"], result["batches_passed_over"]) == (30, 1, 3)
    assert (result["loss_spikes"], result["skipped_steps"], result["stopped"]) == (1, 0, None)
    steps = [line["step"] for line in lines(workdir) if "train/loss" in line]
    assert steps == [1, *range(2, 31, 2)]
    # The same by hand: stop at that checkpoint, and set three batches to skip.
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
def test_stopped_near_the_spike_and_resumed_is_bitwise_the_same(rolled_back, tmp_path, monkeypatch, step):
    """Faults: a stop hides a spike; a run rolls back to a checkpoint that exists only because of the stop."""
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
def test_a_rollback_deletes_later_checkpoints(rolled_back, tmp_path, monkeypatch):
    """Fault: a step is not saved again because it was saved before the rollback."""
    keeping = {"checkpoint.keep_last": 20}
    monkeypatch.setattr(Run, "signal", lambda self: "SIGTERM" if self.step == 17 else None)
    train(config(**keeping), tmp_path, devices=two())
    assert saved(tmp_path)[-1] == 17
    monkeypatch.undo()
    train(config(**keeping), tmp_path, devices=two())
    assert 17 not in saved(tmp_path) and 15 in saved(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, arrays(tmp_path, 30), arrays(rolled_back[0], 30))


@pytest.mark.slow
def test_killed_after_the_rollback_ends_the_same(rolled_back, tmp_path, monkeypatch):
    """Fault: a run that dies after a rollback forgets it."""

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
def test_rolls_back_to_the_first_step_and_only_up_to_the_limit(tmp_path):
    """Faults: a run without a checkpoint cannot roll back; a run rolls back without end."""
    changes = {"checkpoint.every": "0 steps", "duration": "60 steps", "guard.max_rollbacks": 1}
    early = config(optimizer=base.component(ADAMW), **changes)
    with pytest.raises(
        TrainingStopped, match=r"step 24 has a loss spike after 1 rollbacks \(config.guard.max_rollbacks=1\)"
    ):
        train(early, tmp_path, devices=two())
    stored = json.loads((tmp_path / "result.json").read_text())
    assert (stored["rollbacks"], stored["batches_passed_over"]) == (1, 18)
    assert 0 in saved(tmp_path)
