import numpy as np
import pytest

from shampax.framework.base.durations import Period
from shampax.framework.base.errors import UserError
from shampax.framework.step.schedule import make_schedule


def rates(decay, *, warmup_steps=4, total_steps=12, final_fraction=0.1, begin_step=0):
    schedule = make_schedule(
        2.0,
        warmup_steps=warmup_steps,
        total_steps=total_steps,
        decay=decay,
        final_fraction=final_fraction,
        begin_step=begin_step,
    )
    return np.array([schedule(step) for step in range(total_steps + 1)])


@pytest.mark.parametrize("decay", ["cosine", "linear", "quadratic", "constant", "rsqrt"])
def test_warm_up_rises_evenly_from_the_first_step(decay):
    np.testing.assert_allclose(rates(decay)[:5], [0.4, 0.8, 1.2, 1.6, 2.0], rtol=1e-6)


def test_decay_ends_with_the_run():
    remaining = np.linspace(1, 0, 9)
    np.testing.assert_allclose(rates("linear")[4:], 0.2 + 1.8 * remaining, rtol=1e-5)
    np.testing.assert_allclose(rates("quadratic")[4:], 0.2 + 1.8 * remaining**2, rtol=1e-5)
    half_wave = 0.5 * (1 + np.cos(np.pi * (1 - remaining)))
    np.testing.assert_allclose(rates("cosine")[4:], 0.2 + 1.8 * half_wave, rtol=1e-5)
    np.testing.assert_allclose(rates("constant")[4:], 2.0)
    np.testing.assert_allclose(rates("rsqrt")[4:], 2 * (4 / np.arange(4, 13)) ** 0.5, rtol=1e-5)


def test_without_warm_up_the_first_step_has_the_peak():
    for decay in ("cosine", "linear", "quadratic", "constant", "rsqrt"):
        assert rates(decay, warmup_steps=0)[0] == 2.0
    np.testing.assert_allclose(rates("rsqrt", warmup_steps=0)[3], 1.0, rtol=1e-6)


def test_a_phase_has_its_own_schedule():
    """Faults: a second phase has no warm-up; its decay counts the steps of the first phase; it has a rate before it
    begins."""
    for decay in ("cosine", "linear", "rsqrt"):
        phase = make_schedule(2.0, warmup_steps=4, total_steps=32, decay=decay, final_fraction=0.1, begin_step=20)
        np.testing.assert_allclose([phase(20 + step) for step in range(13)], rates(decay), rtol=1e-6)
        assert phase(3) == phase(20)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"decay": "cosin"}, "'cosin': must be one of cosine, linear, quadratic, constant, rsqrt"),
        ({"decay": "linear", "warmup_steps": 12}, "12 steps: must be shorter than the run of 12 steps"),
        ({"decay": "linear", "begin_step": 12}, "begin=12 steps: must be shorter than the run of 12 steps"),
        ({"decay": "linear", "begin_step": 9}, "warmup=4 steps: must be shorter than the run of 3 steps"),
        ({"decay": "linear", "final_fraction": 1.5}, "1.5: must be between 0 and 1"),
    ],
)
def test_errors_name_the_allowed_values(changes, words):
    with pytest.raises(UserError, match=words):
        rates(**changes)


def test_period():
    assert [step for step in range(13) if Period(4).due(step)] == [4, 8, 12]
    assert [Period(4).next(step) for step in (0, 3, 4, 11)] == [4, 4, 8, 12]
    assert not any(Period(0).due(step) for step in range(13))
    assert min(Period(0).next(5), 12) == 12
