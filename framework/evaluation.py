"""Held-out metrics: sums over all held-out batches, divided once at the end."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from .task import Batch


def evaluate(eval_step: Callable[[Any, Batch], Any], variables: Any, batches: Iterable[Batch]) -> dict[str, float]:
    """Metrics over all batches by name: sum of totals / sum of weights, added up in float64 in the batches'
    order.

    A metric whose weights are all zero is NaN.
    """
    sums: dict[str, np.ndarray] = {}

    def add(metrics: Mapping[str, Any]) -> None:
        for name, pair in jax.device_get(dict(metrics)).items():
            sums[name] = sums.get(name, np.zeros(2)) + np.asarray(pair, np.float64)

    unread = None
    for batch in batches:
        metrics = eval_step(variables, batch)
        # Reading the previous batch's metrics keeps the devices busy and at most two batches in flight.
        if unread is not None:
            add(unread)
        unread = metrics
    if unread is not None:
        add(unread)
    return {name: float(total / weight) if weight else float("nan") for name, (total, weight) in sums.items()}
