import itertools
import os
import signal
import subprocess
import sys
import threading
import time

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shampax.framework.base.errors import UserError
from shampax.framework.data.pipeline import Batches, HeldoutBatches, Reading


class Numbers:
    """Examples with their own index, from 1, and a list of the indices that were read."""

    def __init__(self, count):
        self.count = count
        self.read = []

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        self.read.append(index)
        return {"number": np.int32(index + 1), "row": np.full(3, index + 1, np.int32)}


@settings(deadline=None, max_examples=25)
@given(
    st.integers(1, 50),
    st.integers(0, 40),
    st.lists(st.integers(0, 11), min_size=1, max_size=12, unique=True),
    st.integers(0, 2**31 - 1),
)
def test_rows_do_not_depend_on_the_number_of_processes(count, number, rows, seed):
    """Fault: another number of processes trains on other batches, or on the same in another order."""
    whole, part = (
        Batches(Numbers(count), seed=seed, global_batch_size=12, rows=wanted)[number] for wanted in (range(12), rows)
    )
    assert part["row"].shape == (len(rows), 3)
    assert part["number"].tolist() == whole["number"][rows].tolist()


def test_augmentation_is_a_function_of_seed_and_position():
    """Fault: random numbers depend on the reading process, on the reading order, or only on the index."""

    def augment(example, rng):
        return example | {"noise": rng.integers(2**31)}

    def batches(seed, rows=range(8)):
        return Batches(Numbers(20), seed=seed, global_batch_size=8, rows=rows, augment=augment)

    whole = batches(0)
    noises = np.concatenate([whole[number]["noise"] for number in range(10)])
    assert len(set(noises.tolist())) == 80, "an epoch's examples have the numbers of another's"
    for rows in ([5], [0, 6]):
        part = batches(0, rows)
        for number in (9, 2, 7):
            assert part[number]["noise"].tolist() == whole[number]["noise"][rows].tolist()
    streamed = next(batches(0).from_step(4))
    assert streamed["noise"].tolist() == whole[4]["noise"].tolist()
    assert batches(1)[4]["noise"].tolist() != whole[4]["noise"].tolist()


def test_only_requested_rows_are_read():
    """Fault: every process reads the whole batch."""
    source = Numbers(64)
    batch = Batches(source, seed=0, global_batch_size=16, rows=[3, 9])[2]
    assert sorted(index + 1 for index in source.read) == sorted(batch["number"].tolist())


@pytest.mark.parametrize("number", [0, 1, 7, 23])
def test_streams_start_at_any_step(number):
    """Faults: a resumed run reads other batches; prefetching reorders them."""
    batches = Batches(Numbers(50), seed=3, global_batch_size=8, rows=[1, 2, 6])
    again = Batches(Numbers(50), seed=3, global_batch_size=8, rows=[1, 2, 6])
    for offset, batch in enumerate(itertools.islice(batches.from_step(number), 12)):
        assert batch["number"].tolist() == again[number + offset]["number"].tolist()


def test_the_order_and_the_random_numbers_are_those_of_a_grain_pipeline():
    """Fault: a run that resumes under another version sees examples twice, or other masks."""

    def augment(example, rng):
        return example | {"noise": rng.integers(2**40)}

    chain = grain.MapDataset.source(Numbers(10)).seed(5).shuffle().repeat(None).random_map(augment)
    batch = Batches(Numbers(10), seed=5, global_batch_size=8, rows=range(8), augment=augment)[3]
    for row in range(8):
        assert {name: array[row].tolist() for name, array in batch.items()} == {
            name: np.asarray(value).tolist() for name, value in chain[24 + row].items()
        }


class Shards(Numbers):
    """Numbers of which one call reads several; `calls` lists the indices of each."""

    def __init__(self, count):
        super().__init__(count)
        self.calls = []

    def __getitems__(self, indices):
        self.calls.append(list(indices))
        return [self[index] for index in indices]


