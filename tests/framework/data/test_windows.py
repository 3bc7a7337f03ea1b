import contextlib
import itertools
import os
import re
import shutil
import signal
import threading
import time
import zlib

import pytest

from shampax.framework.base import paths
from shampax.framework.base.errors import UserError
from shampax.framework.config import check, components, sets
from shampax.framework.data import feed, mixing
from shampax.framework.data.clicks import ClickData
from shampax.framework.data.pipeline import Batches, Reading
from shampax.framework.data.preparing import preparing, windows, workers
from shampax.framework.data.reading import files, sources
from shampax.framework.data.text import TextData, tokenizer

ROWS = 12


def corpus(folder, files, **knobs):
    """Write a corpus of 40 documents a file, and return its data set: windows of 4 shards of 10 documents."""
    folder.mkdir()
    for number in range(files):
        texts = (f"Document {i} of file {number} has {'many ' * (i % 9)}words" for i in range(40))
        (folder / f"{number:03}.txt").write_text("\f".join(texts))
    path = folder.parent / "tokenizer.json"
    if not path.exists():
        path.write_text(tokenizer.train_tokenizer(iter(["many words of a document"]), 300).to_str())
    small = {"sequence_length": 16, "vocab_size": 300, "shard_size": 10, "shuffle_window": 4, "tokenizer": str(path)}
    return TextData(source=f"file:{folder}/*.txt", **(small | knobs))


def made(data, cache, **options):
    return preparing.run(data, paths.of(cache), workers=1, **options)


def opened(data, cache, rows=range(ROWS), seed=3):
    source = mixing.Mixed({"data": data.examples("train", cache)}, [(0, (1.0,))]) if rows == "mixed" else None
    return Batches(
        source or data.examples("train", cache),
        seed=seed,
        global_batch_size=ROWS,
        rows=range(ROWS) if source else rows,
        reading=Reading(2, 0, 2),
    )


