"""Views of a parameter as a stack of matrices or tensors: axes that stack, and axes that fold into each side."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

from .patterns import by_path


@dataclasses.dataclass(frozen=True)
class View:
    """A parameter of `shape` as a stack of tensors with one or more sides, the shorter sides first.

    Attributes:
      shape: shape of the parameter.
      stack: axes that stack.
      sides: axes that fold into each side, in row-major order.
    """

    shape: tuple[int, ...]
    stack: tuple[int, ...]
    sides: tuple[tuple[int, ...], ...]

    def length(self, axes: Sequence[int]) -> int:
        """Return the length of a side that folds the given axes."""
        return math.prod(self.shape[axis] for axis in axes)

    @property
    def axes(self) -> tuple[int, ...]:
        """Return all axes, those that stack first."""
        return (*self.stack, *itertools.chain(*self.sides))

    @property
    def lengths(self) -> tuple[int, ...]:
        """Return the length of each side."""
        return tuple(self.length(side) for side in self.sides)

    @property
    def stacked(self) -> int:
        """Return the number of matrices (or tensors) in the stack."""
        return self.length(self.stack)

    @property
    def is_matrix(self) -> bool:
        """Return whether there are at least two sides, all longer than one; otherwise Shampoo does not apply."""
        return self.stacked > 0 and len(self.sides) > 1 and min(self.lengths) > 1


def matrix_axes(
    rank: int,
    names: Sequence[str | None] | None,
    *,
    stack_axes: Sequence[str],
    fold_axes: Sequence[str],
    stack: int = 0,
) -> tuple[list[int], list[int], list[int]]:
    """Return the axes of a parameter that stack, and those of the two sides of its matrices.

    With axis names, axes named in `stack_axes` stack. Among the other axes, the leading run named in `fold_axes`, or
    else the trailing run, is one side: [embed, heads, head_dim] is embed x (heads head_dim). Without names, the first
    `stack` axes stack. If no run folds, the last axis is one side: [kh, kw, cin, cout] is (kh kw cin) x cout. If all
    axes fold, they are one side, a vector: the bias [heads, head_dim].

    Returns:
      (stack, first side, second side), each in increasing order; the first side's first axis precedes the second's.
    """
    axes = list(range(rank))
    if names is None:
        stacked, rest, folds = axes[:stack], axes[stack:], []
    else:
        stacked = [axis for axis in axes if names[axis] in stack_axes]
        rest = [axis for axis in axes if axis not in stacked]
        folds = [names[axis] in fold_axes for axis in rest]
    leading = folds.index(False) if False in folds else 0
    trailing = folds[::-1].index(False) if False in folds else 0
    split = leading or len(rest) - (trailing or 1)
    sides = [[], rest] if len(rest) < 2 or (folds and all(folds)) else [rest[:split], rest[split:]]
    return stacked, sides[0], sides[1]


def matrix_view(
    shape: Sequence[int],
    names: Sequence[str | None] | None,
    *,
    stack_axes: Sequence[str],
    fold_axes: Sequence[str],
    stack: int = 0,
) -> View:
    """Return the view with the two sides of `matrix_axes`, the shorter first.

    A matrix and its transpose then share a bucket.
    """
    stacked, *sides = matrix_axes(len(shape), names, stack_axes=stack_axes, fold_axes=fold_axes, stack=stack)
    return _shorter_first(shape, stacked, sides)


def tensor_view(
    shape: Sequence[int],
    names: Sequence[str | None] | None,
    *,
    stack_axes: Sequence[str],
    merge_dims: int = 0,
    stack: int = 0,
) -> View:
    """Return the view with one side per axis that does not stack (section 3 of arXiv 2002.09018, tensors of order k).

    Axes of length one stack. From left to right, a side is merged into the one before it while the product of their
    lengths is at most `merge_dims` and at least two sides remain.
    """
    axes = range(len(shape))
    stacked = [
        axis for axis in axes if shape[axis] == 1 or (axis < stack if names is None else names[axis] in stack_axes)
    ]
    sides = [[axis] for axis in axes if axis not in stacked]
    at = 1
    while at < len(sides) and len(sides) > 2:
        if math.prod(shape[axis] for axis in (*sides[at - 1], *sides[at])) <= merge_dims:
            sides[at - 1] += sides.pop(at)
        else:
            at += 1
    return _shorter_first(shape, stacked, sides)


def _shorter_first(shape: Sequence[int], stack: Sequence[int], sides: Sequence[Sequence[int]]) -> View:
    ordered = sorted(sides, key=lambda side: math.prod(shape[axis] for axis in side))
    return View(tuple(shape), tuple(stack), tuple(tuple(side) for side in ordered))


def names_by_path(axis_names: Any) -> dict[str, tuple[str | None, ...] | None]:
    """Return path -> axis names for a tree with a tuple of names (or None) per parameter; empty for None."""

    def is_names(x: Any) -> bool:
        return x is None or (isinstance(x, tuple) and all(isinstance(name, str | None) for name in x))

    return by_path(axis_names, is_names)
