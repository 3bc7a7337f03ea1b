"""Base of tasks with a Linen module, and checks of their options."""

import abc
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax

from .kernels import costs
from .modules import KEPT, REMAT_POLICIES, is_remat

Batch = Mapping[str, jax.Array]
BatchSpec = Mapping[str, jax.ShapeDtypeStruct]
Metrics = dict[str, tuple[jax.Array, jax.Array]]  # name -> (total, weight)


class LinenTask(abc.ABC):
    """Base of a frozen dataclass that names a Linen module; it derives `init` and `logical_axes`.

    Logical axis names come from the module, `nn.with_logical_partitioning(init, ("embed", "mlp"))`; arrays without
    names have None for every dimension and are replicated.
    """

    @abc.abstractmethod
    def boxed(self, key: jax.Array) -> Any:
        """Return the variables of the module's `init`; traceable."""

    def check_batch(self, batch_spec: BatchSpec) -> None:  # noqa: B027
        """Raise ValueError if the model cannot be trained on such a batch."""

    def kernel_cost(
        self, name: str, operands: Sequence[jax.ShapeDtypeStruct], results: Sequence[jax.ShapeDtypeStruct]
    ) -> tuple[float, float] | None:
        """Return FLOPs and bytes of an attention kernel, None for other kernels."""
        return costs.cost(name, operands, results)

    def init(self, key: jax.Array, batch_spec: BatchSpec) -> dict[str, Any]:
        """Return the initial variables as nested dicts.

        Raises:
          ValueError: see `check_batch`.
        """
        self.check_batch(batch_spec)
        return nn.unbox(self.boxed(key))

    def logical_axes(self, variables: dict[str, Any]) -> dict[str, Any]:
        """Return for each variable a tuple of names, one for each dimension.

        Raises:
          ValueError: `variables` are not those of this task.
        """

        def is_boxed(leaf: Any) -> bool:
            return isinstance(leaf, nn.LogicallyPartitioned)

        def names_of(leaf: Any) -> tuple[str | None, ...]:
            return tuple(leaf.names) if is_boxed(leaf) else (None,) * leaf.ndim

        boxed = jax.eval_shape(lambda: self.boxed(jax.random.key(0)))
        names = jax.tree.map(names_of, boxed, is_leaf=is_boxed)
        return jax.tree.map(lambda _, axes: axes, variables, names)


def check_options(
    task: Any, *, positive: str = "", not_negative: str = "", fractions: str = "", **choices: Iterable[str]
) -> None:
    """Check options of a task by name, and `remat`, `compute_dtype` and `head_dim` if it has them.

    Args:
      task: a dataclass.
      positive: names, separated by blanks, of numbers that must be at least 1.
      not_negative: names of numbers that must be at least 0 and finite.
      fractions: names of numbers that must be at least 0 and below 1.
      **choices: values that an option can have.

    Raises:
      ValueError: an option is out of range.
    """
    for names, least, below in ((positive, 1, math.inf), (not_negative, 0, math.inf), (fractions, 0, 1)):
        for name in names.split():
            if not least <= getattr(task, name) < below:
                rule = f"at least {least}" + ("" if below == math.inf else f" and below {below}")
                raise ValueError(f"task.{name}={getattr(task, name)}: must be {rule}")
    for name, allowed in {"compute_dtype": ("float32", "bfloat16"), **choices}.items():
        if hasattr(task, name) and getattr(task, name) not in allowed:
            choices_text = ", ".join(choice or "''" for choice in allowed)
            raise ValueError(f"task.{name}={getattr(task, name)!r}: use one of {choices_text}")
    if not is_remat(getattr(task, "remat", "none")):
        allowed = (
            f"one of {', '.join(REMAT_POLICIES)}, or names of {' '.join(KEPT)}, each once, with or without 'host:'"
        )
        raise ValueError(f"task.remat={task.remat!r}: use {allowed}")
    head_dim = getattr(task, "head_dim", 0)
    if head_dim % 2:
        raise ValueError(f"task.head_dim={head_dim}: must be even for rotary positions; use {head_dim + 1}")
