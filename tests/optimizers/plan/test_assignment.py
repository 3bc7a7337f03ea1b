import time

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from shampax.optimizers.plan.assignment import assign_owners


def spread(owner, owners, *keys):
    """Return (blocks, blocks of each owner) for each group of blocks with equal keys."""
    groups = {}
    for key, mine in zip(zip(*keys, strict=True), owner, strict=True):
        groups.setdefault(key, np.zeros(owners, int))[mine] += 1
    return [(counts.sum(), counts) for counts in groups.values()]


@settings(deadline=None, max_examples=150)
@given(
    counts=st.lists(st.integers(1, 70), min_size=1, max_size=5),
    holders=st.integers(1, 9),
    interval=st.integers(1, 30),
    owners=st.integers(1, 12),
    seed=st.integers(0, 99),
    in_order=st.booleans(),
)
def test_owners_have_equal_shares(counts, holders, interval, owners, seed, in_order):
    """Fault: an owner has more memory, traffic or refreshes in one step than its share."""
    random = np.random.default_rng(seed)
    bucket = np.repeat(np.arange(len(counts)), counts)
    holder = random.integers(0, holders, len(bucket))
    phase = np.arange(len(bucket)) % interval if in_order else random.integers(0, interval, len(bucket))
    if not in_order:
        random.shuffle(bucket)
    owner = assign_owners(bucket, holder, phase, owners)
    assert owner.shape == bucket.shape and (owner >= 0).all() and (owner < owners).all()
    for n, of_owner in (*spread(owner, owners, bucket), *spread(owner, owners, phase)):
        assert of_owner.min() >= n // owners and of_owner.max() <= -(-n // owners)
    for n, of_owner in spread(owner, owners, bucket, holder):
        assert of_owner.max() <= n // owners + 2
    np.testing.assert_array_equal(owner, assign_owners(bucket, holder, phase, owners))


@settings(deadline=None, max_examples=50)
@given(
    shares=st.lists(st.integers(1, 3), min_size=1, max_size=6),
    interval=st.integers(1, 30),
    owners=st.integers(1, 12),
    seed=st.integers(0, 9),
)
def test_divisible_shares_are_exact(shares, interval, owners, seed):
    """Fault: a device sends more to one owner than to another although its blocks divide evenly. The all-to-all is as
    long as its longest message."""
    holder = np.repeat(np.arange(len(shares)), np.multiply(shares, owners))
    np.random.default_rng(seed).shuffle(holder)
    zero = np.zeros_like(holder)
    owner = assign_owners(zero, holder, np.arange(len(holder)) % interval, owners)
    for n, of_owner in spread(owner, owners, holder):
        np.testing.assert_array_equal(of_owner, n // owners)


def test_no_blocks():
    """Fault: a model with only vectors fails."""
    none = np.zeros(0, np.int64)
    assert len(assign_owners(none, none, none, 8)) == len(assign_owners(none, none, none, 1)) == 0


def test_a_large_model_is_assigned_quickly():
    """Fault: assigning the blocks of a large model takes minutes: 30,000 over 256 owners."""
    random = np.random.default_rng(0)
    bucket = np.sort(random.integers(0, 6, 30_000))
    holder = random.integers(0, 32, 30_000)
    start = time.process_time()
    owner = assign_owners(bucket, holder, np.arange(30_000) % 20, 256)
    assert time.process_time() - start < 5
    assert max(of_owner.max() - of_owner.min() for _, of_owner in spread(owner, 256, bucket)) <= 1
