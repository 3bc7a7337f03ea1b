import errno
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import orbax.checkpoint as ocp
import pytest
from toy_runs import make_config, saved, two

from shampax.framework.base.errors import TrainingStopped, UserError
from shampax.framework.checkpoint import ownership, store
from shampax.framework.checkpoint.record import Record
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


@pytest.fixture(params=[errno.ENOSYS, errno.ENOLCK], ids=errno.errorcode.get)
def without_locks(monkeypatch, request):
    """Simulate a file system without locks."""

    def flock(file, how):
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(ownership.fcntl, "flock", flock)


def test_a_file_system_without_locks_is_a_warning(tmp_path, without_locks, capsys):
    """Fault: the workdir counts as in use by another process."""
    with ownership.hold(tmp_path):
        pass
    (line,) = capsys.readouterr().out.splitlines()
    assert re.match(
        r"warning: workdir .* cannot be locked \((Function not|No locks).*\). Start no second run in it", line
    )


@pytest.mark.parametrize("without_locks", [errno.ENOSYS], indirect=True)
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


def test_files_lost_by_a_power_loss_are_written_again(tmp_path, capsys):
    """Fault: the run is refused with the advice to use another workdir, or its newest checkpoint is set aside."""
    config = make_config(**{"duration": "2 steps", "schedule.warmup": "0 steps"})
    result = train(config, tmp_path, devices=two())
    stored = (tmp_path / "config.json").read_text()
    capsys.readouterr()
    (tmp_path / "result.json").write_text("")
    (tmp_path / "checkpoints" / "2" / "evaluation.json").write_bytes(bytes(100))
    again = train(config, tmp_path, devices=two())
    assert (again["steps"], again["heldout_loss"]) == (2, result["heldout_loss"])
    assert "resuming from" in capsys.readouterr().out
    (tmp_path / "config.json").write_bytes(bytes(len(stored)))
    assert train(config, tmp_path, devices=two())["steps"] == 2
    assert "config.json is not a JSON object. It is written again" in capsys.readouterr().out
    assert (tmp_path / "config.json").read_text() == stored
    assert json.loads((tmp_path / "result.json").read_text())["stopped"] is None


def test_files_are_on_the_disk_before_they_are_renamed(tmp_path, monkeypatch):
    """Fault: after a power loss the file exists and is empty."""
    events, replace = [], Path.replace
    monkeypatch.setattr(os, "fsync", lambda number: events.append("fsync"))
    monkeypatch.setattr(Path, "replace", lambda self, to: events.append("rename") or replace(self, to))
    ownership.claim(tmp_path, make_config())
    ownership.finish(tmp_path, {"steps": 1})
    store.write_evaluation(tmp_path, Record())
    assert events == ["fsync", "rename"] * 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "evaluation.json", "result.json"]


# All printable ASCII characters of which a name can consist.
NAME = "".join(map(chr, range(32, 127))).replace("/", "")


def test_a_workdir_may_have_every_name_that_orbax_can_read(tmp_path):
    """Fault: the run trains and saves, and nothing can be read back."""
    workdir = tmp_path / NAME.translate(dict.fromkeys(map(ord, "*?[\\")))
    changes = {"schedule.warmup": "0 steps", "schedule.decay": "constant", "may_change": ("duration",)}
    for steps in (2, 3):
        assert train(make_config(duration=f"{steps} steps", **changes), workdir, devices=two())["steps"] == steps
    assert {path.name: store.faults(path) for path in store.checkpoints(workdir)} == {"2": [], "3": []}
    for character in "*?[\\":
        for changed in ({"workdir": tmp_path / f"a{character}b"}, {"workdir": tmp_path / f"a{character}b" / "c"}):
            with pytest.raises(UserError, match=re.escape(f"must not contain {character}. Use another name.")):
                train(make_config(), changed["workdir"], devices=two())
    assert [path.name for path in tmp_path.iterdir()] == [workdir.name]


def test_a_changed_workdir_keeps_what_was_changed_and_when(tmp_path, capsys):
    """Faults: a longer run cannot be told from one that was planned so; a start without changes leaves a file."""
    config = make_config(**{"duration": "2 steps", "may_change": ("duration",)})
    ownership.claim(tmp_path, config)
    ownership.claim(tmp_path, config)
    assert not (tmp_path / "changes").exists()
    for steps in (3, 4):
        config.duration = f"{steps} steps"
        ownership.claim(tmp_path, config)
    said = ['duration: "2 steps" -> "3 steps"', 'duration: "3 steps" -> "4 steps"']
    files = sorted((tmp_path / "changes").iterdir())
    assert [path.read_text().splitlines() for path in files] == [[line] for line in said]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d\.\d+Z\.txt", path.name) for path in files)
    shown = capsys.readouterr().out
    assert all(line in shown for line in said)


def test_other_microbatches_are_said(tmp_path, capsys):
    """Fault: with dropout the run continues as another one, without a word."""
    config = make_config(**{"duration": "2 steps", "schedule.warmup": "0 steps", "may_change": ("duration",)})
    train(config, tmp_path / "first", devices=two())
    capsys.readouterr()
    config.duration, config.microbatches = "3 steps", 2
    said = "config.microbatches was 1 and is 2. Dropout draws other random numbers"
    config.resume_from = str(tmp_path / "first")
    train(config, tmp_path / "second", devices=two())
    assert said in capsys.readouterr().out
    train(config, tmp_path / "first", devices=two())
    assert said in capsys.readouterr().out
