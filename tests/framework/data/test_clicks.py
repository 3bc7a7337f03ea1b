"""Test click logs: irregular rows in Criteo's files, the flights, and synthetic clicks."""

import functools
import gzip
import json
import re

import jax
import numpy as np
import pytest
from synthetic_clicks import SyntheticClicks

from shampax.benchmarks.input import OneByOne
from shampax.framework.base.errors import UserError
from shampax.framework.data import click_lines, clicks
from shampax.framework.data.click_lines import MISSING
from shampax.framework.data.clicks import ClickData
from shampax.framework.data.pipeline import Batches, HeldoutBatches
from shampax.framework.data.reading import tsv
from shampax.framework.data.reading.malformed import Malformed


def line(label=0, integers=None, categories=None):
    """Return a row of Criteo's format with `number: text` for some of its fields, which count from 1."""
    fields = [str(label), *("7" for _ in range(13)), *(f"{i:08x}" for i in range(26))]
    for place, text in (integers or {}).items():
        fields[place] = text
    for place, text in (categories or {}).items():
        fields[13 + place] = text
    return "\t".join(fields)


def numbered(count, first=0):
    """Return rows whose first integer is their number."""
    return [line(i % 2, {1: str(i)}) for i in range(first, first + count)]


def write(path, lines, end="\n"):
    content = "".join(row + end for row in lines).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def prepared(cache, **fields):
    data = ClickData(**fields)
    data.prepare(cache)
    return data


def numbers(data, split, cache):
    rows = data.examples(split, cache)
    return [int(rows[i]["integers"][0]) for i in range(len(rows))]


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def test_empty_negative_and_large_fields(tmp_path, cache):
    """Faults: an empty field is 0; a negative count is lost; a hash is truncated; a 64-bit integer wraps around."""
    path = write(
        tmp_path / "train.txt",
        [
            line(
                1, {1: "", 2: "-3", 3: "99999999999", 4: "-99999999999"}, {1: "", 2: "ffffffff", 3: "A", 26: "0000000b"}
            ),
            line(0),
        ],
        end="\r\n",
    )
    path.write_bytes(path.read_bytes() + b"\r\n\n")  # blank lines at the end are allowed
    data = prepared(cache, source=f"file:{path}", heldout_fraction=0.5)
    first, second = data.examples("train", cache)[0], data.examples("heldout", cache)[0]
    assert first["integers"].tolist() == [MISSING, -3, 2**31 - 1, MISSING + 1, *[7] * 9]
    assert first["categories"].tolist() == [0, 2**32 - 1, 10, *range(3, 25), 11]
    assert (first["label"], second["label"], first["weight"]) == (1, 0, 1)
    for example in (first, second):
        found = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in example.items()}
        assert found == data.spec() == SyntheticClicks().spec()


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ("\t".join(line().split("\t")[:39]), "39 columns, expected 40"),
        (line() + "\t", "41 columns, expected 40"),
        (line(2), "label '2' is neither 0 nor 1"),
        (line(""), "column 1 is empty"),
        (line(0, {3: "1.5"}), "column 4 is not a 64-bit integer: '1.5'"),
        (line(0, {1: "1_000"}), "column 2 is not a 64-bit integer: '1_000'"),
        (line(0, {1: "٣"}), "column 2 is not a 64-bit integer: '٣'"),
        (line(0, {2: " 2"}), "column 3 is not a 64-bit integer: ' 2'"),
        (line(0, {2: "9223372036854775808"}), "column 3 is not a 64-bit integer: '9223372036854775808'"),
        (line(0, {2: 5000 * "9"}), f"column 3 is not a 64-bit integer: '{40 * '9'}'"),
        (line(0, {}, {1: "xyz"}), "column 15 is not a 32-bit hexadecimal number: 'xyz'"),
        (line(0, {}, {26: "123456789"}), "column 40 is not a 32-bit hexadecimal number: '123456789'"),
        (line(0, {}, {2: "-1"}), "column 16 is not a 32-bit hexadecimal number: '-1'"),
        (line(0, {}, {2: "0x1"}), "column 16 is not a 32-bit hexadecimal number: '0x1'"),
    ],
)
def test_malformed_rows_are_named_or_skipped(tmp_path, cache, capsys, bad, reason):
    """Faults: the content of a malformed row is guessed; it changes the numbers of other rows; it is a traceback."""
    path = write(tmp_path / "train.txt", [*numbered(4), bad, *numbered(4, 4)])
    place = f"{path}, row 5: {reason}"
    with pytest.raises(UserError, match=re.escape(place)):
        prepared(cache, source=f"file:{path}")
    assert not list(cache.glob("rows-*/*"))
    data = prepared(cache, source=f"file:{path}", max_malformed=1)
    assert numbers(data, "train", cache) + numbers(data, "heldout", cache) == [*range(8)]
    assert f"1 record is malformed ({place}), skipped" in capsys.readouterr().err
    data.prepare(cache)
    assert place in capsys.readouterr().err, "said once and never again"
    with pytest.raises(UserError, match=re.escape(place)):
        prepared(cache, source=f"file:{path}")