@pytest.mark.parametrize("kind", [Numbers, Shards])
@pytest.mark.parametrize("reading", [Reading(1, 0, 1), Reading(3, 0, 2), Reading(64, 0, 5)], ids=str)
def test_batches_do_not_depend_on_how_they_are_read(kind, reading):
    """Faults: threads reorder rows or batches; a row that occurs twice in a batch, or padding, is lost."""

    def augment(example, rng):
        return example | {"noise": rng.integers(2**40)}

    def batches(source, reading):
        wanted = {"global_batch_size": 40, "rows": range(30)}
        train = Batches(source, seed=2, augment=augment, reading=reading, **wanted).from_step(7)
        heldout = HeldoutBatches(source, reading=reading, **wanted)
        every = [*itertools.islice(train, 4), *heldout]
        train.close()
        return [{name: array.tolist() for name, array in batch.items()} for batch in every]

    assert batches(kind(55), reading) == batches(Numbers(55), Reading(1, 0, 1))


def test_one_call_reads_neighbours():
    """Fault: a thread reads rows of all shards, so that a batch takes as many calls as rows."""
    source = Shards(1000)
    Batches(source, seed=0, global_batch_size=64, rows=range(64), reading=Reading(threads=4))[0]
    assert [len(call) for call in source.calls] == [16] * 4
    assert sorted(source.calls) == [sorted(call) for call in sorted(source.calls)]
    spans = sorted((call[0], call[-1]) for call in source.calls)
    assert all(last < first for (_, last), (first, _) in itertools.pairwise(spans))


def test_held_out_batches_are_read_ahead():
    """Fault: an evaluation waits for the disk at each batch."""

    class Slow(Numbers):
        def __getitem__(self, index):
            if index >= 8:
                later.set()
            return super().__getitem__(index)

    later = threading.Event()
    batches = iter(HeldoutBatches(Slow(24), global_batch_size=8, rows=range(8), reading=Reading(2, 0, 2)))
    assert next(batches)["number"].tolist() == list(range(1, 9))
    assert later.wait(10)
    assert len(list(batches)) == 2


def test_defaults_scale_with_the_cores_and_the_data(monkeypatch):
    """Faults: workers start for small data, for a source that is large when pickled, or in a program that a worker
    would run again; a host with 128 cores reads with as many threads as a laptop; a given value is replaced."""
    auto = {"threads": 0, "workers": -1, "ahead": 8}
    program = sys.modules["__main__"]
    for cores, threads, workers in ((2, 8, 0), (128, 64, 8)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)), raising=False)
        large, small, plain = Numbers(10**6), Numbers(1000), Numbers(10**6)
        large.in_workers = small.in_workers = True
        for spec, started in (("a module", workers), (None, 0)):
            monkeypatch.setattr(program, "__spec__", spec)
            chosen = [Reading.choose(source, **auto) for source in (large, small, plain)]
            assert chosen == [Reading(threads, count, 8) for count in (started, 0, 0)]
        assert Reading.choose(plain, threads=3, workers=2, ahead=1) == Reading(3, 2, 1)


