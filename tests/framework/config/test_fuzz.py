"""Test that any input is accepted or refused in one line, without another exception, a hang or a write elsewhere."""

import dataclasses
import gzip
import json
import lzma
import os
import signal
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from shampax.framework.base import durations
from shampax.framework.base.errors import UserError
from shampax.framework.checkpoint import ownership
from shampax.framework.config import check as config_lib
from shampax.framework.config import overrides
from shampax.framework.data.reading.malformed import Rejects
from shampax.framework.data.text import TextData, markers
from shampax.framework.data.text.tokenizer import encode, load_tokenizer, token_bytes, train_tokenizer
from shampax.framework.reporting import curves, metrics, page
from shampax.framework.reporting.runs import read_run
from shampax.framework.sharding import placement
from shampax.framework.step.schedule import make_schedule
from shampax.launch import train

fuzz = settings(
    derandomize=True, deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
LONGEST = 20  # seconds, after which a function counts as hung
WRITING = {"open", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.link", "os.symlink", "os.truncate"}
SAMPLE = "shampax/configs/lm.py:sample"
LM = config_lib.load(SAMPLE)

written: list[str] | None = None  # paths written while `attempt` runs


def watch(event, arguments):
    if written is None or event not in WRITING:
        return
    path, flags = arguments[0], arguments[2] if event == "open" else os.O_WRONLY
    if isinstance(path, int) or not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        return
    if "__pycache__" not in str(path):  # of modules imported for the first time
        written.append(os.path.abspath(os.fsdecode(path)))


sys.addaudithook(watch)


def hangs(*_):
    raise AssertionError(f"no end within {LONGEST} s")


def attempt(folder, function, *arguments):
    """Return the function's result, or None if it raises UserError. The function may write only inside the folder."""
    global written
    before, written = signal.signal(signal.SIGALRM, hangs), []
    signal.setitimer(signal.ITIMER_REAL, LONGEST)
    try:
        return function(*arguments)
    except UserError:
        return None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        paths, written = written, None
        assert [path for path in paths if not f"{path}{os.sep}".startswith(f"{folder}{os.sep}")] == []


ODD_NUMBERS = st.sampled_from([-1, 2**70, 10**400])
ATOMS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | ODD_NUMBERS
VALUES = st.recursive(
    ATOMS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)
BROKEN = [
    b"",
    b"{}",
    b"null",
    b"[1]",
    b"\xff\xfe",
    b"\0",
    b"[" * 100_000,
    b'{"step": ' * 1_500 + b"1" + b"}" * 1_500,
    b'{"step": ' + b"9" * 5_000 + b"}",
]


@st.composite
def damaged(draw, good):
    """Draw a JSON object that is truncated, changed or lacks a key, or other bytes."""
    content, text = dict(good), json.dumps(good)
    key = draw(st.sampled_from(sorted(content)))
    kind = draw(st.sampled_from(["cut", "changed", "lacking", "other", "broken", "whole"]))
    if kind == "cut":
        return text[: draw(st.integers(0, len(text)))].encode()
    if kind == "changed":
        return json.dumps(content | {key: draw(VALUES)}).encode()
    if kind == "lacking":
        return json.dumps({name: value for name, value in content.items() if name != key}).encode()
    if kind == "other":
        return draw(st.binary(max_size=30))
    return draw(st.sampled_from(BROKEN)) if kind == "broken" else text.encode()


KEYS = [*(key for key, _ in overrides.flat(LM)), "task", "mesh", "optimizer", "batchsize"]
ODD = ["1e999", "-1", "9" * 30, "(1,)", "(('embed', 3),)", "1e99 steps", "1e99%", "True", "''", "-0.0", "1e-320", "()"]
LITERALS = VALUES.map(repr) | st.text(max_size=8) | st.sampled_from(ODD)
FLAGS = st.tuples(st.sampled_from(KEYS), LITERALS).map("=".join).map("--config.".__add__)


def set_up(config):
    """Do everything that a run does with a config before it reads data."""
    placement.mesh_of(config, None)
    units = durations.Units(config.batch_size, lambda: 1000, 128)
    units = dataclasses.replace(units, total_steps=durations.to_steps(config.duration, units))
    every = (config.evaluation.every, config.checkpoint.every, config.log.every, config.schedule.warmup)
    *_, warmup = (durations.to_steps(duration, units) for duration in every)
    rate, end = config.schedule.learning_rate, config.schedule.final_fraction
    make_schedule(
        rate, warmup_steps=warmup, total_steps=units.total_steps, decay=config.schedule.decay, final_fraction=end
    )


@fuzz
@given(st.lists(FLAGS | st.text(max_size=12) | st.text(max_size=12).map("--config.".__add__), max_size=3))
@example(["--config.sharding_rules=(1,)"])
@example(["--config.optimizer.exponent=1e-310"])
@example(["--config.seed", "1"])
def test_command_lines(tmp_path, arguments):
    given = [f"--config={SAMPLE}", f"--workdir={tmp_path / 'run'}", *arguments]
    command, overrides = attempt(tmp_path, train.parser().parse, given) or (None, ())
    config = command and attempt(tmp_path, config_lib.load, command.config, overrides)
    if config is not None:
        attempt(tmp_path, set_up, config)
        assert config_lib.differences(json.loads(config_lib.to_json(config)), config, ()) == []
    assert list(tmp_path.iterdir()) == []


STATEMENTS = [
    "return",
    "return 3",
    "raise SystemExit",
    "exit('done')",
    "raise Exception(b'\\xff')",
    "del config.task",
    "config.unlock()",
    "config.new = 1",
    "config.update({'seed': 1})",
    "config = None",
    "x = yield",
    "import nothing_such",
    "def f(): return f()",
    "f()",
    "config.task = base.component('os:path')",
    "config.task.name = 3",
    "config.mesh = config.mesh.to_dict()",
    "config.mesh.data = config.mesh",
    "config.seed = config.get_ref('batch_size')",
    "config.task = base.component('shampax.models.lm:LMTask', layers=config.get_ref('seed'))",
]
LINES = st.sampled_from(STATEMENTS) | st.tuples(st.sampled_from(KEYS), LITERALS.filter(str.isprintable)).map(
    lambda pair: f"config.{pair[0]} = {pair[1]}"
)


@fuzz
@given(st.lists(LINES, max_size=3), st.none() | st.binary(max_size=40), st.sampled_from(["", ":a", ":b", ":\0"]))
@example(["raise SystemExit"], None, "")
@example([], b"\0", "")
@example([], b"raise SystemExit", "")
def test_config_files(tmp_path, monkeypatch, lines, other, variant):
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    path = tmp_path / "c.py"
    body = "".join(f"    {line}\n" for line in ["config = lm.get_config('sample')", *lines, "return config"])
    content = f"from shampax.configs import base, lm\nVARIANTS = {{'a': 1}}\ndef get_config(variant='a'):\n{body}"
    path.write_bytes(content.encode("utf-8", "surrogatepass") if other is None else other)
    attempt(tmp_path, config_lib.load, f"{path}{variant}")
    assert list(tmp_path.iterdir()) == [path]


PIECES = st.sampled_from(
    [b"\t", b"\n", b"\r\n", b"\f", b"text", b"\0", b"\xff", b"\xc3", "é".encode(), b"\xef\xbb\xbf"]
)
PACKED = {"": bytes, ".xz": lzma.compress, ".gz": gzip.compress}


@fuzz
@given(
    st.lists(PIECES | st.binary(max_size=4), max_size=60).map(b"".join),
    st.sampled_from([".tsv", ".txt"]),
    st.sampled_from(sorted(PACKED)),
    st.none() | st.tuples(st.integers(0, 400), st.binary(max_size=3)),
    st.integers(1, 3),
)
def test_documents_of_files(tmp_path, content, kind, packing, damage, column):
    stored = PACKED[packing](b"".join(b"%i\tb\n\f" % i for i in range(10)) + content)
    if damage is not None:
        place, patch = damage
        stored = stored[:place] + patch + stored[place + 2 * len(patch) :]
    path = tmp_path / f"a{kind}{packing}"
    path.write_bytes(stored)

    def read():
        source = TextData(source=f"file:{path}", tsv_column=column).open_source()
        return [text for split in ("train", "heldout") for text in Rejects(3).sift(source.records(split))]

    documents = attempt(tmp_path, read)
    assert documents is None or all(isinstance(text, str) and text for text in documents)


TOKENIZER = json.loads(train_tokenizer(["hello there, hello"] * 3, 300).to_str())
PARTS = [
    None,
    {},
    {"type": "NFC"},
    {"type": "ByteLevel"},
    {"type": "FixedLength", "length": 0},
    {"type": "Prepend", "prepend": ""},
    {"type": "Precompiled", "precompiled_charsmap": "AAAAAAAA"},
    {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False},
    {"type": "Split", "pattern": {"String": ""}, "behavior": "MergedWithPrevious", "invert": True},
    {"type": "Sequence", "pretokenizers": [{"type": "Whitespace"}]},
    {"type": "Sequence"},
    {"type": "Unigram", "vocab": [], "unk_id": None},
    {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "b"},
    {"type": "BPE", "vocab": {"a": 0, "b": 2**32 - 1, "<|endoftext|>": 3}, "merges": []},
    TOKENIZER["model"] | {"vocab": TOKENIZER["model"]["vocab"] | {"last": 2**32 - 1}},
    TOKENIZER["model"] | {"continuing_subword_prefix": "漢"},
    TOKENIZER["model"] | {"unk_token": "none"},
    TOKENIZER["model"] | {"dropout": 0.5},
    TOKENIZER["model"] | {"merges": [["h", "no such"]]},
    TOKENIZER["added_tokens"] * 2,
    [TOKENIZER["added_tokens"][0] | {"id": 2**32 - 1}],
    [TOKENIZER["added_tokens"][0] | {"content": ""}],
]


@fuzz
@given(
    st.dictionaries(st.sampled_from(sorted(TOKENIZER)), st.sampled_from(PARTS) | VALUES, max_size=2)
    | st.dictionaries(st.sampled_from(sorted(TOKENIZER["model"])), VALUES, max_size=2).map(
        lambda changes: {"model": TOKENIZER["model"] | changes}
    ),
    st.none() | st.binary(max_size=60) | st.integers(0, 4_000) | st.sampled_from(BROKEN),
)
@example({"model": PARTS[14]}, None)
@example({"model": PARTS[17]}, None)
@example({"normalizer": PARTS[5]}, None)
@example({}, b"\xff")
def test_tokenizer_files(tmp_path, changes, other):
    text = json.dumps(TOKENIZER | changes).encode()
    path = tmp_path / "t.json"
    path.write_bytes(other if isinstance(other, bytes) else text[:other])
    tokenizer = attempt(tmp_path, load_tokenizer, path, 400)
    if tokenizer is not None:
        texts = ["hello 漢字\n", "x" * 50]
        encoded, again = (attempt(tmp_path, lambda: list(encode(tokenizer, texts, 0, 0))) or [] for _ in "12")
        assert [ids.tolist() for _, ids in encoded] == [ids.tolist() for _, ids in again]
        assert all(ids.max() < 400 for _, ids in encoded)
        attempt(tmp_path, lambda: markers.find(path, tokenizer, "", ""))
        token_bytes(tokenizer, 400)


def test_an_unterminated_pattern_is_refused(tmp_path):
    """Fault: the library panics, which `except Exception` does not catch."""
    endless = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    parts = {"type": "Sequence", "pretokenizers": [endless, TOKENIZER["pre_tokenizer"]]}
    path = tmp_path / "t.json"
    path.write_text(json.dumps(TOKENIZER | {"pre_tokenizer": parts}))
    tokenizer = load_tokenizer(path, 400)
    with pytest.raises(UserError, match="the tokenizer fails on one of the documents from 'aaa"):
        list(encode(tokenizer, ["a" * 40 + "!"], 0, 0))


POINT = {"step": 3, "seconds": 1.5, "tokens": 300, "train/loss": 2.0, "heldout/loss": 2.1}
RESULT = {
    "steps": 3,
    "seconds": 1.0,
    "tokens": 300,
    "heldout_loss": 2.1,
    "best_heldout_loss": 2.1,
    "skipped_steps": 0,
    "stopped": None,
}
CONFIG = json.loads(config_lib.to_json(LM))
WHOLE = json.dumps(POINT).encode()


def tables(path):
    """Return all numbers of a report."""
    run = read_run(path)
    groups = curves.groups([run, run])
    for key in run.keys():  # noqa: SIM118  (no mapping)
        run.curve(key, "tokens")
    return page.contents([run]), page.race(groups), curves.differences([run.config, CONFIG])


@fuzz
@given(
    st.lists(damaged(POINT) | st.just(WHOLE), max_size=4),
    st.none() | damaged(RESULT),
    st.none() | damaged(CONFIG),
)
@example([WHOLE, b"\xff", b"[1]", b"{}"], None, None)
@example([WHOLE, BROKEN[-1]], BROKEN[-1], BROKEN[-1])
@example([WHOLE, BROKEN[-2]], BROKEN[-2], BROKEN[-2])
@example([WHOLE, BROKEN[-3]], BROKEN[-3], BROKEN[-3])
@example([json.dumps(POINT | {"train/loss": 10**400}).encode()], None, None)
@example([WHOLE], json.dumps(RESULT | {"tokens": 10**400}).encode(), None)
@example([WHOLE], b"\xff", b"\xff")
@example([WHOLE], b"{}", b"[1]")
def test_damaged_workdirs(tmp_path, lines, result, config):
    for name, content in {"metrics.jsonl": b"\n".join(lines), "result.json": result, "config.json": config}.items():
        (tmp_path / name).unlink(missing_ok=True)
        if content is not None:
            (tmp_path / name).write_bytes(content)
    attempt(tmp_path, tables, tmp_path)
    attempt(tmp_path, ownership.finished, tmp_path, LM)
    attempt(tmp_path, lambda: metrics.MetricsWriter(tmp_path, after_step=2, evaluated=False))
    assert {path.name for path in tmp_path.iterdir()} <= {"metrics.jsonl", "result.json", "config.json"}


def test_writes_are_detected(tmp_path):
    """Fault: the tests above do not notice writes."""
    folder = Path(tmp_path)
    attempt(folder, (folder / "inside").write_text, "x")
    with pytest.raises(AssertionError):
        attempt(folder / "other", (folder / "outside").write_text, "x")
    with pytest.raises(AssertionError):
        attempt(folder / "other", (folder / "outside").mkdir)
