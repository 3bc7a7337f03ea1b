import dataclasses
import os
import resource
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from shampax.framework.base import paths
from shampax.framework.base.errors import UserError
from shampax.framework.config import check, components, sets
from shampax.framework.data.clicks import ClickData
from shampax.framework.data.masked import MaskedTextData
from shampax.framework.data.pairs import PairData
from shampax.framework.data.pipeline import Batches, HeldoutBatches
from shampax.framework.data.preparing import preparing, workers
from shampax.framework.data.reading import files, shards
from shampax.framework.data.text import TextData
from shampax.framework.dataset import augment, beside
from shampax.launch import prepare

WORDS = ["some", "words", "of", "many", "that", "make", "a", "sentence", "with", "which", "no", "one", "would", "begin"]
TEXTS = [" ".join(WORDS[(i * k) % 13] for k in range(3, 30)) + f". Number {i} ends here.\nAnd {i}." for i in range(60)]


@pytest.fixture
def sources(tmp_path):
    """Return one small data set of each kind, in several shards, by name."""
    text, pairs, clicks = (tmp_path / name for name in ("a.txt", "a.tsv", "clicks.txt"))
    text.write_text("\f".join(TEXTS))
    pairs.write_text("".join(f"{i} {text[:50]}\t{text[50:100]}\n" for i, text in enumerate(TEXTS)))
    clicks.write_text(
        "".join(f"{i % 2}\t" + "\t".join(map(str, range(i, i + 13))) + "\t1f" * 26 + "\n" for i in range(60))
    )
    return {
        "text": TextData(source=f"file:{text}", sequence_length=16, vocab_size=300, shard_size=9),
        "pairs": PairData(
            source=f"file:{pairs}", source_length=90, target_length=90, vocab_size=300, shard_size=9, pairs_per_row=2
        ),
        "masked": MaskedTextData(
            source=f"file:{text}", sequence_length=32, vocab_size=300, predictions=4, shard_size=9
        ),
        "clicks": ClickData(source=f"file:{clicks}", shard_size=7),
    }


def content(folder):
    """Return the bytes of all files in a folder, by name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def in_shares(data, folder, processes=1):
    for process in range(processes):
        manifest = preparing.run(data, paths.of(folder), workers=1, process=process, processes=processes)
        assert (manifest is None) == (process < processes - 1)


@pytest.mark.parametrize("kind", ["text", "pairs", "masked", "clicks"])
def test_a_prepared_cache_gives_the_same_batches(sources, tmp_path, kind):
    """Faults: shards are in another order; rows are of another process; the source is still needed."""
    data = sources[kind]
    data.prepare(tmp_path / "run")
    in_shares(data, tmp_path / "here", processes=3)
    assert content(tmp_path / "here") == content(tmp_path / "run")
    assert len(list((tmp_path / "here").glob("rows-*/train-*.array_record"))) > 3 or kind == "clicks"
    os.remove(data.source.removeprefix("file:"))
    there = dataclasses.replace(data, prepared=str(tmp_path / "here"))
    there.prepare(tmp_path / "unused")
    assert not (tmp_path / "unused").exists()
    (tmp_path / data.source.rpartition("/")[2]).write_bytes(b"")  # a run with its own workdir reads its source
    with pytest.raises(UserError):
        data.examples("train", tmp_path / "run")
    runs = [dataclasses.replace(data, prepared=str(tmp_path / name)) for name in ("run", "here")]
    assert runs[0].fingerprint("") == runs[1].fingerprint("")
    wanted = {"global_batch_size": 4, "rows": range(4)}
    trained = [Batches(run.examples("train", ""), seed=1, augment=augment(run), **wanted) for run in runs]
    for step in (0, 3, 40):
        jax.tree.map(np.testing.assert_array_equal, trained[0][step], trained[1][step])
    judged = [HeldoutBatches(run.examples("heldout", ""), **wanted) for run in runs]
    assert len(judged[0]) == len(judged[1])
    jax.tree.map(np.testing.assert_array_equal, judged[0][0], judged[1][0])


def test_any_number_of_workers_writes_the_same_bytes(sources, tmp_path):
    """Faults: rows depend on the worker; a worker writes the shards of another, or none."""
    in_shares(sources["pairs"], tmp_path / "alone")
    preparing.run(sources["pairs"], paths.of(tmp_path / "two"), workers=2)
    assert content(tmp_path / "two") == content(tmp_path / "alone")


PREPARE = """
import os, signal, sys
from shampax.framework.base import paths
from shampax.framework.data.preparing import preparing; from shampax.framework.data.reading import files, shards
from shampax.framework.data.text import TextData
write, made = shards.write, []
def slow(path, rows):
    if len(made) == 3:
        open(path.with_name(f".{path.name}.1.partial"), "w").write("half")
        os.kill(os.getpid(), signal.SIGKILL)
    made.append(path)
    return write(path, rows)
