import os
import subprocess
from pathlib import Path

import pytest

from shampax.framework.checkpoint import verify

FILES = {
    "metadata": 0,
    "state/d/0": 0,
    "record/metadata": 0,
    "state/ocdbt.process_0/d/1": 0,
    "state/ocdbt.process_1/d/2": 1,
    "state/array_metadatas/process_1": 1,
}


@pytest.fixture
def directory(tmp_path):
    """Write the files of two processes, with their checksums."""
    for name in FILES:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode() * 100)
    for process in (0, 1):
        assert not verify.read(tmp_path).complete
        verify.write(tmp_path, process, 2)
    assert verify.size(tmp_path) == 100 * sum(map(len, FILES))
    return tmp_path


def faults(directory):
    sums = verify.read(directory)
    return sums.faults + verify.mismatches(directory, sums.digests)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_each_process_lists_its_files_and_sha256sum_agrees(directory):
    assert verify.read(directory).complete and faults(directory) == []
    for process in (0, 1):
        lines = (directory / f"SHA256SUMS-{process}-of-2").read_text().splitlines()
        assert {line.split("  ")[1] for line in lines} == {name for name, by in FILES.items() if by == process}
    command = "cat SHA256SUMS-* | sha256sum --check"
    checked = subprocess.run(command, shell=True, cwd=directory, capture_output=True, text=True)
    assert checked.returncode == 0 and checked.stdout.count("OK") == len(FILES)


def test_files_are_on_the_disk_before_their_sums_are(directory, monkeypatch):
    """Fault: the last older checkpoint is deleted, and after a power loss the newest one has empty files."""
    synced = []
    monkeypatch.setattr(os, "fsync", lambda number: synced.append(Path(os.readlink(f"/proc/self/fd/{number}"))))
    verify.write(directory, 0, 1)
    assert {path.relative_to(directory).as_posix() for path in synced[:-1]} == {*FILES}
    assert "SHA256SUMS" in synced[-1].name


@pytest.mark.parametrize("name", [*FILES, "SHA256SUMS-0-of-2", "SHA256SUMS-1-of-2"])
@pytest.mark.parametrize("how", ["flip", "truncate", "delete"])
def test_all_kinds_of_damage_are_found(directory, name, how):
    path = directory / name
    if how == "flip":
        flip(path)
    elif how == "delete":
        path.unlink()
    else:
        os.truncate(path, path.stat().st_size - 1)
    assert faults(directory) or not verify.read(directory).complete


def test_sums_are_incomplete_until_every_process_has_written_its_own(directory):
    """Fault: a checkpoint counts as verified although the files of one process were not hashed."""
    (directory / "SHA256SUMS-1-of-2").unlink()
    assert not verify.read(directory).complete
    assert faults(directory) == []
    flip(directory / "state" / "d" / "0")
    assert faults(directory) == ["state/d/0 does not have its checksum"]


def test_an_added_file_is_found_but_an_evaluation_may_be_added(directory):
    (directory / "evaluation.json").write_text("{}")
    assert faults(directory) == []
    (directory / "state" / "d" / "3").write_text("")
    assert faults(directory) == ["state/d/3 has no checksum"]


def test_file_names_of_checksums_are_not_trusted(directory):
    """Fault: a file name that claims a trillion processes exhausts the memory."""
    (directory / "SHA256SUMS-2-of-1000000000000").write_text("")
    assert not verify.read(directory).complete
