import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shampax.optimizers import ShampooOptions
from shampax.optimizers.refresh import due_phases

STEPS = 160


@st.composite
def schedules(draw, *, rising=False):
    interval = draw(st.sampled_from([1, 2, 6, 12, 20, 24]))
    divisors = [d for d in range(1, interval + 1) if interval % d == 0]
    ends = sorted(draw(st.sets(st.integers(1, STEPS // 2), max_size=3)))
    early = [draw(st.sampled_from(divisors)) for _ in ends]
    early = sorted(early) if rising else early
    return ShampooOptions(interval=interval, early_intervals=tuple(zip(ends, early, strict=True)))


def intervals(options):
    """Return the interval of each step."""
    early = options.early
    return [next((k for last, k in early if step <= last), options.interval) for step in range(1, STEPS + 1)]


def due(options):
    """Return [steps, phases], the phases that are due."""
    first, count = jax.vmap(lambda step: due_phases(step, options))(jnp.arange(1, STEPS + 1, dtype=jnp.int32))
    first, count = np.broadcast_to(first, STEPS), np.broadcast_to(count, STEPS)
    assert (first >= 0).all() and (first < options.interval).all()
    phase = np.arange(options.interval)
    return (phase - first[:, None]) % options.interval < count[:, None]


@pytest.mark.parametrize("interval", [1, 3, 20])
def test_without_early_intervals_one_phase_is_due(interval):
    """Fault: the schedule does not start with phase 0 on step 1, or skips a phase."""
    first, count = jax.vmap(lambda s: due_phases(s, ShampooOptions(interval=interval, early_intervals=())))(
        jnp.arange(1, 50)
    )
    np.testing.assert_array_equal(first, np.arange(49) % interval)
    np.testing.assert_array_equal(count, 1)


@settings(deadline=None, max_examples=30)
@given(options=schedules(), start_step=st.integers(0, STEPS))
def test_due_phases_equal_a_loop(options, start_step):
    """Faults: phases restart when the interval changes; an interval is a step too long."""
    options = ShampooOptions(interval=options.interval, early_intervals=options.early_intervals, start_step=start_step)
    expected, phase = np.zeros((STEPS, options.interval), bool), 0
    for step, interval in enumerate(intervals(options), 1):
        for _ in range(options.interval // interval):
            expected[step - 1, phase] = step >= start_step - options.interval
            phase = (phase + 1) % options.interval
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
    for phase in range(options.interval):
        steps = np.flatnonzero(which[:, phase])
        assert steps[0] < max(of_step[: steps[0] + 1])
        assert all(b - a <= of_step[b] for a, b in itertools.pairwise(steps))


@pytest.mark.parametrize(("interval", "start_step"), [(5, 0), (5, 3), (5, 5), (5, 6), (5, 40), (1, 7)])
def test_all_roots_exist_at_start_step(interval, start_step):
    """Faults: preconditioning starts with blocks without roots; refreshes before are unused."""
    options = ShampooOptions(interval=interval, early_intervals=(), start_step=start_step)
    which = due(options)
    begin = max(start_step - interval, 1)
    assert not which[: begin - 1].any()
    np.testing.assert_array_equal(which[begin - 1 : begin - 1 + interval].sum(axis=0), 1)
