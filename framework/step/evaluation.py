"""Held-out metrics: sums over all held-out batches, divided once, and predictions for all held-out examples."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np

from ..task import Batch

Step = Callable[[Any, Batch], Any]


def of_set(name: str, metric: str) -> str:
    """Return the name of a metric of a held-out set; the set of the training data has the name ""."""
    return f"{name}/{metric}" if name else metric


def of_sets(metrics: Iterable[str], further: Iterable[str]) -> tuple[str, ...]:
    """Return the names of metrics of the training data's held-out set and of the further ones."""
    return tuple(of_set(name, metric) for name, metric in itertools.product(("", *further), metrics))


def evaluate(eval_step: Step, variables: Any, batches: Iterable[Batch]) -> dict[str, float]:
    """Return each metric over all batches: sum of totals / sum of weights, in float64 and in the order of the batches.

    A metric whose weights are all zero is NaN.
    """
    sums: dict[str, np.ndarray] = {}
    for metrics in _one_behind(eval_step, variables, batches):
        for name, pair in jax.device_get(dict(metrics)).items():
            sums[name] = sums.get(name, np.zeros(2)) + np.asarray(pair, np.float64)
    return {name: float(total / weight) if weight else float("nan") for name, (total, weight) in sums.items()}


def predict(predict_step: Step, variables: Any, batches: Iterable[Batch], examples: int) -> dict[str, np.ndarray]:
    """Return the predictions for the first `examples` examples, arrays [examples, ...] by name.

    Without batches, because a signal has come, there are no arrays.
    """
    parts = [jax.device_get(part) for part in _one_behind(predict_step, variables, batches)]
    return {name: np.concatenate([part[name] for part in parts])[:examples] for name in (parts[0] if parts else ())}


def _one_behind(step: Step, variables: Any, batches: Iterable[Batch]) -> Iterator[Any]:
    """Yield results in order, each after the next batch has been dispatched, so that the devices stay busy."""
    results = (step(variables, batch) for batch in batches)
    for result, _ in itertools.pairwise(itertools.chain(results, [None])):
        yield result