IRREGULAR = [
    line(1, {1: "", 2: "-3", 3: "99999999999", 4: "-99999999999", 5: "-", 6: "007"}),
    line(1, {1: "-0", 2: "999999999", 3: "-999999999", 4: "1000000000"}, {1: "", 2: "ffffffff", 3: "A", 26: ""}),
    line(0, {}, {1: "a,b"}),
    line(0, {}, {1: "a,b,FFFFFFFF", 2: "", 3: "0", 26: "1,1"}),
    line(0, {}, {1: "a,b,c,d"}),
    line(0, {}, {1: "a,,c"}),
    line(0, {}, {26: ",a"}),
    line(0, {}, {26: "123456789"}),
    line(0, {3: "1,2"}),
    line("0,1"),
    line(2),
    line(""),
    line(" 1"),
    line() + "\t",
    "\t".join(line().split("\t")[:39]),
    "",
    "\t" * 39,
    "1" + "\t" * 39,
    line(0, {1: "٣"}),
    line(0, {1: "1\r"}),
    line(0, {1: "\0"}),
]


@pytest.mark.parametrize("most_values", [1, 3])
def test_blocks_of_lines_give_the_rows_of_their_lines(most_values):
    """Faults: an irregular line is guessed, or changes its neighbours; an empty field is 0; values of a field have
    other places; a block that is not the first has other rows."""
    texts = [each for bad in IRREGULAR for each in (line(1, {2: "5"}), bad)] * 120
    lines = [(text + ("\r\n" if number % 3 else "\n")).encode() for number, text in enumerate(texts)]
    lines[7], lines[-1] = None, line().encode()
    assert len(lines) > click_lines._BLOCK
    found = click_lines.parse("log", enumerate(lines, start=1), most_values)
    found = [str(each).partition(": ")[2] if isinstance(each, Malformed) else each for each in found]
    assert found == [click_lines.parse_line(each, most_values) for each in lines]
    _, regular = click_lines.parse_regular([(text + "\n").encode() for text in texts[::2]], most_values)
    assert regular.all()


def test_fields_with_several_values(tmp_path, cache):
    """Faults: zeros that fill a field count as values; rows of another number of values are taken from the cache."""
    path = write(tmp_path / "train.txt", [line(0, {}, {1: "a,b", 2: "", 3: "0"}), *numbered(13)])
    data = prepared(cache, source=f"file:{path}", most_values=3)
    first = data.examples("train", cache)[0]
    assert first["values"].tolist() == [2, 0, *[1] * 24]
    assert first["categories"][:3].tolist() == [[10, 11, 0], [0, 0, 0], [0, 0, 0]]
    found = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in first.items()}
    assert found == data.spec()
    with pytest.raises(UserError, match=r"column 15 has 2 values, more than data.most_values=1"):
        prepared(cache, source=f"file:{path}")


def test_batches_of_arrays_are_those_of_examples(tmp_path, cache):
    """Faults: rows of a batch are in the order of the files; padding of the last batch has a weight."""
    data = prepared(cache, source=f"file:{write(tmp_path / 'a', numbered(70))}")
    for split, make in (("train", functools.partial(Batches, seed=3)), ("heldout", HeldoutBatches)):
        rows = data.examples(split, cache)
        assert rows.stacked is not None
        single = OneByOne(rows)
        mine, others = (make(each, global_batch_size=8, rows=(5, 2, 3, 7)) for each in (rows, single))
        for step in (0, 1):
            jax.tree.map(np.testing.assert_array_equal, mine[step], others[step])
    assert mine[1]["weight"].tolist() == [0, 0, 0, 0]


def test_malformed_rows_of_all_files_count_together(tmp_path, cache):
    """Fault: the limit applies to each file separately."""
    for day in range(3):
        write(tmp_path / f"day_{day}", [*numbered(3), "bad"])
    with pytest.raises(UserError, match=r"max_malformed=2: 3 records are malformed.*day_0.*day_1.*day_2"):
        prepared(cache, source=f"file:{tmp_path}/day_*", max_malformed=2)


