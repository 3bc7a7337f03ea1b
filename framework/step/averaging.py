"""Averages of the parameters, which are evaluated, kept as the model and exported in place of the newest ones.

The optimizer moves an iterate z by the gradient at y, and the model is the average x of the iterates:

    y = (1 - beta) z + beta x
    z <- z + update for the gradient at y
    W <- decay W + w
    x <- (1 - w / W) x + (w / W) z

"ema" has beta = 0 and w = 1: z goes as it does without an average, and x is the exponential moving average of it, with
the correction of `optax.ema(decay, debias=True)`, W being (1 - decay^t) / (1 - decay). "schedule_free" has decay = 1
and w = (largest learning rate so far)^rate_power (Defazio et al. 2024, arXiv 2405.15682, algorithm 1). There beta = 1
is primal averaging and beta = 0 Polyak-Ruppert averaging. `optax.contrib.schedule_free` is the same rule; but it keeps
y in place of x, which no reader of a checkpoint could use as it is, and hides the optimizer's state within its own.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from .. import optimizer
from ..base.errors import UserError

KINDS = ("none", "ema", "schedule_free")


@dataclasses.dataclass(frozen=True)
class AveragingOptions:
    """Which average is made.

    Attributes:
      kind: one of KINDS.
      decay: of "ema", of the weight of an iterate with each step after it.
      beta: of "schedule_free", how far from the iterate towards the average the gradient is taken.
      rate_power: of "schedule_free", the power of the largest learning rate that an iterate weighs.

    Raises:
      ValueError: a value is out of range.
    """

    kind: str
    decay: float
    beta: float
    rate_power: float

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"averaging.kind is {self.kind!r}; choose one of {', '.join(KINDS)}")
        if not 0 <= self.decay < 1:
            raise ValueError(f"averaging.decay is {self.decay}; it must be at least 0 and below 1, such as 0.999")
        if not 0 <= self.beta <= 1:
            raise ValueError(f"averaging.beta is {self.beta}; it must lie between 0 and 1, such as 0.9")
        if not 0 <= self.rate_power < math.inf:
            raise ValueError(f"averaging.rate_power is {self.rate_power}; it must be at least 0 and finite, such as 2")

    def refuse(self, decay: str, momenta: dict[str, float]) -> None:
        """Raise ValueError where the average takes the place of something that is there as well.

        Args:
          decay: the schedule's.
          momenta: field of the optimizer's options -> decay of the momentum that it keeps.
        """
        if self.kind != "schedule_free":
            return
        if decay != "constant":
            raise ValueError(
                f"averaging.kind 'schedule_free' takes the place of the schedule's decay, but schedule.decay is "
                f"{decay!r}; set it to constant"
            )
        for field, value in momenta.items():
            if value:
                raise ValueError(
                    f"averaging.kind 'schedule_free' takes the place of momentum, but optimizer.{field} is {value}; "
                    f"set it to 0 (averaging.beta, {self.beta}, acts instead)"
                )


OFF = AveragingOptions("none", decay=0.0, beta=0.0, rate_power=0.0)


def configured(config: Any, optimizer_options: Any) -> AveragingOptions:
    """Return the averaging options of a config.

    Raises:
      UserError: a value is out of range, or the average conflicts with the schedule's decay or with momentum.
    """
    try:
        options = AveragingOptions(**config.averaging)
        options.refuse(config.schedule.decay, optimizer.momentum_decays(optimizer_options))
    except ValueError as error:
        raise UserError(f"config.{error}") from error
    return options


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Averaging:
    """What an average needs besides itself.

    Attributes:
      iterate: z, shaped like the variables; the model state in it is that of the newest accepted step.
      weights: float32 scalars by name. They begin with the kind, so that another kind does not take them for its own.
    """

    iterate: dict[str, Any]
    weights: dict[str, Any]


def abstract(variables: dict[str, Any], options: AveragingOptions, scalar: jax.sharding.Sharding) -> Any:
    """Shapes and places: the iterate lies as the variables do, weights as `scalar` says. None without an average."""
    if options.kind == "none":
        return None
    names = ("ema",) if options.kind == "ema" else ("schedule_free", "schedule_free_rate")
    return Averaging(variables, {name: jax.ShapeDtypeStruct((), jnp.float32, sharding=scalar) for name in names})


def initial(variables: dict[str, Any], like: Any) -> Any:
    """Before the first step the iterate is where the average is; `like` is what `abstract` has returned."""
    if not like:
        return None
    # The step donates both, so that they must not be one array.
    return Averaging(jax.tree.map(jnp.copy, variables), {name: jnp.zeros((), jnp.float32) for name in like.weights})


def point(variables: dict[str, Any], averaging: Any, options: AveragingOptions) -> dict[str, Any]:
    """The variables y with which the loss and its gradient are computed, given the average's."""
    if options.kind == "none":
        return variables
    if options.kind == "ema":
        return averaging.iterate
    return averaging.iterate | {
        "params": _towards(averaging.iterate["params"], variables["params"], jnp.float32(options.beta))
    }


def moved(variables: dict[str, Any], averaging: Any, updates: Any) -> Any:
    """The parameters of the iterate after the optimizer's updates; without an average they are the parameters."""
    return optax.apply_updates(averaging.iterate["params"] if averaging else variables["params"], updates)


def advance(
    variables: dict[str, Any], averaging: Any, iterate: dict[str, Any], rate: jax.Array, options: AveragingOptions
) -> tuple[dict[str, Any], Any]:
    """The average's variables, and what it needs besides, after a step.

    Floating-point model state, such as the moments of batch normalisation, is averaged as the parameters are; counts
    are the newest ones.

    Args:
      variables: the average before the step.
      averaging: as the step before has left it.
      iterate: variables, the parameters being those of `moved`.
      rate: the step's learning rate, float32 scalar.
      options: static.
    """
    if options.kind == "none":
        return iterate, None
    if options.kind == "ema":
        total = options.decay * averaging.weights["ema"] + 1
        share, weights = 1 / total, {"ema": total}
    else:
        largest = jnp.maximum(averaging.weights["schedule_free_rate"], rate)
        weight = largest**options.rate_power
        total = averaging.weights["schedule_free"] + weight
        # While the rate is 0 nothing has moved, and there is nothing to average.
        share = jnp.where(total > 0, weight / jnp.where(total > 0, total, 1), 0)
        weights = {"schedule_free": total, "schedule_free_rate": largest}
    return _towards(variables, iterate, share), Averaging(iterate, weights)


def _towards(start: Any, end: Any, share: jax.Array) -> Any:
    """`optax.incremental_update` from `start`, by the share of the way to `end`; what is no float is at its end."""

    def leaf(old: jax.Array, new: jax.Array) -> jax.Array:
        if not jnp.issubdtype(old.dtype, jnp.floating):
            return new
        between: Any = optax.incremental_update(new, old, share)
        return between.astype(old.dtype)

    return jax.tree.map(leaf, start, end)
