import os
import subprocess

import pytest

from shampax.framework.checkpoint import integrity


@pytest.fixture
def directory(tmp_path):
    for name in ("metadata", "state/d/0", "state/d/1", "record/metadata"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode() * 100)
    assert not integrity.is_sealed(tmp_path)
    assert integrity.faults(tmp_path) == ["no SHA256SUMS: its save did not come to an end"]
    assert integrity.seal(tmp_path) == integrity.size(tmp_path) == 100 * (8 + 9 + 9 + 15)
    return tmp_path


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_whole_directory_has_no_faults_and_sha256sum_agrees(directory):
    assert integrity.is_sealed(directory)
    assert integrity.faults(directory) == []
    checked = subprocess.run(["sha256sum", "--check", integrity.SUMS], cwd=directory, capture_output=True, text=True)
    assert checked.returncode == 0 and checked.stdout.count("OK") == 4


@pytest.mark.parametrize("name", ["metadata", "state/d/0", "record/metadata", integrity.SUMS])
@pytest.mark.parametrize("how", ["flip", "truncate", "empty", "delete"])
def test_every_damage_is_found(directory, name, how):
    path = directory / name
    if how == "flip":
        flip(path)
    elif how == "delete":
        path.unlink()
    else:
        os.truncate(path, path.stat().st_size - 1 if how == "truncate" else 0)
    assert integrity.faults(directory)


def test_a_file_too_many_is_found(directory):
    (directory / "state" / "d" / "2").write_text("")
    assert integrity.faults(directory) == ["state/d/2 is not in SHA256SUMS"]


def test_readers_share_the_work(directory):
    flip(directory / "state" / "d" / "0")
    found = [integrity.faults(directory, part=part, parts=3) for part in range(3)]
    assert sorted(found) == [[], [], ["state/d/0 does not have its checksum"]]
