import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import shampoo_reference
from hypothesis import given, settings
from hypothesis import strategies as st

from shampax.optimizers import ShampooOptions
from shampax.optimizers.refresh import due_phases, phases_due

STEPS = 160


@st.composite
def schedules(draw, *, rising=False):
    interval = draw(st.sampled_from([1, 2, 6, 12, 20, 24]))
    divisors = [d for d in range(1, interval + 1) if interval % d == 0]
    ends = sorted(draw(st.sets(st.integers(1, STEPS // 2), max_size=3)))
    early = [draw(st.sampled_from(divisors)) for _ in ends]
    early = sorted(early) if rising else early
    phases = draw(st.integers(1, interval))
    return ShampooOptions(interval=interval, phases=phases, early_intervals=tuple(zip(ends, early, strict=True)))


def intervals(options):
    """Return the interval of each step."""
    early = options.early
    return [next((k for last, k in early if step <= last), options.interval) for step in range(1, STEPS + 1)]


def due(options):
    """Return [steps, phases], the phases that are due."""
    phases = options.phases
    steps = jnp.arange(1, STEPS + 1, dtype=jnp.int32)
    first, count = jax.vmap(lambda step: due_phases(step, options, phases))(steps)
    first, count = np.broadcast_to(first, STEPS), np.broadcast_to(count, STEPS)
    assert (first >= 0).all() and (first < phases).all()
    if phases == options.interval:
        assert [phases_due(step, options) for step in range(1, STEPS + 1)] == count.tolist()
    return (np.arange(phases) - first[:, None]) % phases < count[:, None]


@pytest.mark.parametrize(
    ("interval", "phases", "steps"),
    [(1, 1, range(1, 161)), (20, 20, range(1, 161)), (20, 1, range(1, 161, 20)), (20, 4, range(1, 161, 5))],
)
def test_without_early_intervals_phases_are_spread_evenly(interval, phases, steps):
    """Fault: the schedule does not start with phase 0 on step 1, skips a phase, or has them all in the same steps."""
    which = due(ShampooOptions(interval=interval, phases=phases, early_intervals=()))
    np.testing.assert_array_equal(1 + np.flatnonzero(which.any(axis=1)), list(steps))
    np.testing.assert_array_equal(np.argmax(which, axis=1)[np.array(steps) - 1], np.arange(len(steps)) % phases)
    assert which.sum() == len(steps)


@settings(deadline=None, max_examples=30)
@given(options=schedules(), start_step=st.integers(0, STEPS))
def test_due_phases_equal_a_loop(options, start_step):
    """Faults: phases restart when the interval changes; an interval is a step too long."""
    options = dataclasses.replace(options, start_step=start_step)
    expected = [
        [phase in shampoo_reference.due_phases(options, step, options.phases) for phase in range(options.phases)]
        for step in range(1, STEPS + 1)
    ]
    np.testing.assert_array_equal(due(options), expected)


@settings(deadline=None, max_examples=30)
@given(options=schedules())
def test_every_phase_is_due_once_in_an_interval(options):
    """Fault: a block is refreshed twice in an interval, or never."""
    which, of_step = due(options), intervals(options)
    for start in range(STEPS):
        k = of_step[start]
        if of_step[start : start + k] == [k] * k:
            np.testing.assert_array_equal(which[start : start + k].sum(axis=0), 1)


@settings(deadline=None, max_examples=30)
@given(options=schedules(rising=True))
def test_no_block_waits_longer_than_the_interval(options):
    """Fault: roots get older than the interval when a long interval follows a short one."""
    which, of_step = due(options), intervals(options)
    for phase in range(options.phases):
        steps = np.flatnonzero(which[:, phase])
        assert steps[0] < max(of_step[: steps[0] + 1])
        assert all(b - a <= of_step[b] for a, b in itertools.pairwise(steps))


@pytest.mark.parametrize(("interval", "start_step"), [(5, 0), (5, 3), (5, 5), (5, 6), (5, 40), (1, 7)])
def test_all_roots_exist_at_start_step(interval, start_step):
    """Faults: preconditioning starts with blocks without roots; refreshes before are unused."""
    options = ShampooOptions(interval=interval, phases=interval, early_intervals=(), start_step=start_step)
    which = due(options)
    begin = max(start_step - interval, 1)
    assert not which[: begin - 1].any()
    np.testing.assert_array_equal(which[begin - 1 : begin - 1 + interval].sum(axis=0), 1)
