import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shampax.framework.base import durations
from shampax.framework.base.durations import UNITS, Countdown, Units, to_steps
from shampax.framework.base.errors import UserError

RUN = Units(batch_size=16, examples_per_epoch=lambda: 1_000, tokens_per_example=128, total_steps=333)
counts = st.integers(min_value=1, max_value=40_000)
units_of_a_run = st.builds(
    Units,
    batch_size=counts,
    examples_per_epoch=counts.map(lambda n: lambda: n),
    tokens_per_example=counts,
    total_steps=counts,
)


@pytest.mark.parametrize(
    ("duration", "steps"),
    [
        (600, 600),
        ("600", 600),
        ("600 steps", 600),
        ("1 step", 1),
        ("1_000 steps", 1_000),
        ("1.5e3 steps", 1_500),
        ("2 epochs", 125),
        ("1 epoch", 63),
        ("0.1 epochs", 7),
        ("1e6 examples", 62_500),
        ("17 examples", 2),
        ("5e6tokens", 2_442),
        ("10%", 34),
        ("100 %", 333),
        ("0 steps", 0),
        ("0%", 0),
    ],
)
def test_known_durations(duration, steps):
    assert to_steps(duration, RUN) == steps


@pytest.mark.parametrize(
    ("duration", "fix"),
    [
        ("soon", "Write a number and a unit"),
        ("", "Write a number and a unit"),
        ("-5 steps", "Write a number and a unit"),
        (-5, "Write a number and a unit"),
        ("nan steps", "Write a number and a unit"),
        ("1e999999999 examples", "Write a number and a unit"),
        ("2.5 steps", "Use 3 steps"),
        ("5 epoks", "Write 600 steps, 2 epochs"),
        ("1e30 steps", "Use at most 2147483647 steps"),
        ("2147483648 steps", "Use at most 2147483647 steps"),
        ("1e20 tokens", "is 4.88e+16 steps. Use at most 2147483647 steps"),
        ("1e20%", "is 3.33e+20 steps. Use at most 2147483647 steps"),
        ("5 fortnights", "Write 600 steps, 2 epochs"),
    ],
)
def test_an_error_names_a_valid_duration(duration, fix):
    with pytest.raises(UserError) as caught:
        to_steps(duration, RUN)
    assert fix in str(caught.value)
    assert repr(duration) in str(caught.value)


def test_a_run_cannot_be_a_percentage_of_itself():
    with pytest.raises(UserError, match=r"Use 600 steps, 2 epochs, 1e6 examples or 5e6 tokens.$"):
        to_steps("10%", dataclasses.replace(RUN, total_steps=None))


@settings(deadline=None)
@given(number=st.integers(min_value=0, max_value=10**9), units=units_of_a_run)
def test_a_number_of_examples_needs_the_fewest_steps_that_hold_them(number, units):
    steps = to_steps(f"{number} examples", units)
    assert (steps - 1) * units.batch_size < number <= steps * units.batch_size


@settings(deadline=None)
@given(number=st.integers(min_value=0, max_value=40_000), units=units_of_a_run)
def test_equal_durations_in_three_units_are_equal_steps(number, units):
    steps = to_steps(f"{number} epochs", units)
    examples = number * units.examples_per_epoch()
    assert to_steps(f"{examples} examples", units) == steps
    assert to_steps(f"{examples * units.tokens_per_example} tokens", units) == steps


@settings(deadline=None)
@given(percent=st.decimals(min_value=0, max_value=100, places=3), units=units_of_a_run)
def test_a_part_of_a_run_is_no_longer_than_the_run(percent, units):
    steps = to_steps(f"{percent:f}%", units)
    assert 0 <= steps <= units.total_steps
    assert (steps == 0) == (percent == 0)


@settings(deadline=None)
@given(unit=st.sampled_from(UNITS), units=units_of_a_run, numbers=st.tuples(counts, counts))
def test_longer_durations_take_no_fewer_steps(unit, units, numbers):
    short, long = sorted(numbers)
    assert to_steps(f"{short} {unit}", units) <= to_steps(f"{long} {unit}", units)


@settings(deadline=None)
@given(st.text() | st.from_regex(r"[0-9_.eE+-]* ?[a-z%]*", fullmatch=True))
def test_any_text_is_a_duration_or_a_user_error(text):
    try:
        steps = to_steps(text, RUN)
    except UserError:
        return
    assert steps >= 0


def test_countdown(monkeypatch):
    """Faults: no save by the clock; after a resume at a late step the clock is not looked at for the whole run."""
    now = [100.0]
    monkeypatch.setattr(durations.time, "monotonic", lambda: now[0])
    countdown = Countdown(60)
    countdown.start(1000)
    now[0] += 10
    assert not countdown.over and countdown.next(1010) == 1010 + 25  # half of 50 s, at a step a second
    now[0] += 50
    assert countdown.over and countdown.next(1060) == 1061
    assert not Countdown(0).over