@pytest.mark.parametrize("workers", [1, 2])
def test_files_are_in_the_order_of_their_numbers(tmp_path, cache, workers):
    """Faults: day_10 is read before day_9, so that held-out rows are not the last; workers mix up files."""
    for place, day in enumerate((0, 9, 10)):
        write(tmp_path / f"day_{day}.gz", numbered(10, 10 * place))
    data = prepared(cache, source=f"file:{tmp_path}/day_*.gz", heldout_fraction=0.2, workers=workers)
    assert numbers(data, "train", cache) == [*range(24)]
    assert numbers(data, "heldout", cache) == [*range(24, 30)]
    assert prepared(tmp_path / "again", source=f"file:{tmp_path}/day_*.gz", heldout_fraction=0.2).fingerprint(
        tmp_path / "again"
    ) == data.fingerprint(cache)


@pytest.mark.parametrize("place", ["", "elsewhere"])
def test_files_can_be_held_out(tmp_path, cache, place):
    """Faults: the last day is trained on; it is not held out because it is in another folder."""
    (tmp_path / place).mkdir(exist_ok=True)
    for day in range(3):
        write(tmp_path / f"day_{day}", numbered(5, 5 * day))
    last = write(tmp_path / place / "day_23", numbered(5, 15))
    data = prepared(cache, source=f"file:{tmp_path}/day_*", heldout_files=str(last) if place else "day_23")
    assert numbers(data, "train", cache) == [*range(15)]
    assert numbers(data, "heldout", cache) == [*range(15, 20)]


def test_kaggles_split_is_the_last_seventh(tmp_path, cache):
    """Faults: rows are held out at random; held-out rows are trained on too."""
    data = prepared(cache, source=f"file:{write(tmp_path / 'train.txt', numbered(70))}")
    assert numbers(data, "heldout", cache) == [*range(60, 70)]
    assert sorted(numbers(data, "train", cache)) == [*range(60)]


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"source": "criteo"}, "data.source='criteo': write 'sample:flights' or 'file:/path/day_"),
        ({"heldout_files": "day_23"}, "sample:flights holds out November and December; leave it empty"),
        ({"heldout_fraction": 1.0}, "data.heldout_fraction=1.0"),
        ({"max_malformed": -1}, "data.max_malformed=-1"),
        ({"workers": 0}, "data.workers=0"),
    ],
)
def test_invalid_fields_are_refused(fields, error):
    """Faults: a knob has no effect; a traceback comes later."""
    with pytest.raises(ValueError, match=error):
        ClickData(**fields)


def test_invalid_sources(tmp_path, cache):
    """Faults: a traceback; an empty split that is noticed after hours."""
    with pytest.raises(UserError, match=r"data.source: '.*none' matches no file"):
        prepared(cache, source=f"file:{tmp_path}/none")
    path = write(tmp_path / "one", numbered(1))
    with pytest.raises(UserError, match="has no usable rows for the heldout split"):
        prepared(cache, source=f"file:{path}")
    with pytest.raises(UserError, match=r"data.heldout_files: '.*day_9' matches no file"):
        prepared(cache, source=f"file:{path}", heldout_files="day_9")
    with pytest.raises(UserError, match="call prepare first"):
        ClickData(source=f"file:{path}").examples("train", cache)


def test_the_fingerprint_depends_on_the_rows(tmp_path, cache):
    """Faults: a moved file stops a run that resumes; a changed file does not."""
    path = write(tmp_path / "a", numbered(14))
    first = prepared(cache, source=f"file:{path}").fingerprint(cache)
    moved = path.rename(tmp_path / "b")
    assert prepared(cache, source=f"file:{moved}").fingerprint(cache) == first
    assert prepared(cache, source=f"file:{moved}", heldout_fraction=0.5).fingerprint(cache) != first
    write(moved, [*numbered(13), line(1)])
    assert prepared(cache, source=f"file:{moved}").fingerprint(cache) != first


