import itertools
import json

import cloudpickle
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh

from shampax.framework.base.errors import UserError
from shampax.framework.config import check, components, sets
from shampax.framework.data.feed import Feed
from shampax.framework.data.mixing import Mixed, counts, pick, shares_of
from shampax.framework.data.pipeline import Batches
from shampax.framework.train import train

WEIGHTS = st.lists(st.sampled_from([0.0, 1e-3, 0.1, 0.3, 1.0, 7.0]), min_size=1, max_size=5).filter(any)


class Numbers:
    """Examples that hold their source and index."""

    in_workers = True

    def __init__(self, source, count):
        self.source, self.count = source, count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        assert 0 <= index < self.count
        return {"number": np.array([self.source, index])}


def mixed(stages, sizes=(170, 200, 110)):
    return Mixed({"abc"[number]: Numbers(number, size) for number, size in enumerate(sizes)}, stages)


def trained(mixture, count, rows=range(12), start=0, augment=None):
    """Return the numbers of examples of some batches, [count, rows, ...]."""
    batches = Batches(mixture, seed=3, global_batch_size=12, rows=rows, augment=augment)
    return np.stack([batches[start + number]["number"] for number in range(count)])


@settings(deadline=None)
@given(WEIGHTS, st.integers(0, 10**15))
def test_sources_have_their_shares(weights, start):
    """Faults: a source gives more or less than its share; an example is left out or comes twice; a source without
    weight takes part."""
    shares, total = shares_of(weights), sum(weights)
    before = list(counts(start, shares))
    assert sum(before) == start
    for number in range(start, start + 50):
        source, place = pick(number, shares)
        assert weights[source] > 0 and place == before[source]
        before[source] += 1
    assert before == list(counts(start + 50, shares))
    for count, weight in zip(before, weights, strict=True):
        assert abs(count - (start + 50) * weight / total) <= len(weights) + start * 1e-8


STAGES = [(0, (1, 3, 0)), (100, (1, 1, 2)), (103, (0, 0, 1)), (150, (5, 1, 1))]


