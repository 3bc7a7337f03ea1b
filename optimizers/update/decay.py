"""Weight decay, in three forms.

"coupled": weight_decay x parameter is added to the gradient, before momentum and statistics.
"decoupled": parameters shrink by learning rate x weight_decay.
"independent": parameters shrink by weight_decay x learning rate / peak learning rate, so that the decay does not depend
on the peak or on rate_rules (Loshchilov and Hutter 2019, arXiv 1711.05101, algorithm 2; Wortsman et al. 2023, arXiv
2309.14322).
"""

from collections.abc import Sequence
from typing import Any

import jax
import optax

from ..plan import patterns


def peak(learning_rate: float | optax.Schedule) -> float:
    """Return a constant learning rate, or the attribute `peak` of a schedule.

    Raises:
      ValueError: the schedule has no `peak`, or the peak is not positive.
    """
    found = getattr(learning_rate, "peak", None) if callable(learning_rate) else learning_rate
    if found is None:
        raise ValueError(
            "decay='independent': the schedule must have an attribute `peak`. Add it, or use decay='decoupled'."
        )
    if not found > 0:
        raise ValueError(f"decay='independent': the schedule's peak, {found}, must be positive. Use decay='decoupled'.")
    return float(found)


def joined(
    directions: Sequence[jax.Array],
    params: Any,
    names: Sequence[str],
    options: Any,
    learning_rate: float | optax.Schedule,
) -> list[jax.Array]:
    """Return directions plus weight decay, before the learning rate is applied.

    Args:
      directions: direction of each parameter; its gradient for coupled decay.
      params: tree of parameters.
      names: path of each parameter.
      options: weight_decay, decay, decay_rules (which parameters decay) and rate_rules (factors of the learning rate).
      learning_rate: a float or a schedule.
    """
    result = list(directions)
    if not options.weight_decay:
        return result
    for i, (param, name) in enumerate(zip(jax.tree.leaves(params), names, strict=True)):
        if patterns.first_match(options.decay_rules, name):
            factor = patterns.first_match(options.rate_rules, name)
            result[i] += _coefficient(options, learning_rate, factor) * param
    return result


def _coefficient(options: Any, learning_rate: float | optax.Schedule, factor: float) -> float:
    # A parameter whose factor is 0 is frozen, under independent decay too.
    if options.decay == "independent":
        return options.weight_decay / (peak(learning_rate) * factor) if factor else 0.0
    return options.weight_decay