def test_damage_is_detected(tmp_path, cache):
    """Faults: a flipped bit becomes another category; a missing stamp is a traceback."""
    data = prepared(cache, source=f"file:{write(tmp_path / 'a', numbered(200))}")
    (file,) = cache.glob("rows-*/*.array_record")
    content = bytearray(file.read_bytes())
    content[content.index(np.int32(150).tobytes(), 20_000)] ^= 1
    file.write_bytes(content)
    rows = data.examples("train", cache)
    assert rows[0]["integers"][0] == 0
    with pytest.raises(UserError, match="row 151: cannot be read"):
        rows[150]
    (stamp,) = cache.glob("rows-*/manifest.json")
    stamp.write_text(json.dumps(json.loads(stamp.read_text()) | {"shards": [{}]}).replace("ranges", "range"))
    with pytest.raises(UserError, match="is corrupt"):
        data.examples("train", cache)


def parsed(path):
    return (np.frombuffer(row, click_lines.row_type(1))[0] for row in click_lines.parse(path, tsv.lines(path)))


def test_random_access_equals_the_stream_for_any_number_of_processes(tmp_path, cache):
    """Faults: a row comes from another file; processes share rows or leave one out."""
    for day in range(3):
        write(tmp_path / f"day_{day}", numbered(7 + day, 100 * day))
    data = prepared(cache, source=f"file:{tmp_path}/day_*", heldout_fraction=0.25)
    rows = data.examples("train", cache)
    streamed = [row["integers"][0] for day in range(3) for row in parsed(tmp_path / f"day_{day}")]
    assert numbers(data, "train", cache) + numbers(data, "heldout", cache) == streamed
    assert [int(rows[i]["integers"][0]) for i in (17, 3, 9)] == [streamed[i] for i in (17, 3, 9)]
    with pytest.raises(IndexError):
        rows[len(rows)]
    whole = Batches(rows, seed=3, global_batch_size=8, rows=range(8))
    for processes in (1, 2, 4):
        share = 8 // processes
        for step in (0, 2):
            parts = [
                Batches(rows, seed=3, global_batch_size=8, rows=range(share * p, share * (p + 1)))[step]
                for p in range(processes)
            ]
            for name, x in whole[step].items():
                np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), x)


def test_flights(cache):
    """Faults: held-out months are trained on; columns are swapped; a cross is not of its two fields."""
    data = prepared(cache)
    train, heldout = (data.examples(split, cache) for split in ("train", "heldout"))
    assert (len(train), len(heldout)) == (25_039, 4_961)
    first = train[0]
    assert first["integers"].tolist() == [375, 522, 746, 38, 28, 67, 240, 115, MISSING, 0, 10124, 100, 145]
    hashed = clicks._hashed
    wanted = [hashed(text) for text in ("DL", "575", "N326NB", "EWR", "ATL", "1", "1", "6", "1")]
    assert first["categories"][:9].tolist() == wanted
    assert first["categories"][17] == hashed("EWR\tATL") and first["categories"][25] == hashed("DL\t6")
    months = {int(rows[i]["categories"][5]) for rows in (heldout,) for i in range(0, len(rows), 50)}
    assert months == {hashed("11"), hashed("12")}


def test_hashes_have_known_values():
    """Fault: hashes differ between processes or versions, as Python's own do, so that caches and models become
    invalid."""
    hashed = clicks._hashed
    assert [hashed(text) for text in ("", "DL", "EWR\tATL", "1")] == [0, 2863043909, 1978277074, 2212294583]


def test_synthetic_clicks_are_a_function_of_their_index(cache):
    """Faults: an example depends on earlier reads; held-out examples are trained on."""
    data = SyntheticClicks(examples_in_train=50, examples_in_heldout=20, values=30)
    rows, again = data.examples("train", cache), data.examples("train", cache)
    backwards = [again[i] for i in reversed(range(50))][::-1]
    for i in range(50):
        jax.tree.map(np.testing.assert_array_equal, rows[i], backwards[i])
    assert len({rows[i]["categories"].tobytes() for i in range(50)}) == 50
    heldout = data.examples("heldout", cache)
    assert len(heldout) == 20 and heldout[0]["categories"].tolist() != rows[0]["categories"].tolist()
    other = SyntheticClicks(examples_in_train=50, seed=1, values=30)
    assert other.examples("train", cache)[0]["categories"].tolist() != rows[0]["categories"].tolist()
    assert other.fingerprint(cache) != data.fingerprint(cache)


def test_integers_at_the_ends_of_their_range():
    """Fault: the smallest 32-bit integer, which marks a missing one, is not treated as missing."""
    packed = click_lines.packed((1, [-(2**31), None, *[2**63 - 1] * 11], [[0]] * 26))
    row = np.frombuffer(packed, click_lines.row_type(1))[0]
    assert row["integers"][:3].tolist() == [MISSING + 1, MISSING, 2**31 - 1]