shards.write = slow
data = TextData(source=sys.argv[1], sequence_length=16, vocab_size=300, shard_size=9)
preparing.run(data, paths.of(sys.argv[2]), workers=1)
"""


def test_a_killed_preparation_resumes(sources, tmp_path, monkeypatch):
    """Faults: a partly written shard counts as complete; shards are written twice; temporary files remain."""
    data = sources["text"]
    arguments = ["--config=shampax/configs/lm.py:sample", f"--output={tmp_path}/killed", "--workers=1"]
    knobs = {"source": data.source, "sequence_length": 16, "shard_size": 9}
    arguments += [f"--config.data.{key}={value}" for key, value in knobs.items()]
    arguments += ["--config.task.vocab_size=300"]
    done = subprocess.run(
        [sys.executable, "-c", PREPARE, data.source, tmp_path / "killed"], capture_output=True, text=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(list((tmp_path / "killed").glob("rows-*/*.array_record"))) == 3
    made, write = [], shards.write
    monkeypatch.setattr(shards, "write", lambda path, rows: made.append(path.name) or write(path, rows))
    assert prepare.main(arguments) == 0
    in_shares(data, tmp_path / "whole")
    assert content(tmp_path / "killed") == content(tmp_path / "whole")
    total = len(list((tmp_path / "whole").glob("rows-*/*.array_record")))
    assert len(made) == (total - 3) + total


def test_a_cache_that_does_not_match_is_one_line(sources, tmp_path, capsys):
    """Faults: rows of other settings are trained on; a missing shard is found at its first row; a traceback."""
    data, place = sources["text"], tmp_path / "here"
    there = dataclasses.replace(data, prepared=str(place))
    with pytest.raises(UserError, match=r"holds no prepared data. To make them, run shampax prepare"):
        there.prepare(tmp_path)
    in_shares(data, place)
    with pytest.raises(UserError, match="sequence_length 16 there, 17 here"):
        dataclasses.replace(there, sequence_length=17).prepare(tmp_path)
    shard = next(place.glob("rows-*/train-00002.array_record"))
    whole = shard.read_bytes()
    for content in (whole[:-1], None):
        shard.unlink() if content is None else shard.write_bytes(content)
        with pytest.raises(UserError, match=r"1 of \d+ shards are missing.*train-00002.*to make them"):
            there.prepare(tmp_path)
    in_shares(data, place)
    assert shard.read_bytes() == whole
    next(place.glob("rows-*/manifest.json")).unlink()
    with pytest.raises(UserError, match="has shards but no manifest"):
        there.prepare(tmp_path)
    arguments = ["--config=shampax/configs/resnet.py:sample", f"--output={place}"]
    assert prepare.main(arguments) == 2
    assert "nothing to prepare" in capsys.readouterr().err
    for flag, message in (("--process=2/2", "from 0 to N - 1"), ("--workers=0", "at least 1")):
        assert prepare.main([*arguments, flag]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_full_disk_is_one_line(sources, tmp_path, workers, capsys):
    """Faults: a traceback of a library; half a shard counts as complete; finished shards are lost."""
    data = dataclasses.replace(sources["clicks"], shard_size=1_000_000)
    place, log = tmp_path / "out", Path(data.source.removeprefix("file:"))
    log.write_text(log.read_text() * 40)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(UserError, match=rf"{place}/rows-\w+: cannot be written \(.*\). Free disk space"):
            preparing.run(data, paths.of(place), workers=workers)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "Traceback" not in capsys.readouterr().err
    assert not list(place.glob("rows-*/*.array_record"))
    if workers == 1:
        preparing.run(data, paths.of(place), workers=workers)
        assert list(place.glob("rows-*/manifest.json"))


def test_the_printed_command_trains_on_the_rows(sources, tmp_path, capsys):
    """Faults: the command lacks the overrides, so that the rows do not match; a shell would split a value; further
    held-out sets are not prepared, or with a tokenizer of their own, or cannot name files."""
    place = tmp_path / "it's [1]"
    spec = ["--config=shampax/configs/lm.py:sample", f"--config.data.source={sources['text'].source}"]
    knobs = ["--config.data.sequence_length=16", "--config.task.vocab_size", "300", "--config.data.max_malformed=3"]
    knobs.append(f"--config.evaluation.sets=more.source={sources['text'].source},more.heldout_fraction=0.5")
    assert prepare.main([*spec, *knobs, f"--output={place}", "--workers=1"]) == 0
    command = shlex.split(capsys.readouterr().out.partition("train with ")[2].replace("WORKDIR", str(tmp_path / "run")))
    assert command[:2] == ["shampax", "train"]
    assert f"--config.data.prepared={place}" in command
    changes = [word.removeprefix("--config.") for word in command if word.startswith("--config.")]
    config = check.load(spec[0].removeprefix("--config="), changes)
    data = components.build(config.data)
    data.prepare(tmp_path / "unused")
    assert data.load_tokenizer("").get_vocab_size() <= 300
    more = beside(sets.heldout_sets(config)["more"], data, tmp_path / "unused")
    more.prepare(tmp_path / "unused")
    assert len(data.examples("train", "")) > 0 and not (tmp_path / "unused").exists()
    assert more.load_tokenizer("").to_str() == data.load_tokenizer("").to_str()
    assert len(more.examples("heldout", "")) > len(data.examples("heldout", ""))


def test_a_worker_that_fails_or_dies_is_one_line(tmp_path):
    """Faults: a preparation waits for a worker that was killed; it hides why another one failed."""
    with pytest.raises(UserError, match="'none' matches no file"):
        workers.run_in_processes(
            files.find, [("data.source", __file__, (".py",)), ("data.source", "none", ("",))], tmp_path
        )
    with pytest.raises(UserError, match="died with exit code 3"):
        workers.run_in_processes(os._exit, [(0,), (3,)], tmp_path)
