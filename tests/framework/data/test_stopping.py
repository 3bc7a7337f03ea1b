import sys

import pytest

from shampax.framework.base import paths
from shampax.framework.base.errors import UserError
from shampax.framework.config import check, components, sets
from shampax.framework.data import feed
from shampax.framework.data.preparing import preparing
from shampax.framework.data.text import TextData


def corpus(folder, documents):
    """Write a corpus and return its data set, of about 2 rows a document."""
    folder.mkdir()
    (folder / "a.txt").write_text("\f".join(f"Document {i} of {'many ' * (i % 9)}" for i in range(documents)))
    return TextData(source=f"file:{folder}/a.txt", sequence_length=16, vocab_size=300, shard_size=9)


def made(data, cache, **options):
    return preparing.run(data, paths.of(cache), workers=1, **options)


def test_preparing_stops_at_the_rows_of_the_run(tmp_path, capfd):
    """Faults: a short run prepares the whole corpus; it has fewer rows than it takes; held-out rows are all made; other
    processes make other rows."""
    data = corpus(tmp_path / "a", 2_000)
    manifest = made(data, tmp_path / "cache", most=60)
    assert "stopped at 60 training rows" in capfd.readouterr().err
    rows = [shard["rows"] for shard in manifest["shards"] if shard["split"] == "train"]
    assert (
        sum(rows[:-1])
        < 60
        <= sum(rows)
        == manifest["ranges"]["train"][1]
        == len(data.examples("train", tmp_path / "cache"))
    )
    assert sum(shard["split"] == "heldout" for shard in manifest["shards"]) == 1
    assert len(list((tmp_path / "cache").glob("rows-*/train-*.array_record"))) == len(rows)
    for process in (0, 1, 0):
        parts = made(data, tmp_path / "parts", process=process, processes=2, most=60)
    assert parts["content"] == manifest["content"]
    few = made(corpus(tmp_path / "few", 40), tmp_path / "few rows", most=10_000)
    assert not few["stopped"] and few["splits"]["train"]["documents"] + few["splits"]["heldout"]["documents"] == 40


def test_rows_that_exist_are_used_or_extended(tmp_path):
    """Faults: a run with a longer duration, such as a resumed one, has other rows; `shampax prepare` adds none, or
    makes all again."""
    data = corpus(tmp_path / "a", 2_000)
    first = made(data, tmp_path / "cache", most=30)
    data.prepare_some(tmp_path / "cache", 90, 0)
    assert data.manifest(tmp_path / "cache")[1]["content"] == first["content"]
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("cache/rows-*/train-*")}
    second = made(data, tmp_path / "cache", most=90, extend=True)
    assert all(shard in second["shards"] for shard in first["shards"]) and second["ranges"]["train"][1] >= 90
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert made(data, tmp_path / "cache", most=50, extend=True)["content"] == second["content"]
    assert not made(data, tmp_path / "cache", extend=True)["stopped"]


def test_a_run_of_several_processes_does_not_wait_for_hours(tmp_path, monkeypatch):
    """Faults: 256 chips wait for days; a short run on a large corpus is refused; the command cannot be copied."""
    data = corpus(tmp_path / "a", 2_000)
    size = data.open_source().text_bytes
    assert size == (tmp_path / "a" / "a.txt").stat().st_size
    monkeypatch.setattr(preparing, "_BYTES_PER_SECOND", size / 6_000)
    monkeypatch.setattr(sys, "argv", ["train", "--config=lm.py:1b", "--workdir=a", "--config.data.text_key=a b"])
    message = r"about 100 minutes with data\.workers=1.*prepare --config=lm\.py:1b '--config\.data\.text_key=a b' --out"
    with pytest.raises(UserError, match=message):
        data.prepare_some(tmp_path / "cache", 0, 600)
    assert not (tmp_path / "cache").exists()
    data.prepare_some(tmp_path / "cache", 10, 600)
    data.prepare_some(tmp_path / "cache", 10_000, 600)  # the rows exist


def test_rows_that_a_run_takes():
    """Faults: too few rows of a source; a run in epochs stops early."""
    own = ["data.sequence_length=100", "batch_size=10", "mixture=books.weight=3,books.weight@50%=0"]
    for changes, expected in (
        (["duration=100000 tokens"], {"data": 1_050 * 5 // 8, "books": 1_050 * 3 // 8}),
        (["duration=100 steps", "mixture=()"], {"data": 1_050}),
        (["duration=2 epochs", "mixture=()"], {}),
    ):
        config = check.load("shampax/configs/lm.py:sample", [*own, *changes])
        needed, _ = feed.length(config, components.build(config.data), sets.mixture(config))
        assert needed.keys() == expected.keys()
        assert all(expected[name] <= count <= expected[name] + 2 for name, count in needed.items())
