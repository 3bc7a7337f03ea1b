"""Weight decay: three ways to shrink parameters, of which the last two join the direction that a step goes in.

"coupled": weight_decay x parameter joins the gradient, and with it momentum and statistics. "decoupled": parameters
shrink by learning rate x weight_decay. "independent": they shrink by weight_decay x schedule, the schedule being the
learning rate over its peak, so that another peak, or another factor of it for some parameters, leaves the decay as it
is (Loshchilov and Hutter 2019, arXiv 1711.05101, algorithm 2; Wortsman et al. 2023, arXiv 2309.14322).
"""

import optax

DECAYS = ("decoupled", "coupled", "independent")


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


def coefficient(weight_decay: float, decay: str, learning_rate: float | optax.Schedule, factor: float) -> float:
    """What of a parameter joins its direction, before that is multiplied by the learning rate and its factor.

    A parameter whose factor is 0 is one that does not move, by decay either.
    """
    if decay == "independent":
        return weight_decay / (peak(learning_rate) * factor) if factor else 0.0
    return weight_decay
