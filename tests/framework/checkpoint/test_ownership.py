import errno
import json
import signal
import subprocess
import sys

import orbax.checkpoint as ocp
import pytest
from toy_runs import make_config, saved, two

from shampax.framework.base.errors import TrainingStopped, UserError
from shampax.framework.checkpoint import ownership, store
from shampax.framework.loop import Run
from shampax.framework.train import train

HOLDER = """
import sys, time
from pathlib import Path
from shampax.framework.checkpoint import ownership
with ownership.hold(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_workdir_has_one_trainer_and_a_killed_one_releases_it(tmp_path):
    """Faults: two trainers write into one workdir; a lock outlives its process."""
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


def test_an_empty_workdir_is_deleted_on_release(tmp_path):
    with ownership.hold(tmp_path / "empty"):
        pass
    with ownership.hold(tmp_path / "full"):
        (tmp_path / "full" / "file").write_text("")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


@pytest.fixture
def without_locks(monkeypatch):
    """Simulate a file system without locks."""

    def flock(file, how):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(ownership.fcntl, "flock", flock)


def test_without_locks_the_older_run_stops_at_its_next_save(tmp_path, without_locks, monkeypatch):
    """Faults: a file system without locks counts as a workdir in use; two runs continue in one workdir."""
    config = make_config(**{"checkpoint.every": "2 steps"})
    older, signal_of = [], Run.signal

    def start_another(self):
        if self.step == 5 and not older:
            older.append(self.step)
            self.saver.confirm()  # two concurrent saves of one step would use the same folder
            train(config, tmp_path, devices=two())
        return signal_of(self)

    monkeypatch.setattr(Run, "signal", start_another)
    with pytest.raises(UserError, match=r"has been taken over by process \d+ on .*; this run .* stops without saving"):
        train(config, tmp_path, devices=two())
    assert older == [5]
    assert json.loads((tmp_path / "result.json").read_text())["steps"] == 12
    assert all(store.faults(path) == [] for path in store.checkpoints(tmp_path))


@pytest.fixture
def full_disk_at_5(monkeypatch):
    """Make the save of step 5 fail."""
    save = ocp.AsyncCheckpointer.save

    def save_or_fail(self, path, **options):
        if path.name == "5":
            raise OSError(28, "No space left on device")
        return save(self, path, **options)

    monkeypatch.setattr(ocp.AsyncCheckpointer, "save", save_or_fail)


def test_a_full_disk_stops_the_run_and_keeps_earlier_checkpoints(tmp_path, full_disk_at_5, monkeypatch):
    config = make_config(**{"evaluation.every": "100%", "checkpoint.every": "1 steps"})
    with pytest.raises(TrainingStopped, match=r"step 5 could not .*No space left on device.* step 4"):
        train(config, tmp_path, devices=two())
    assert [int(path.name) for path in store.checkpoints(tmp_path)][-1] in (4, 6)
    assert store.faults(tmp_path / "checkpoints" / "4") == []
    monkeypatch.undo()
    assert train(config, tmp_path, devices=two())["steps"] == 12


def test_a_full_disk_is_reported_and_training_continues_if_configured(tmp_path, full_disk_at_5, capsys):
    config = make_config(**{"checkpoint.on_error": "continue", "evaluation.every": "100%"})
    assert train(config, tmp_path, devices=two())["steps"] == 12
    out = capsys.readouterr().out
    assert "warning: the checkpoint of step 5 could not be saved" in out and "Training continues" in out
    assert saved(tmp_path) == [10, 12]


def test_a_run_whose_last_save_failed_is_not_complete(tmp_path, monkeypatch):
    """Fault: a run is reported as complete, but its last state is not saved."""

    def denied(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(ocp.AsyncCheckpointer, "save", denied)
    config = make_config(**{"checkpoint.on_error": "continue", "duration": "2 steps", "schedule.warmup": "0 steps"})
    with pytest.raises(TrainingStopped, match=r"step 2 could not be saved .*Permission denied.*there is no earlier"):
        train(config, tmp_path, devices=two())
    assert not (tmp_path / "result.json").exists()