WORKERS = """
import itertools, json, os, signal, sys, threading
import multiprocessing, numpy as np
from shampax.framework.data.pipeline import Batches, Reading

class Numbers:
    def __len__(self):
        return 50
    def __getitem__(self, index):
        return {"number": np.int32(index), "row": np.full(3000, index, np.int32)}

def augment(example, rng):
    return example | {"noise": rng.integers(2**40)}

def of(workers):
    reading = Reading(2, workers, 2)
    return Batches(Numbers(), seed=3, global_batch_size=8, rows=[1, 2, 6], augment=augment, reading=reading)

if __name__ == "__main__":
    batches = of(2).from_step(5)
    got = [next(batches) for _ in range(2)]
    workers = [child.pid for child in multiprocessing.active_children()]
    print(json.dumps(workers), flush=True)
    for pid in workers:
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(pid, number)
    got += [next(batches) for _ in range(5)]
    plain = of(0)
    for number, batch in enumerate(got, start=5):
        assert all((batch[name] == array).all() for name, array in plain[number].items()), number
    print("same", flush=True)
    if sys.stdin.read() == "close":
        batches.close()
        print("closed", flush=True)
    else:
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["close", "kill"])
def test_workers_read_the_same_batches_and_end_with_the_run(tmp_path, ending):
    """Faults: batches depend on the number of workers, or come in another order; Ctrl-C, which reaches all processes of
    a terminal, ends the workers before the run has saved; workers outlive a run that is killed."""
    script = tmp_path / "workers.py"
    script.write_text(WORKERS)
    with subprocess.Popen(
        [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ
    ) as run:
        out, _ = run.communicate(ending, timeout=120)
    pids, *rest = out.splitlines()
    assert rest == (["same", "closed"] if ending == "close" else ["same"])
    assert run.returncode == (0 if ending == "close" else -signal.SIGKILL)
    workers = [int(pid) for pid in pids.strip("[]").split(",")]
    assert len(workers) == 2
    deadline = time.monotonic() + 30
    while alive := [pid for pid in workers if os.path.exists(f"/proc/{pid}")]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.1)


def test_negative_indices_are_refused():
    """Fault: a negative step silently reads the end of an epoch."""
    with pytest.raises(IndexError):
        Batches(Numbers(50), seed=3, global_batch_size=8, rows=range(8))[-1]
    with pytest.raises(IndexError):
        HeldoutBatches(Numbers(50), global_batch_size=8, rows=range(8))[-1]


def test_epochs_have_every_example_once_in_different_orders():
    """Faults: no shuffling; every epoch has the same order; examples are dropped at its end; the seed has no effect."""

    def epochs(seed):
        batches = Batches(Numbers(10), seed=seed, global_batch_size=4, rows=range(4))
        numbers = np.concatenate([batches[number]["number"] for number in range(5)])
        return numbers[:10].tolist(), numbers[10:].tolist()

    first, second = epochs(0)
    assert sorted(first) == sorted(second) == list(range(1, 11))
    assert first != second
    assert first != sorted(first)
    assert epochs(0) == (first, second)
    assert epochs(1)[0] != first


@pytest.mark.parametrize(("count", "batches"), [(1, 1), (8, 1), (9, 2), (21, 3)])
def test_heldout_pass(count, batches):
    """Faults: held-out examples are missing or read twice; padding has weight."""
    expected = np.array([*range(1, count + 1), *[0] * (8 * batches - count)]).reshape(batches, 8)
    for rows in (range(8), [0, 1, 6, 7], [5]):
        held = HeldoutBatches(Numbers(count), global_batch_size=8, rows=rows)
        assert len(held) == batches
        assert [batch["number"].tolist() for batch in held] == expected[:, rows].tolist()
    limited = HeldoutBatches(Numbers(21), global_batch_size=8, rows=range(8), limit=2)
    assert len(list(limited)) == len(limited) == 2


def test_a_limited_pass_reads_a_sample():
    """Faults: an evaluation judges the first rows of a source only; the sample depends on the process or the call."""

    def numbers(rows, **options):
        held = HeldoutBatches(Numbers(100), global_batch_size=8, rows=rows, **options)
        return [batch["number"].tolist() for batch in held]

    whole = numbers(range(8), limit=3, sample=True)
    assert numbers(range(8), limit=3, sample=True) == whole
    assert numbers([0, 6], limit=3, sample=True) == [[batch[0], batch[6]] for batch in whole]
    taken = {number for batch in whole for number in batch}
    assert len(taken) == 24 and max(taken) > 80 and min(taken) < 20
    first = [list(range(1 + 8 * batch, 9 + 8 * batch)) for batch in range(3)]
    assert numbers(range(8), limit=3) == first
    for limit in (-1, 13, 20):
        assert numbers(range(8), limit=limit, sample=True) == numbers(range(8))


def test_empty_splits_are_refused():
    """Fault: an empty split fails inside grain."""
    with pytest.raises(UserError, match="0 examples"):
        Batches(Numbers(0), seed=0, global_batch_size=4, rows=range(4))
    with pytest.raises(UserError, match="0 examples"):
        HeldoutBatches(Numbers(0), global_batch_size=4, rows=range(4))
