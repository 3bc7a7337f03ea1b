"""The refresh schedule that measurements ask for."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shampax.optimizers import ShampooOptions, auto, distributed_shampoo
from shampax.optimizers.auto import Costs

OPTIONS = ShampooOptions(refresh="auto", interval=10, host_workers=4, overhead=0.05)
seconds = st.floats(1e-4, 1e3)


def chosen(costs, step, **changes):
    shares = changes.pop("shares_cores", False)
    return auto.choose(costs, step, dataclasses.replace(OPTIONS, **changes), shares_cores=shares)


def test_known_cases():
    """Catches a schedule that misses the budget, is older than it must be, or asks for roots before they are there."""
    # 5 % of a step is 10 ms: interval 20, on average 9.5 steps old. On the host 80 % of a step hold 0.64 s of threads.
    choice = chosen(Costs(device=0.2, host=4.0, longest=0.05), 0.2)
    assert (choice.refresh, choice.interval, choice.delay) == ("host", 10, 2)
    assert "staggered at interval 20" in choice.reason and "host at interval 10 with delay 2" in choice.reason
    # A solve that lasts three steps.
    choice = chosen(Costs(device=100.0, host=20.0, longest=0.6), 0.2)
    assert (choice.refresh, choice.interval) == ("host", math.ceil(20 / (0.8 * 0.2 * 4)))
    assert choice.delay == 1 + math.ceil((20 / 4 / choice.interval + 0.6) / 0.2)
    # Cheap roots stay where they are.
    assert chosen(Costs(device=0.05, host=1.0, longest=0.01), 0.2).refresh == "staggered"
    # Threads on the devices' own cores take their time.
    alone, shared = (chosen(Costs(0.2, 4.0, 0.05), 0.2, shares_cores=shares) for shares in (False, True))
    assert alone.refresh == "host" and shared.refresh == "staggered"


@given(device=seconds, host=seconds, longest=seconds, step=seconds, interval=st.integers(1, 50))
def test_every_choice_can_be_had(device, host, longest, step, interval):
    """Catches a delay that the options refuse, and an interval that breaks the budget."""
    costs = Costs(device, host, min(longest, host))
    choice = chosen(costs, step, interval=interval)
    options = OPTIONS.decided(dataclasses.asdict(choice))
    assert options.interval >= interval and not options.undecided
    if choice.refresh == "staggered":
        assert device / choice.interval <= 0.05 * step * (1 + 1e-9)
    else:
        assert host / choice.interval / 4 <= 0.8 * step * (1 + 1e-9) and choice.delay < choice.interval


def test_measures_every_kind_of_solve_for_all_blocks():
    """Catches a kind of block that is left out, and seconds that are of one block where there are many."""
    params = {f"w{i}": jax.ShapeDtypeStruct((48, 64), np.float32) for i in range(40)}
    small = {"w0": params["w0"]}
    tx = distributed_shampoo(1.0, dataclasses.replace(OPTIONS, block_size=64).without_roots())
    all_of, one_of = (auto.measure(tx.plan(tree).buckets, OPTIONS) for tree in (params, small))
    assert min(all_of.host, one_of.host, all_of.device, one_of.device, one_of.longest) > 0
    assert 8 < all_of.host / one_of.host < 200
    assert one_of.longest <= one_of.host


def test_is_the_trainers_to_choose():
    """Catches an optimizer that would never refresh a root."""
    with pytest.raises(ValueError, match="refresh 'auto' is for the trainer"):
        distributed_shampoo(1.0, OPTIONS)
    with pytest.raises(ValueError, match=r"overhead is 0\.0 and must be above 0"):
        ShampooOptions(refresh="auto", overhead=0.0)
    with pytest.raises(ValueError, match="early_intervals are"):
        ShampooOptions(refresh="auto", early_intervals=((4, 1),))
