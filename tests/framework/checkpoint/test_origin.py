import shutil

import pytest
from jax.sharding import PartitionSpec as P
from toy_states import make_state, save

from shampax.framework.base.errors import UserError
from shampax.framework.checkpoint import integrity, origin
from shampax.framework.checkpoint.origin import Origin
from shampax.framework.checkpoint.record import Record


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two workdirs: one with checkpoints of steps 1 and 2, one with 9."""
    state, place = make_state({"data": 8}, P()), tmp_path_factory.mktemp("runs")
    save(place / "first", state, {1: None, 2: None})
    save(place / "second", state, {9: None})
    return place


def copied(runs, tmp_path, name="first"):
    return shutil.copytree(runs / name, tmp_path / name)


def find(workdir, resume_from="", init_from=""):
    return origin.find(workdir, resume_from=str(resume_from), init_from=str(init_from))


def test_own_before_resume_before_init_before_scratch(runs, tmp_path):
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
    with pytest.raises(UserError, match=r"resume_from nowhere holds no finished checkpoint"):
        find(tmp_path, resume_from="nowhere")


FILES = ["_CHECKPOINT_METADATA", "record/metadata", "manifest/metadata", "state/_METADATA", "state/ocdbt.process_0/d/*"]


@pytest.mark.parametrize("pattern", FILES)
def test_a_damaged_checkpoint_gives_way_to_the_one_before_it(runs, tmp_path, pattern):
    """Catches damage that is used, a warning that does not name both, and evidence that is thrown away."""
    workdir = copied(runs, tmp_path)
    damaged, whole = (workdir / "checkpoints" / step for step in "21")
    path = sorted(damaged.glob(pattern))[0]
    pattern = path.relative_to(damaged).as_posix()
    path.write_bytes(path.read_bytes()[:-1])
    found = find(workdir)
    assert found.path == whole
    text = str(found)
    assert f"checkpoint {damaged} is damaged ({pattern} does not have its checksum); {whole} is used" in text
    assert f"resuming from {whole}" in text
    origin.set_aside(workdir, found)
    assert not damaged.exists()
    assert (workdir / "damaged" / "2" / pattern).exists()
    shutil.copytree(whole, damaged)
    (damaged / integrity.SUMS).unlink()
    again = find(workdir)
    assert again.path == whole and "did not come to an end" in str(again)
    origin.set_aside(workdir, again)
    assert (workdir / "damaged" / "2-2").is_dir() and find(workdir).damaged == ()


def test_damage_all_over_ends_in_an_error_and_never_in_a_new_beginning(runs, tmp_path):
    workdir = copied(runs, tmp_path)
    for step in "12":
        (workdir / "checkpoints" / step / "record" / "metadata").unlink()
    for arguments in ({}, {"resume_from": runs / "second"}):
        with pytest.raises(UserError, match=r"no checkpoint of .* is whole \(2: record/metadata is missing; 1: "):
            find(workdir, **arguments)
    with pytest.raises(UserError, match=r"no checkpoint of init_from .* is whole"):
        find(tmp_path / "new", init_from=workdir)


def test_a_first_save_that_was_cut_short_is_no_checkpoint(runs, tmp_path):
    workdir = copied(runs, tmp_path, "second")
    (workdir / "checkpoints" / "9" / integrity.SUMS).unlink()
    found = find(workdir)
    assert found.kind == "scratch" and "the run begins anew" in str(found)
    assert find(workdir, resume_from=runs / "first").kind == "resume"
    origin.set_aside(workdir, found)
    assert (workdir / "damaged" / "9").is_dir()


def test_other_runs_damage_is_left_where_it_is(runs, tmp_path):
    other = copied(runs, tmp_path)
    (other / "checkpoints" / "2" / "record" / "metadata").unlink()
    found = find(tmp_path / "new", resume_from=other)
    assert found.path == other / "checkpoints" / "1"
    origin.set_aside(tmp_path / "new", found)
    assert (other / "checkpoints" / "2").is_dir()