def tokens(batches, numbers):
    return [batches[number]["tokens"].tolist() for number in numbers]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A data set of 8 files, its cache with all rows, and its first 160 batches, of two epochs."""
    place = tmp_path_factory.mktemp("windows")
    data = corpus(place / "a", 8)
    data.prepare_some(place / "cache", 1_000_000, 0)
    made(data, place / "cache", most=1_000_000, extend=True)
    return data, place / "cache", tokens(opened(data, place / "cache"), range(160))


def test_any_share_from_any_step(whole):
    """Faults: another number of processes, or a resumed run, trains on other rows; an epoch lacks rows or repeats some;
    all epochs have one order; rows stay in the order of the documents."""
    data, cache, batches = whole
    for processes in (2, 4):
        for number in (31, 2, 17):
            parts = [opened(data, cache, range(ROWS)[share::processes])[number] for share in range(processes)]
            for share, part in enumerate(parts):
                assert part["tokens"].tolist() == batches[number][share::processes]
    resumed = [batch["tokens"].tolist() for batch in itertools.islice(opened(data, cache).from_step(7), 5)]
    assert resumed == batches[7:12]
    rows = [str(row) for row in itertools.chain.from_iterable(batches)]
    count = data.manifest(cache)[1]["ranges"]["train"][1]
    assert count < len(rows) // 2
    assert sorted(rows[:count]) == sorted(rows[count : 2 * count]) and rows[:count] != rows[count : 2 * count]
    stored = data.examples("train", cache)
    first = [str(stored[row]["tokens"].tolist()) for row in range(60)]
    assert rows[:60] != first and tokens(opened(data, cache, seed=4), [0]) != batches[:1]
    window = sum(shard["rows"] for shard in [s for s in data.manifest(cache)[1]["shards"] if s["split"] == "train"][:4])
    every = [str(stored[row]["tokens"].tolist()) for row in range(window)]
    assert sorted(rows[:window]) == sorted(every)


@pytest.mark.parametrize("size", [1, 2, 100])
def test_batches_while_rows_are_made(tmp_path, size):
    """Faults: while rows are made, another number of processes, a resume at another step, or another order in which
    sources are made, gives a mixture other batches."""
    # Few long windows: grain shuffles less than 1,000 rows slowly.
    both = [corpus(tmp_path / name, 4, shuffle_window=size, sequence_length=4, shard_size=40) for name in "ab"]
    (tmp_path / "b" / "000.txt").write_text("a document of b\f" * 90)

    def prepared(cache, most):
        for data in both:
            data.prepare_some(cache, 10**6, 0)
            made(data, cache, most=most, extend=True)
        return cache

    def reading(cache, processes, share, step):
        """Yield the batches of a share from a step on, as a process that has just started."""
        sources = {name: data.examples("train", cache) for name, data in zip("ab", both, strict=True)}
        mixed = mixing.Mixed(sources, [(0, (3.0, 1.0)), (100, (1.0, 1.0))])
        rows = range(share, ROWS, processes)
        batches = Batches(mixed, seed=5, global_batch_size=ROWS, rows=rows, reading=Reading(2, 0, 2)).from_step(step)
        return contextlib.closing(batch["tokens"].tolist() for batch in batches)

    def taken(batches, count):
        return [*itertools.islice(batches, count)]

    with reading(prepared(tmp_path / "whole", 10**6), 1, 0, 0) as batches:
        whole = taken(batches, 160)
    begun, rows, here = time.process_time(), 0, prepared(tmp_path / "here", 1)
    shares = ((1, 0), (2, 0), (2, 1), (4, 0), (4, 3))
    for step, most in ((0, 100), (74, 500), (76, 520), (83, 550), (155, 10**6)):
        with contextlib.ExitStack() as stack:
            readers = [stack.enter_context(reading(here, *share, step)) for share in shares]
            maker = threading.Thread(target=prepared, args=(here, most))
            maker.start()
            found = [taken(reader, 4) for reader in readers]
            maker.join()
        for (processes, share), batches in zip(shares, found, strict=True):
            assert batches == [batch[share::processes] for batch in whole[step : step + 4]]
        rows += sum(len(batch) for batches in found for batch in batches)
    rate = rows / (time.process_time() - begun)
    print(f"windows of {size}: {rate:,.0f} rows/s per core, made and read by 5 readers from 5 steps")


def test_batches_need_only_the_shards_before_them(whole, tmp_path, monkeypatch, capfd):
    """Faults: training waits for all shards, or does not wait, or does so silently; prepared rows and mixtures have
    another order; a run that was killed while it made rows continues on others."""
    data, cache, batches = whole
    here = tmp_path / "cache"
    data.prepare_some(here, 1_000_000, 0)
    assert len(list(here.glob("rows-*/train-*.array_record"))) == 4
    assert len(list(here.glob("rows-*/heldout-*.array_record"))) == 1
    monkeypatch.setattr(windows, "_SAY", 0.1)
    early = opened(data, here)
    assert tokens(early, [0, 1]) == batches[:2]
    assert data.fingerprint(here) == data.fingerprint(cache)
    found = []
    thread = threading.Thread(target=lambda: found.append(tokens(early, [15])))
    thread.start()
    thread.join(0.8)
    assert thread.is_alive()
    assert re.search("process 0 waits for shard train-00004 of .*, which process 0 makes: 0 s", capfd.readouterr().err)
    made(data, here, most=150, extend=True)  # killed after some shards: no manifest of all
    (folder,) = here.glob("rows-*")
    (folder / "manifest.json").unlink()
    assert len(list(folder.glob("train-*.json"))) % 4 == 0
    data.prepare_some(here, 1_000_000, 0)
    late = opened(data, here)
    made(data, here, most=1_000_000, extend=True)
    thread.join()
    assert found == [batches[15:16]] and tokens(late, range(20)) == batches[:20]
    mixed = opened(data, here, "mixed", seed=zlib.crc32(b"data") ^ 3)
    assert tokens(mixed, [0, 40, 15]) == [batches[number] for number in (0, 40, 15)]


def test_a_failure_ends_the_run_with_one_error(whole, tmp_path, monkeypatch, capfd):
    """Faults: a run waits for ever for rows that nobody makes; the error does not name the file or the fix; workers of
    the preparation survive the run; a thread that waits survives it."""
    data, _, batches = whole
    data.prepare_some(tmp_path, 1_000_000, 0)
    waiting = data.examples("train", tmp_path)

    def failure(work):
        """Return why no rows are made, where `work` takes the place of the processes that make them."""
        monkeypatch.setattr(preparing, "run_in_processes", lambda *arguments: work(arguments[-1]))
        end = time.monotonic() + 60
        with data.ahead(tmp_path, 1_000_000) as told:
            while not told() and time.monotonic() < end:
                time.sleep(0.01)
            assert waiting.made(10**6) < 10**6
            return told()

    (folder,) = tmp_path.glob("rows-*")
    why = "the rows of later steps cannot be made: "
    killed = [(signal.SIGKILL,)]
    told = failure(lambda until: workers.run_in_processes(signal.raise_signal, killed, folder, until))
    assert re.fullmatch(rf"{why}{folder}: .* died with exit code -9, .* Use fewer workers .*", told)
    told = failure(lambda until: next(files.pieces(folder / "none.txt", b"\n", 9)))
    assert re.fullmatch(rf"{why}data file {folder}/none.txt: cannot be read .*\. Replace or remove it\.", told)
    told = failure(lambda until: os.write(os.open("/dev/full", os.O_WRONLY), b"a"))
    assert re.fullmatch(rf"{why}{folder}: cannot be written \(No space left.*\. Free disk space .*", told)
    monkeypatch.undo()
    assert capfd.readouterr().err.count("warning: the rows of later steps cannot be made") == 3
    reading = opened(data, tmp_path).from_step(2)
    next(reading)
    before = threading.active_count()
    reading.close()
    with data.ahead(tmp_path, 1_000_000):
        assert tokens(opened(data, tmp_path), [20]) == batches[20:21]
    assert threading.active_count() <= before


@pytest.mark.parametrize("worker", [None, 0, 1])
def test_finished_shards_are_not_read_again(whole, tmp_path, monkeypatch, worker):
    """Faults: a resumed run reads the corpus from its beginning; it skips records, or has some twice; a worker begins
    after shards that it has to make."""
    data, cache, _ = whole
    (folder,) = cache.glob("rows-*")
    here = tmp_path / folder.name
    shutil.copytree(folder, here)
    numbers = (13, 18, 19) if worker is None else (19 - worker,)  # the first shard of all is a held-out one
    lost = [path for number in numbers for path in here.glob(f"train-{number:05}.*")]
    (here / "manifest.json").unlink()
    for path in lost:
        path.unlink()
    read, texts = TextData.read, []
    monkeypatch.setattr(TextData, "read", lambda self, path: (texts.append(text) or text for text in read(self, path)))
    data.open_source()
    opening = len(texts)
    texts.clear()
    if worker is None:
        made(data, tmp_path, most=1_000_000, extend=True)
    else:
        limits = preparing._limits(data, data.open_source(), 1_000_000, False)
        preparing._make_shards(data, here, data.tokenizer, limits, worker, 2)
    for path in lost:
        assert path.read_bytes() == (folder / path.name).read_bytes(), path.name
    documents = len(texts) - 2 * opening  # the source is opened twice
    print(f"from shard {numbers[0]} of 29 on: {documents} of 320 documents are read")
    assert documents < 320 - 10 * numbers[0] + 2 * 40  # a tenth is held out; a file is read from its beginning


def test_blocks_from_any_place(tmp_path):
    """Faults: after a resume `max_records` counts from there on; a block begins one record early or late."""
    stream = corpus(tmp_path / "a", 5, max_records=155).open_source().streams[1]
    every = [list(block) for block in stream.blocks()]
    assert [len(block) for block in every] == 15 * [10] + [5]
    for number in (1, 7, 15, 16):
        cursor = sources.Cursor()
        for block in itertools.islice(stream.blocks(cursor), number):
            list(block)
        assert [list(block) for block in stream.blocks(sources.Cursor(number, cursor.place))] == every[number:]


@pytest.mark.parametrize("files", [8, 80])
def test_what_is_read_before_the_first_step(tmp_path, files, monkeypatch):
    """Fault: a larger corpus starts later."""
    data, read = corpus(tmp_path / "a", files), []
    encoded = TextData.rows

    def rows(self, stream, number, records, *rest):
        return encoded(self, stream, number, (read.append(record) or record for record in records), *rest)

    monkeypatch.setattr(TextData, "rows", rows)
    data.prepare_some(tmp_path / "cache", 1_000_000, 0)
    opened(data, tmp_path / "cache")[0]
    assert len(read) == 50


def test_files_are_mixed(tmp_path):
    """Fault: a corpus sorted by topic is trained on its first part only."""
    data = corpus(tmp_path / "a", 30)
    names = [next(iter(records)).split()[4] for records in data.open_source().streams[1].blocks()]
    assert names != sorted(names) and {int(name) // 10 for name in names[:20]} == {0, 1, 2}


class Numbered:
    """A tfds set of texts that are their own index; `read` has those that were read."""

    features, fingerprint, text_bytes = ("text",), "", 0

    def __init__(self, count):
        self.count, self.read = count, []

    def source(self, split):
        return range(self.count)

    def stream(self, split, start, stop):
        for index in range(start, stop):
            self.read.append(index)
            yield str(index), {"text": str(index).encode()}


def test_blocks_of_a_tfds_set_are_mixed():
    """Faults: a sorted set is trained on its first part only; a block is lost; reading a shard reads those before."""
    found = Numbered(1_003)
    stream = sources.tfds_source(found, str, 10, 0, mixed=True).streams[1]
    blocks = list(stream.blocks())
    assert len(blocks) == stream.shards == 101 and not found.read
    tenth = [int(record) for record in blocks[10]]
    assert found.read == tenth and len(tenth) in (3, 10)
    every = [int(record) for block in (*blocks[:10], *blocks[11:]) for record in block] + tenth
    assert sorted(every) == list(range(1_003)) and {record // 335 for record in every[:300]} == {0, 1, 2}
    again = sources.tfds_source(Numbered(1_003), str, 10, 0, mixed=True).streams[1]
    assert [int(record) for record in list(again.blocks())[10]] == tenth


def test_refusals(tmp_path):
    """Faults: epochs of unknown length; files that cannot be divided are prepared whole without a word; rows that were
    prepared before there were windows do not fit any more."""
    assert "shuffle_window" not in TextData().settings() and "shuffle_window" in TextData(shuffle_window=2).settings()
    (tmp_path / "day_0").write_text("")
    (tmp_path / "day_1").write_text("")
    clicks = ClickData(source=f"file:{tmp_path}/day_*", shuffle_window=4)
    with pytest.raises(UserError, match="files of ClickData are prepared whole"):
        clicks.prepare(tmp_path / "cache")
    config = check.load("shampax/configs/lm.py:sample", ["data.shuffle_window=4", "duration=2 epochs"])
    with pytest.raises(UserError, match="shuffle_window: a mixture has no epochs"):
        feed.length(config, components.build(config.data), sets.mixture(config))