def test_a_stage_continues_the_order_of_each_source():
    """Faults: a new stage begins the sources again, or begins too early or too late; an epoch of a source lacks
    examples; all sources have one order."""
    examples = trained(mixed(STAGES), 40).reshape(-1, 2)
    ends = [*(begin for begin, _ in STAGES), len(examples)]
    for (_, weights), begin, end in zip(STAGES, ends, ends[1:], strict=False):
        given = np.bincount(examples[begin:end, 0], minlength=3)
        assert (abs(given - (end - begin) * np.array(weights) / sum(weights)) <= 3).all()
    for source in range(3):
        order = examples[examples[:, 0] == source, 1]
        assert len({*order[:110]}) == min(len(order), 110)
    same = trained(mixed([(0, (1, 1, 1)), (96, (1, 2, 1))], (90, 90, 90)), 24).reshape(-1, 2)
    epochs = [tuple(same[same[:, 0] == source, 1][:90].tolist()) for source in range(2)]
    assert sorted(epochs[1]) == list(range(90)) and epochs[0] != epochs[1][: len(epochs[0])]


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("start", [0, 7, 8, 9, 12])
def test_batches_are_a_function_of_the_step(processes, start):
    """Faults: another number of processes, or a resumed run, trains on other batches."""
    whole = trained(mixed(STAGES), 20)
    for process in range(processes):
        own = range(process * 12 // processes, (process + 1) * 12 // processes)
        np.testing.assert_array_equal(trained(mixed(STAGES), 8, own, start), whole[start : start + 8, own])


def test_random_numbers_are_a_function_of_the_position():
    """Faults: a mixture cannot be sent to a worker; random numbers of augmentation depend on the reading process."""

    def augment(example, rng):
        return {"number": np.append(example["number"], rng.integers(2**31))}

    whole = trained(mixed(STAGES), 10, augment=augment)
    again = cloudpickle.loads(cloudpickle.dumps(mixed(STAGES)))
    np.testing.assert_array_equal(trained(again, 3, [4, 5], 6, augment), whole[6:9, 4:6])
    assert len({*whole[..., 2].ravel()}) == 120


@pytest.fixture
def sources(tmp_path):
    """Write two corpora and return the overrides that mix them."""
    for name, word in (("web", "apple"), ("books", "pear")):
        texts = [f"{word} number {i}: {word} " * (i % 7 + 1) for i in range(120)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    mixture = ("data.weight=0.75", f"books.source=file:{tmp_path}/books.jsonl", "books.weight=0.25")
    return [f"data.source=file:{tmp_path}/web.jsonl", f"mixture={(*mixture, 'books.weight@50%=0.75')}"]


def configured(changes, *more):
    small = ("embed_dim=16", "heads=2", "kv_heads=1", "head_dim=8", "layers=1", "mlp_dim=16", "vocab_size=300")
    own = [f"task.{each}" for each in small] + ["data.sequence_length=16", "batch_size=8", "simulated_devices=0"]
    own += ["duration=8 steps", "log.every=1 steps", "checkpoint.every=4 steps", "evaluation.every=4 steps"]
    return check.load("shampax/configs/lm.py:sample_adamw", [*own, *changes, *more])


def opened(changes, cache):
    """Return the feed of a run of 8 steps, and how many rows of each of its batches have apples."""
    config = configured(changes)
    _, data, _ = components.build_all(config)
    mixture, mesh = sets.mixture(config), Mesh(np.array(jax.devices()[:1]).reshape(1), ("data",))
    feed = Feed(data, mixture, sets.heldout_sets(config), cache, mesh, config)
    tokens = [np.asarray(batch["tokens"]) for batch in itertools.islice(feed.train(0), 8)]
    apple = data.load_tokenizer(cache).encode(" apple").ids
    return feed, np.array([sum(set(apple) <= set(row) for row in each) for each in tokens])


def test_sources_of_a_run(sources, tmp_path):
    """Faults: the second source is not trained on, or has no held-out set, or a tokenizer of its own; a stage is
    ignored; a change of a source goes unnoticed."""
    feed, apples = opened(sources, tmp_path / "cache")
    assert list(feed.heldout) == ["", "books"]
    assert set(apples[:4]) == {6} and set(apples[4:]) == {4}
    assert len(list((tmp_path / "cache").glob("tokenizer-*"))) == 1
    with (tmp_path / "books.jsonl").open("a") as file:
        file.write('{"text": "a further pear"}\n')
    assert opened(sources, tmp_path / "cache")[0].fingerprint != feed.fingerprint


def test_a_run_waits_for_the_rows_of_all_sources(sources, tmp_path, monkeypatch):
    """Faults: a process reads, and no signal ends it, while one source lacks rows; a failure ends the run early."""
    first, second = Numbers(0, 170), Numbers(1, 10**6)
    second.made = lambda position: asked.append(position) or 100
    asked = []
    grows = Mixed({"a": first, "b": second}, [(0, (1, 3)), (100, (1, 1))])
    order = trained(grows, 30).reshape(-1, 2)[:, 0]
    assert grows.made(111) == np.flatnonzero(order == 1)[100]
    assert asked == [np.count_nonzero(order[:112]) - 1]
    feed = opened(sources, tmp_path / "cache")[0]
    assert feed.made(10**6)[0] > 10**6
    monkeypatch.setattr(feed, "_source", grows)
    monkeypatch.setattr(feed, "_failures", [lambda: "a full disk", str])
    batches = grows.made(0) // 8
    assert [feed.made(number) for number in (batches - 1, batches)] == [(batches, ""), (batches, "a full disk")]


def losses(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


@pytest.mark.slow
def test_a_run_on_a_mixture(sources, tmp_path):
    """Faults: sources have no held-out metrics; a resumed run trains on other batches; a change of the weights goes
    unnoticed."""
    result = train(configured(sources), tmp_path / "whole")
    assert {"heldout_loss", "books/loss", "books/bits_per_byte"} <= result.keys()
    train(configured(sources, f"resume_from={tmp_path}/whole/checkpoints/4"), tmp_path / "again")
    whole = losses(tmp_path / "whole")
    assert losses(tmp_path / "again") == {step: whole[step] for step in (5, 6, 7, 8)}
    other = sources[1].replace("books.weight=0.25", "books.weight=0.2")
    with pytest.raises(UserError, match=r"belongs to another config \(mixture"):
        train(configured([sources[0], other]), tmp_path / "whole")


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        ("books.weight=0.5,books", "'books' is not of the form name.knob=value"),
        ("books.weight=much", "books.weight=much: must be a number"),
        ("books.weight=-1", "must be a number from 0"),
        ("books.weight@soon=1", "mixture: books.weight@soon: 'soon': not a duration"),
        ("books.text_ky=a", "mixture: books: unknown key 'config.data.text_ky'"),
        ("data.weight=1", "has no source beside config.data"),
        ("data.text_key=a,books.weight=1", "set config.data.text_key in place of it"),
        ("books.weight=0,data.weight=0", "all weights are 0 from step 0 on"),
        ("books.weight@2steps=1,books.weight@4examples=3", "books.weight@4examples begins where"),
    ],
)
def test_an_invalid_mixture_is_one_line(mixture, message):
    """Fault: a traceback, or a mixture that is not the one that was asked for."""

    def stages():
        found = sets.mixture(configured([f"mixture={mixture}"]))
        return found.stages(lambda duration: {"4examples": 2, "2steps": 2}.get(duration, 0))

    with pytest.raises(UserError, match=message):
        stages()


def test_epochs_of_a_mixture_are_refused(sources, tmp_path):
    """Fault: an epoch of the first source, or of all, is taken for one of the mixture."""
    with pytest.raises(UserError, match="a mixture has no epochs"):
        train(configured(sources, "duration=2 epochs"), tmp_path / "run")
    same = sources[1].replace("books.source", "more.weight=1', 'books.source")
    with pytest.raises(UserError, match=r"books is also a source of config\.mixture"):
        configured([sources[0], same, "evaluation.sets=books.max_records=3"])
