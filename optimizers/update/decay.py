"""Weight decay: three ways to shrink parameters, of which the last two join the direction that a step goes in.

"coupled": weight_decay x parameter joins the gradient, and with it momentum and statistics. "decoupled": parameters
shrink by learning rate x weight_decay. "independent": they shrink by weight_decay x schedule, the schedule being the
learning rate over its peak, so that another peak, or another factor of it for some parameters, leaves the decay as it
is (Loshchilov and Hutter 2019, arXiv 1711.05101, algorithm 2; Wortsman et al. 2023, arXiv 2309.14322).
"""

from collections.abc import Sequence
from typing import Any

import jax
import optax

from ..plan import patterns


def peak(learning_rate: float | optax.Schedule) -> float:
    """The highest rate: of a schedule its attribute `peak`.

    Raises:
      ValueError: the schedule does not tell, or there is no share of it: it is 0.
    """
    found = getattr(learning_rate, "peak", None) if callable(learning_rate) else learning_rate
    if found is None:
        raise ValueError(
            "decay 'independent' is relative to the schedule's peak, which this one does not tell; give it an "
            "attribute `peak`, or use decay 'decoupled'"
        )
    if not found > 0:
        raise ValueError(f"decay 'independent' is relative to the schedule's peak, which is {found}; use 'decoupled'")
    return float(found)


def joined(
    directions: Sequence[jax.Array],
    params: Any,
    names: Sequence[str],
    options: Any,
    learning_rate: float | optax.Schedule,
) -> list[jax.Array]:
    """Directions with what of their parameters joins them, before they are multiplied by the learning rate.

    Args:
      directions: of each parameter; gradients where the decay is coupled.
      params: the parameters.
      names: their paths.
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
    """A parameter whose factor is 0 is one that does not move, by independent decay either."""
    if options.decay == "independent":
        return options.weight_decay / (peak(learning_rate) * factor) if factor else 0.0
    return options.weight_decay
