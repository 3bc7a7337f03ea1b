import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shampax.framework.data.pipeline import Batches, HeldoutBatches
from shampax.framework.errors import UserError


class Numbers:
    """Examples that carry their own index, from 1."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return {"number": np.int32(index + 1), "row": np.full(3, index + 1, np.int32)}


def global_batch(kind, count, step, batch_size, processes, **options):
    """The examples of a step in their global order, put together from every process' share."""
    shares = [
        kind(Numbers(count), global_batch_size=batch_size, process_index=i, process_count=processes, **options)[step]
        for i in range(processes)
    ]
    assert all(share["row"].shape == (batch_size // processes, 3) for share in shares)
    return np.stack([share["number"] for share in shares], axis=1).reshape(-1).tolist()


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 50), st.integers(0, 40), st.sampled_from([4, 8, 12]), st.integers(0, 2**31 - 1))
def test_processes_share_one_global_batch(count, step, batch_size, seed):
    """Fault: another number of processes trains on other batches, so that a run cannot move between machines."""
    one, two, four = (global_batch(Batches, count, step, batch_size, n, seed=seed) for n in (1, 2, 4))
    assert one == two == four


@pytest.mark.parametrize("step", [0, 1, 7, 23])
def test_streams_begin_anywhere(step):
    """Fault: a resumed run reads other batches, or the read-ahead reorders them."""
    batches = Batches(Numbers(50), seed=3, global_batch_size=8, process_index=1, process_count=2)
    stream = itertools.islice(batches.from_step(step), 12)
    again = Batches(Numbers(50), seed=3, global_batch_size=8, process_index=1, process_count=2)
    for offset, batch in enumerate(stream):
        assert batch["number"].tolist() == again[step + offset]["number"].tolist()


def test_epochs_hold_every_example_once_in_their_own_order():
    """Fault: no shuffling, the same order in every epoch, examples dropped at its end, or a seed without effect."""

    def epochs(seed):
        batches = Batches(Numbers(10), seed=seed, global_batch_size=4, process_index=0, process_count=1)
        numbers = np.concatenate([batches[step]["number"] for step in range(5)])
        return numbers[:10].tolist(), numbers[10:].tolist()

    first, second = epochs(0)
    assert sorted(first) == sorted(second) == list(range(1, 11))
    assert first != second
    assert first != sorted(first)
    assert epochs(0) == (first, second)
    assert epochs(1)[0] != first


@pytest.mark.parametrize(("count", "batches"), [(1, 1), (8, 1), (9, 2), (21, 3)])
def test_heldout_pass(count, batches):
    """Fault: held-out examples left out or read twice, or padding that carries weight."""
    for processes in (1, 2, 4):
        held = HeldoutBatches(Numbers(count), global_batch_size=8, process_index=0, process_count=processes)
        assert len(held) == len(list(held)) == batches
        numbers = [
            number for step in range(batches) for number in global_batch(HeldoutBatches, count, step, 8, processes)
        ]
        assert numbers == list(range(1, count + 1)) + [0] * (8 * batches - count)
    limited = HeldoutBatches(Numbers(21), global_batch_size=8, process_index=0, process_count=1, limit=2)
    assert len(list(limited)) == len(limited) == 2


def test_impossible_batches_are_refused():
    """Fault: an empty split or an indivisible batch fails inside grain."""
    with pytest.raises(UserError, match="batch_size 10 is not divisible by 4 processes; use 8 or 12"):
        Batches(Numbers(9), seed=0, global_batch_size=10, process_index=0, process_count=4)
    with pytest.raises(UserError, match="0 examples"):
        Batches(Numbers(0), seed=0, global_batch_size=4, process_index=0, process_count=1)
    with pytest.raises(UserError, match="0 examples"):
        HeldoutBatches(Numbers(0), global_batch_size=4, process_index=0, process_count=1)
