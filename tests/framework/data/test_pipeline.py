import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shampax.framework.base.errors import UserError
from shampax.framework.data.pipeline import Batches, HeldoutBatches


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
    assert [index + 1 for index in source.read] == batch["number"].tolist()


@pytest.mark.parametrize("number", [0, 1, 7, 23])
def test_streams_start_at_any_step(number):
    """Faults: a resumed run reads other batches; prefetching reorders them."""
    batches = Batches(Numbers(50), seed=3, global_batch_size=8, rows=[1, 2, 6])
    again = Batches(Numbers(50), seed=3, global_batch_size=8, rows=[1, 2, 6])
    for offset, batch in enumerate(itertools.islice(batches.from_step(number), 12)):
        assert batch["number"].tolist() == again[number + offset]["number"].tolist()


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
