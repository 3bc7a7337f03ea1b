import re
import shutil

import pytest
from jax.sharding import PartitionSpec as P
from processes import run_together
from toy_states import make_state, save

from shampax.framework.base.errors import UserError
from shampax.framework.checkpoint import origin
from shampax.framework.checkpoint.origin import Origin
from shampax.framework.checkpoint.record import Record


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Write two workdirs: one with checkpoints of steps 1 and 2, one with step 9."""
    state, place = make_state({"data": 8}, P()), tmp_path_factory.mktemp("runs")
    save(place / "first", state, {1: None, 2: None})
    save(place / "second", state, {9: None})
    return place


def copied(runs, tmp_path, name="first"):
    return shutil.copytree(runs / name, tmp_path / name)


def find(workdir, resume_from="", init_from=""):
    return origin.find(workdir, resume_from=str(resume_from), init_from=str(init_from))


def test_order_is_own_checkpoint_resume_from_init_from_scratch(runs, tmp_path):
    own, first, second = tmp_path / "own", runs / "first", runs / "second"
    assert find(own) == Origin("scratch")
    assert find(own, init_from=second) == Origin("init", second / "checkpoints" / "9")
    assert find(own, first, second).path == first / "checkpoints" / "2"
    named = find(own, first / "checkpoints" / "1")
    assert named == Origin("resume", first / "checkpoints" / "1")
    assert named.record().step == 1
    assert find(own, init_from=second).record() == Record()
    assert find(second, resume_from=first).kind == "own"
    for kind, word in {"own": "resuming", "resume": "resume_from", "init": "init_from"}.items():
        assert word in str(Origin(kind, own))
        assert str(own) in str(Origin(kind, own))


def test_missing_origin_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"resume_from nowhere has no checkpoint"):
        find(tmp_path, resume_from="nowhere")


FILES = ["_CHECKPOINT_METADATA", "record/metadata", "manifest/metadata", "state/_METADATA", "state/ocdbt.process_0/d/*"]


@pytest.mark.parametrize("pattern", FILES)
def test_a_damaged_checkpoint_is_replaced_by_the_previous_one(runs, tmp_path, pattern):
    """Faults: a damaged checkpoint is used; the warning does not name both; the damaged files are deleted."""
    workdir = copied(runs, tmp_path)
    damaged, whole = (workdir / "checkpoints" / step for step in "21")
    path = sorted(damaged.glob(pattern))[0]
    pattern = path.relative_to(damaged).as_posix()
    path.write_bytes(path.read_bytes()[:-1])
    found = find(workdir)
    assert found.path == whole
    text = str(found)
    assert f"checkpoint {damaged} is damaged ({pattern} does not have its checksum); using {whole}" in text
    assert f"resuming from {whole}" in text
    origin.set_aside(workdir, found)
    assert not damaged.exists()
    assert (workdir / "damaged" / "2" / pattern).exists()
    shutil.copytree(whole, damaged)
    (damaged / "state" / "_METADATA").unlink()
    origin.set_aside(workdir, find(workdir))
    assert not (workdir / "damaged" / "2" / "state" / "_METADATA").exists() and find(workdir).damaged == ()
    assert [path.name for path in (workdir / "damaged").iterdir()] == ["2"]


def test_a_readable_checkpoint_without_checksums_is_used(runs, tmp_path):
    """Faults: a run that ends between commit and checksums loses its last checkpoint; it trains on damage."""
    workdir = copied(runs, tmp_path)
    newest = workdir / "checkpoints" / "2"
    (newest / "SHA256SUMS-0-of-1").unlink()
    assert find(workdir) == Origin("own", newest)
    for path in newest.glob("state/d/*"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    found = find(workdir)
    assert found.path == workdir / "checkpoints" / "1"
    assert "the arrays of checkpoint" in found.damaged[0][1]


def test_if_all_checkpoints_are_damaged_the_run_fails_and_does_not_restart(runs, tmp_path):
    workdir = copied(runs, tmp_path)
    for step in "12":
        (workdir / "checkpoints" / step / "record" / "metadata").unlink()
    for arguments in ({}, {"resume_from": runs / "second"}):
        with pytest.raises(UserError, match=r"every checkpoint of .* is damaged \(2: record/metadata is missing; 1: "):
            find(workdir, **arguments)
    with pytest.raises(UserError, match=r"every checkpoint of init_from .* is damaged"):
        find(tmp_path / "new", init_from=workdir)


def test_an_incomplete_save_is_not_a_checkpoint(runs, tmp_path):
    workdir = copied(runs, tmp_path, "second")
    checkpoint = workdir / "checkpoints" / "9"
    checkpoint.rename(checkpoint.with_name("9.orbax-checkpoint-tmp"))
    assert find(workdir) == Origin("scratch")
    assert find(workdir, resume_from=runs / "first").kind == "resume"


STALE = """
import sys
from pathlib import Path
import jax
from shampax.framework.checkpoint import origin, store
if jax.process_index() == 1:
    listed = store.checkpoints
    store.checkpoints = lambda workdir: listed(workdir)[:-1]
found = origin.find(Path(sys.argv[1]), resume_from="", init_from="")
print(found.path.name, found.record().step)
"""


def test_a_stale_listing_of_another_process_changes_nothing(runs):
    """Fault: each process resumes from the newest checkpoint it lists, and two states are mixed without an error."""
    outputs = run_together(STALE, processes=2, devices=1, arguments=[str(runs / "first")])
    assert [text.splitlines()[-1] for text in outputs] == ["2 2", "2 2"]


def test_damaged_checkpoints_of_other_runs_are_not_moved(runs, tmp_path):
    other = copied(runs, tmp_path)
    (other / "checkpoints" / "2" / "record" / "metadata").unlink()
    found = find(tmp_path / "new", resume_from=other)
    assert found.path == other / "checkpoints" / "1"
    origin.set_aside(tmp_path / "new", found)
    assert (other / "checkpoints" / "2").is_dir()


def test_a_damaged_checkpoint_that_cannot_be_moved_is_a_warning(runs, tmp_path, capsys):
    """Fault: every start ends in a traceback until somebody deletes it."""
    workdir = copied(runs, tmp_path)
    (workdir / "checkpoints" / "2" / "record" / "metadata").unlink()
    (workdir / "damaged").write_text("in the way")
    found = find(workdir)
    origin.set_aside(workdir, found)
    assert found.path == workdir / "checkpoints" / "1"
    assert re.match(r"warning: .*/2 cannot be moved to .*/damaged \(File exists\)", capsys.readouterr().out)
