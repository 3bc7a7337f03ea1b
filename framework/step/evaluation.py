"""Held-out metrics: sums over all held-out batches, divided once at the end; and those that need all examples."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from ..task import Batch

Step = Callable[[Any, Batch], Any]


def evaluate(eval_step: Step, variables: Any, batches: Iterable[Batch]) -> dict[str, float]:
    """Metrics over all batches by name: sum of totals / sum of weights, added up in float64 in the batches'
    order.

    A metric whose weights are all zero is NaN.
    """
    sums: dict[str, np.ndarray] = {}

    def add(metrics: Mapping[str, Any]) -> None:
        for name, pair in jax.device_get(dict(metrics)).items():
            sums[name] = sums.get(name, np.zeros(2)) + np.asarray(pair, np.float64)

    for metrics in _one_behind(eval_step, variables, batches):
        add(metrics)
    return {name: float(total / weight) if weight else float("nan") for name, (total, weight) in sums.items()}


def predict(predict_step: Step, variables: Any, batches: Iterable[Batch], examples: int) -> dict[str, np.ndarray]:
    """The predictions for the first `examples` examples of all batches, one array [examples, ...] by name."""
    parts = [jax.device_get(part) for part in _one_behind(predict_step, variables, batches)]
    return {name: np.concatenate([part[name] for part in parts])[:examples] for name in parts[0]}


def _one_behind(step: Step, variables: Any, batches: Iterable[Batch]) -> Iterator[Any]:
    """Results in order; reading one after the next is dispatched keeps the devices busy, with two batches in flight."""
    unread = None
    for batch in batches:
        result = step(variables, batch)
        if unread is not None:
            yield unread
        unread = result
    if unread is not None:
        yield unread
