import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shampax.framework.step import guard
from shampax.framework.step.guard import GuardOptions

OPTIONS = GuardOptions("ignore", spike_factor=6.0, spike_window=8)


@functools.cache
def judging(options):
    def step(state, seen):
        loss, finite, clipped = seen
        verdict = guard.judge(state, loss, finite, options)
        state = guard.updated(state, verdict, loss, clipped, options)
        return state, (verdict, state)

    return jax.jit(lambda seen: jax.lax.scan(step, guard.initial(), seen)[1])


def watch(losses, options=OPTIONS, *, finite=True, clipped=False):
    """Return the verdict on each loss and the guard after it, as arrays over the steps."""
    losses = jnp.asarray(losses, jnp.float32)
    flags = (jnp.broadcast_to(jnp.asarray(flag), losses.shape) for flag in (finite, clipped))
    return jax.tree.map(np.asarray, judging(options)((losses, *flags)))


def mean(values, window):
    """Return the mean of float64 values, the newest last; each weighs 1 - 1/window of the next."""
    weights = (1 - 1 / window) ** np.arange(len(values))[::-1]
    return float(weights @ values / weights.sum())


def statistics(losses, window):
    """Return mean and deviation of accepted losses in float64, straight from their definition."""
    losses = np.asarray(losses, np.float64)
    before = [mean(losses[:n], window) for n in range(1, len(losses))]
    return mean(losses, window), mean(np.abs(losses[1:] - before), window) if len(losses) > 1 else 0.0


def falling(count, seed=0):
    return 3 + 2 * np.exp(-np.arange(count) / 10) + 0.05 * np.random.default_rng(seed).standard_normal(count)


@pytest.mark.parametrize("policy", ["ignore", "skip", "rollback"])
def test_verdicts_and_statistics_match_the_definition(policy):
    """Faults: mean or deviation are biased, include a refused loss or lack an ignored spike; the bound is wrong or too
    early; a step that is not finite counts as a spike or is accepted; counts are wrong."""
    options = dataclasses.replace(OPTIONS, on_spike=policy)
    losses = falling(60)
    losses[[3, 20, 21, 40]] = 30.0  # the first before the window is full
    losses[[5, 22, 41]] = np.nan, np.inf, -np.inf
    finite = np.arange(60) != 40
    clipped = np.arange(60) % 3 == 0
    verdicts, states = watch(losses, options, finite=finite, clipped=clipped)
    accepted, counts = [], {"skipped": 0, "consecutive": 0, "clipped": 0, "spikes": 0}
    for t, loss in enumerate(losses):
        average, deviation = statistics(accepted, options.spike_window) if accepted else (0, 0)
        bound = average + options.spike_factor * deviation if len(accepted) >= options.spike_window else np.inf
        good = bool(finite[t] and np.isfinite(loss))
        spike = good and loss > bound
        taken = good and not (spike and policy != "ignore")
        assert verdicts.bound[t] == pytest.approx(bound, rel=1e-5)
        assert (verdicts.accepted[t], verdicts.spike[t]) == (taken, spike), t
        if taken:
            accepted.append(loss)
        counts["skipped"] += not taken
        counts["consecutive"] = 0 if taken else counts["consecutive"] + 1
        counts["clipped"] += bool(taken and clipped[t])
        counts["spikes"] += spike
        assert {name: getattr(states, name)[t] for name in counts} == counts
        assert states.accepted[t] == len(accepted)
        if accepted:
            expected = statistics(accepted, options.spike_window)
            assert (states.loss_mean[t], states.loss_deviation[t]) == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert counts["spikes"] == {"ignore": 1, "skip": 2, "rollback": 2}[policy]
    assert all(leaf.dtype in (np.int32, np.float32) for leaf in jax.tree.leaves(states))


@pytest.mark.parametrize("level", [1e-12, -7.0, 3.0, 1e30])
def test_rounding_of_a_constant_loss_is_not_a_spike(level):
    """Faults: a deviation of nearly 0 puts the bound at the mean; a large or negative loss breaks the bound."""
    losses = np.full(300, level)
    losses[50::50] += 1e-5 * abs(level)
    losses[-1] += 0.1 * abs(level)
    verdicts, _ = watch(losses)
    assert verdicts.spike.nonzero()[0].tolist() == [299]


def test_only_ignored_spikes_change_the_level():
    """Faults: an ignored level stays a spike forever; a refused one moves the bound."""
    losses = np.concatenate([falling(60), 9 + 0.05 * np.random.default_rng(1).standard_normal(60)])
    ignored, _ = watch(losses)
    assert 1 <= ignored.spike.sum() < 5 and not ignored.spike[70:].any()
    refused, states = watch(losses, dataclasses.replace(OPTIONS, on_spike="skip"))
    assert refused.spike[60:].all() and len(set(refused.bound[60:])) == 1
    assert states.consecutive[-1] == 60


def test_statistics_do_not_drift_over_a_long_run():
    """Fault: weights are invalid once the powers of the decay are all 0."""
    losses = 3 + 0.1 * np.random.default_rng(0).standard_normal(20_000)
    _, states = watch(losses, dataclasses.replace(OPTIONS, spike_window=100))
    expected = statistics(losses[-3_000:], 100)
    assert (states.loss_mean[-1], states.loss_deviation[-1]) == pytest.approx(expected, rel=1e-4)


class Counting(NamedTuple):
    """The state of an optimizer that refuses updates itself."""

    moment: jax.Array
    skipped: jax.Array


@pytest.mark.parametrize(
    ("norm", "before", "after", "fine"),
    [
        (1.0, {"m": [1.0, np.inf]}, {"m": [2.0, np.inf]}, True),  # some optimizers begin with infinity
        (np.inf, {"m": [1.0]}, {"m": [1.0]}, False),
        (np.nan, {}, {}, False),
        (1.0, {"m": [1.0, 2.0], "count": 3}, {"m": [1.0, np.inf], "count": 4}, False),
        (1.0, {"m": [1.0]}, {"m": [np.nan]}, False),
        (1.0, (Counting([1.0], 3), {"m": [0.0]}), (Counting([2.0], 3), {"m": [1.0]}), True),
        (0.0, (Counting([1.0], 3), {"m": [0.0]}), (Counting([1.0], 4), {"m": [0.0]}), False),
    ],
)
def test_an_update_is_refused_if_the_optimizer_refuses_it_or_its_state_overflows(norm, before, after, fine):
    """Faults: a refusal inside a chain is not seen; a second moment becomes infinite for good; an optimizer whose state
    begins with infinity never takes a step."""
    before, after = (
        jax.tree.map(np.asarray, tree, is_leaf=lambda leaf: isinstance(leaf, list)) for tree in (before, after)
    )
    assert bool(guard.applied(jnp.float32(norm), after, before)) == fine
