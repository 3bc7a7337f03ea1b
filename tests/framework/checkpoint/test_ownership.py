import signal
import subprocess
import sys

import pytest
from toy_runs import make_config, saved, two

from shampax.framework.base.errors import TrainingStopped, UserError
from shampax.framework.checkpoint import integrity, ownership, store
from shampax.framework.train import train

HOLDER = """
import sys, time
from pathlib import Path
from shampax.framework.checkpoint import ownership
with ownership.hold(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_workdir_has_one_trainer_and_a_killed_one_lets_go(tmp_path):
    """Catches two trainers that write into one workdir, and a lock that outlives its holder."""
    workdir = tmp_path / "run"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(workdir)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=rf"{workdir} is in use by process {holder.pid} on .*; wait for its end"):
            train(make_config(), workdir, devices=two())
        assert not (workdir / "config.json").exists()
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with ownership.hold(workdir), pytest.raises(UserError, match="in use"), ownership.hold(workdir):
        pass
    assert workdir.exists()


def test_a_workdir_that_nothing_was_written_to_is_gone_afterwards(tmp_path):
    with ownership.hold(tmp_path / "empty"):
        pass
    with ownership.hold(tmp_path / "full"):
        (tmp_path / "full" / "file").write_text("")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


@pytest.fixture
def full_disk_at_5(monkeypatch):
    """The checkpoint of step 5 cannot be finished."""
    seal = integrity.seal

    def seal_or_fail(path):
        if path.name == "5":
            raise OSError(28, "No space left on device")
        return seal(path)

    monkeypatch.setattr(integrity, "seal", seal_or_fail)


def test_a_full_disk_stops_the_run_with_its_earlier_checkpoint_intact(tmp_path, full_disk_at_5, monkeypatch):
    config = make_config(**{"evaluation.every": "100%", "checkpoint.every": "1 steps"})
    with pytest.raises(TrainingStopped, match=r"step 5 could not .*No space left on device.* step 4; mend the storage"):
        train(config, tmp_path, devices=two())
    assert [int(path.name) for path in store.finished(tmp_path)][-1] in (4, 6)
    assert integrity.faults(tmp_path / "checkpoints" / "4") == []
    monkeypatch.undo()
    assert train(config, tmp_path, devices=two())["steps"] == 12


def test_a_full_disk_is_told_and_trained_past_if_the_config_says_so(tmp_path, full_disk_at_5, capsys):
    config = make_config(**{"checkpoint.on_error": "continue", "evaluation.every": "100%"})
    assert train(config, tmp_path, devices=two())["steps"] == 12
    out = capsys.readouterr().out
    assert "warning: the checkpoint of step 5 could not be saved" in out and "training goes on" in out
    assert [int(path.name) for path in store.finished(tmp_path)] == [10, 12]
    assert saved(tmp_path) == [10, 12] or 5 in saved(tmp_path)


def test_a_last_checkpoint_that_cannot_be_saved_is_no_complete_run(tmp_path, monkeypatch):
    """Catches a run that calls itself complete and whose end is nowhere."""
    monkeypatch.setattr(integrity, "seal", lambda path: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    config = make_config(**{"checkpoint.on_error": "continue", "duration": "2 steps", "schedule.warmup": "0 steps"})
    with pytest.raises(TrainingStopped, match=r"step 2 could not be saved .*Permission denied.*there is none before"):
        train(config, tmp_path, devices=two())
    assert not (tmp_path / "result.json").exists()
