"""Measure how many rows of tokens, images and clicks a second are read into batches, from a fast and from a slow disk,
and of tokens how many one core reads in windows and mixtures; with --corpora how fast one core reads documents of each
format, and makes rows of them.

    python -m shampax.benchmarks.input

Shards of random rows are read as in training: shuffled, decoded, images also cropped. The slow disk is emulated by a
wait before each call that reads from a shard. Each is read with two threads and a call for each row, and as the options
say. Prints JSON.
"""

import argparse
import bz2
import dataclasses
import functools
import gzip
import io
import json
import lzma
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
from etils import epath
from PIL import Image

from ..framework.data import click_lines, clicks
from ..framework.data.images import ImageData, pictures
from ..framework.data.mixing import Mixed
from ..framework.data.pipeline import Batches, Reading
from ..framework.data.preparing.windows import Windows
from ..framework.data.reading import shards
from ..framework.data.text import TextData, packing
from ..framework.dataset import Augment, Example
from . import command

_SHARDS = 8
_ROW_LENGTH, _VOCABULARY = 2_049, 32_768
_PHOTOS = ImageData(source="tfds:imagenet2012:5.1.0", image_size=224)
_TOKENS = packing.row_type(_ROW_LENGTH, _VOCABULARY)


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of rows.

    Attributes:
      row: returns the bytes of a random row.
      decode: returns the examples of rows.
      rows: number of rows.
      batch: rows of a batch.
      augment: applied to each example.
    """

    row: Callable[[np.random.Generator], bytes]
    decode: Callable[[Sequence[bytes]], Any]
    rows: int
    batch: int
    augment: Augment | None = None


def _tokens(random: np.random.Generator) -> bytes:
    tokens = random.integers(_VOCABULARY, size=_ROW_LENGTH)
    segments = np.sort(random.integers(1, 9, size=_ROW_LENGTH))
    return packing.to_bytes((tokens, segments, 4 * _ROW_LENGTH), _TOKENS)


def _clicks(random: np.random.Generator) -> bytes:
    integers = random.integers(100, size=click_lines.INTEGERS).tolist()
    hashes = random.integers(2**32, size=(click_lines.CATEGORIES, 1)).tolist()
    return click_lines.packed((int(random.integers(2)), integers, hashes))


def click_log(seconds: float) -> dict[str, Any]:
    """Measure how many rows of a click log one core makes of text in a second of CPU time, of a line and of a block."""
    random, lines = np.random.default_rng(0), []
    for _ in range(20_000):
        integers = ["" if x < 0 else str(x) for x in np.expm1(random.normal(2, 2, click_lines.INTEGERS)).astype(int)]
        hashes = [f"{x:08x}" if x % 20 else "" for x in random.integers(2**32, size=click_lines.CATEGORIES).tolist()]
        lines.append("\t".join([str(random.integers(2)), *integers, *hashes]).encode() + b"\n")

    def of_lines() -> Iterable[Any]:
        return map(click_lines.parse_line, lines)

    def of_blocks() -> Iterable[Any]:
        return click_lines.parse(epath.Path("log"), enumerate(lines, start=1))

    result: dict[str, Any] = {}
    for name, make in {"line by line": of_lines, "by blocks": of_blocks}.items():
        begun, count = time.process_time(), 0
        while not count or time.process_time() < begun + seconds:
            count += sum(1 for _ in make())
        result[name] = round(count / (time.process_time() - begun), 1)
    return {"clicks made of text, rows/s of one core": result}


def _photo(random: np.random.Generator) -> bytes:
    coarse = Image.fromarray(random.integers(0, 256, (24, 32, 3), np.uint8))
    content = io.BytesIO()
    coarse.resize((500, 375), Image.Resampling.BICUBIC).save(content, "JPEG", quality=90)
    return content.getvalue()


def _photos(contents: Sequence[bytes]) -> Iterable[Example]:
    return ({"image": pictures.decode(content), "label": np.zeros((), np.int32)} for content in contents)


KINDS = {
    "tokens": Kind(
        _tokens,
        functools.partial(packing.unpacked, row_type=_TOKENS),
        rows=2_048,
        batch=64,
    ),
    "images": Kind(_photo, _photos, rows=256, batch=32, augment=_PHOTOS.augment),
    "clicks": Kind(_clicks, clicks.decoder(1), rows=65_536, batch=512),
}


def corpora(seconds: float) -> dict[str, Any]:
    """Measure how many documents and megabytes of the sample one core reads in a second of CPU time."""
    texts = list(TextData().sample("train")) * 4
    size = sum(len(text.encode()) for text in texts)
    plain = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    table = pyarrow.table({"text": texts})
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "plain.txt").write_text("\f".join(texts))
        (folder / "array.json").write_bytes(b"[" + plain.strip().replace(b"\n", b",") + b"]")
        pyarrow.parquet.write_table(table, folder / "zstd.parquet", compression="zstd")
        with pyarrow.ipc.new_stream(str(folder / "stream.arrow"), table.schema) as writer:
            writer.write_table(table, max_chunksize=1_000)
        for name, compress in {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress}.items():
            (folder / f"lines.jsonl{name}").write_bytes(compress(plain))
        with pyarrow.CompressedOutputStream(str(folder / "lines.jsonl.zst"), "zstd") as stream:
            stream.write(plain)
        for path in sorted(map(epath.Path, folder.iterdir())):
            begun, count = time.process_time(), 0
            while not count or time.process_time() < begun + seconds:
                count += sum(1 for _ in TextData().read(path))
            rate = count / (time.process_time() - begun)
            megabytes = rate * size / len(texts) / 1e6
            result[path.name] = {"documents/s": round(rate, 1), "MB/s": round(megabytes, 1)}
            print(f"{path.name}: {result[path.name]}", file=sys.stderr, flush=True)
        begun = time.process_time()
        TextData(source=f"file:{folder}/lines.jsonl", vocab_size=512, tokenizer=_tokenizer(folder)).prepare(
            folder / "rows"
        )
        result["rows of lines.jsonl"] = {"MB/s": round(size / 1e6 / (time.process_time() - begun), 2)}
    return {"corpora, one core": result, **click_log(seconds)}


def _tokenizer(folder: Path) -> str:
    path = folder / "tokenizer" / "tokenizer.json"
    path.parent.mkdir()
    path.write_text(TextData(vocab_size=512).train(TextData().sample("train")).to_str())
    return str(path)


class SlowRows(shards.ShardRows):
    """Rows of which each call waits `latency` seconds."""

    latency: float = 0.0

    def __reduce__(self) -> tuple[Any, ...]:
        return *super().__reduce__(), {"latency": self.latency}

    def _open(self, shard: int) -> Any:
        return _Slow(super()._open(shard), self.latency)


class _Slow:
    def __init__(self, reader: Any, latency: float):
        self._reader, self._latency = reader, latency

    def read(self, rows: list[int]) -> list[bytes]:
        time.sleep(self._latency)
        return self._reader.read(rows)


class OneByOne:
    """A source of which each call reads one row."""

    def __init__(self, rows: shards.ShardRows):
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        return next(iter(self._rows.__getitems__([index])))


def write(kind: Kind, place: Path) -> dict[epath.Path, int]:
    """Write the shards of a kind. Return them with their numbers of rows."""
    random, count = np.random.default_rng(0), kind.rows // _SHARDS
    paths = [epath.Path(place / f"{number}.array_record") for number in range(_SHARDS)]
    return {path: shards.write(path, (kind.row(random) for _ in range(count)))["rows"] for path in paths}


def rate(kind: Kind, source: Any, reading: Reading, seconds: float) -> float:
    """Return rows a second, without those that are read ahead at the start; at least one batch is read."""
    batches = Batches(
        source, seed=0, global_batch_size=kind.batch, rows=range(kind.batch), augment=kind.augment, reading=reading
    ).from_step(0)
    for _ in range(reading.ahead + 1):
        next(batches)
    begun, count = time.perf_counter(), 0
    while not count or time.perf_counter() < begun + seconds:
        next(batches)
        count += 1
    elapsed = time.perf_counter() - begun
    batches.close()
    return round(kind.batch * count / elapsed, 1)


def per_core(seconds: float) -> dict[str, float]:
    """Return how many rows of tokens one core reads in a second of CPU time: all shuffled, in windows, and mixed."""
    kind, found = KINDS["tokens"], dict[str, float]()
    with tempfile.TemporaryDirectory() as place:
        files = write(kind, Path(place))
        for number, path in enumerate([*files]):
            path.rename(path.with_name(f"train-{number:05}.array_record"))
        counts = [*files.values()]
        renamed = {epath.Path(place) / f"train-{n:05}.array_record": count for n, count in enumerate(counts)}
        rows = shards.ShardRows(renamed, kind.decode, 0, sum(counts))
        windows = Windows(epath.Path(place), kind.decode, 4, counts, making=False, wanted=0, process=0)
        ways = {
            "shuffled": rows,
            "windows of 4 shards": windows,
            "3 sources in windows": Mixed(dict.fromkeys("abc", windows), [(0, (5.0, 3.0, 1.0))]),
        }
        for way, source in ways.items():
            batches = Batches(source, seed=0, global_batch_size=kind.batch, rows=range(kind.batch))
            batches[0]
            begun, count = time.process_time(), 0
            while not count or time.process_time() < begun + seconds:
                count += 1
                batches[count]
            found[way] = round(kind.batch * count / (time.process_time() - begun), 1)
            print(f"tokens, {way}: {found[way]} rows/s per core", file=sys.stderr, flush=True)
    return found


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measure all kinds. Return the result as JSON."""
    knobs = {"threads": options.threads, "workers": options.workers, "ahead": options.ahead}
    result: dict[str, Any] = {"cores": os.cpu_count(), "seconds": options.seconds}
    for name in options.kinds:
        kind = KINDS[name]
        with tempfile.TemporaryDirectory() as place:
            files = write(kind, Path(place))
            for latency in (0.0, options.latency / 1e3):
                rows = SlowRows(files, kind.decode, 0, sum(files.values()))
                rows.latency = latency
                chosen = Reading.choose(rows, **knobs)
                ways = {
                    "a call for each row; 2 threads": (OneByOne(rows), Reading(2, 0, 2)),
                    f"a call for each shard; {chosen}": (rows, chosen),
                }
                for way, (source, reading) in ways.items():
                    disk = f"{1e3 * latency:g} ms a call"
                    found = rate(kind, source, reading, options.seconds)
                    result.setdefault(f"{name}, rows/s", {}).setdefault(disk, {})[way] = found
                    print(f"{name}, {disk}, {way}: {found} rows/s", file=sys.stderr, flush=True)
    return result | ({"tokens, rows/s per core": per_core(options.seconds)} if "tokens" in options.kinds else {})


def main(arguments: Sequence[str]) -> int:
    """Run the command line. Return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpora", action="store_true", help="measure the formats of corpora only")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--latency", type=float, default=30, metavar="MS", help="wait of the slow disk; default: 30")
    parser.add_argument("--seconds", type=float, default=3, metavar="S", help="time of each measurement; default: 3")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="as config.input.threads")
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="as config.input.workers; default: 0")
    parser.add_argument("--ahead", type=int, default=8, metavar="N", help="as config.input.ahead")
    options = parser.parse_args(arguments)
    return command.report(lambda: corpora(options.seconds) if options.corpora else measure(options))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
