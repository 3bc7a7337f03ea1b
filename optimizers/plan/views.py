"""How a parameter is seen as a stack of matrices or tensors: which axes stack, and which fold into each side."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax

from .patterns import path_name


@dataclasses.dataclass(frozen=True)
class View:
    """A parameter of `shape` as a stack of tensors with one or more sides, the shorter sides first.

    Attributes:
      shape: the parameter's own shape.
      stack: its axes that stack.
      sides: for each side, the axes that fold into it, in row-major order.
    """

    shape: tuple[int, ...]
    stack: tuple[int, ...]
    sides: tuple[tuple[int, ...], ...]

    def length(self, axes: Sequence[int]) -> int:
        """Number of elements along axes that fold into one."""
        return math.prod(self.shape[axis] for axis in axes)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Length of each side."""
        return tuple(self.length(side) for side in self.sides)

    @property
    def stacked(self) -> int:
        """Number of matrices (or tensors) in the stack."""
        return self.length(self.stack)

    @property
    def is_matrix(self) -> bool:
        """Whether at least two sides are longer than one; all else has nothing for Shampoo to precondition."""
        return self.stacked > 0 and len(self.sides) > 1 and min(self.lengths) > 1


def matrix_axes(
    rank: int,
    names: Sequence[str | None] | None,
    *,
    stack_axes: Sequence[str],
    fold_axes: Sequence[str],
    stack: int = 0,
) -> tuple[list[int], list[int], list[int]]:
    """Which axes of a parameter stack, which form the one side of its matrices and which the other.

    With axis names, axes named in `stack_axes` stack. Of the others, a run named in `fold_axes` that begins the shape,
    or else one that ends it, is one side: [embed, heads, head_dim] is embed x (heads head_dim). Otherwise the first
    `stack` axes stack, the last axis is one side and the rest folds into the other, as conv kernels do:
    [kh, kw, cin, cout] is (kh kw cin) x cout.

    Returns:
      (stack, first side, second side), each in rising order; the first side's first axis precedes the second's.
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
    sides = [rest[:split], rest[split:]] if len(rest) > 1 else [[], rest]
    return stacked, sides[0], sides[1]


def matrix_view(
    shape: Sequence[int],
    names: Sequence[str | None] | None,
    *,
    stack_axes: Sequence[str],
    fold_axes: Sequence[str],
    stack: int = 0,
) -> View:
    """The view with two sides that `matrix_axes` gives.

    With the shorter side first, a matrix and its transpose share a bucket.

    Raises:
      ValueError: the number of names is not the number of axes.
    """
    _check_names(shape, names)
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
    """Every axis that does not stack as a side of its own (section 3 of arXiv 2002.09018, tensors of order k).

    Axes of length one join the stack. From left to right a side merges into the one before it while their product is at
    most `merge_dims` and two sides remain: merging never makes a vector of a matrix.

    Raises:
      ValueError: the number of names is not the number of axes.
    """
    _check_names(shape, names)
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


def _check_names(shape: Sequence[int], names: Sequence[str | None] | None) -> None:
    if names is not None and len(names) != len(shape):
        raise ValueError(f"axis names {tuple(names)} have {len(names)} entries for a parameter of shape {tuple(shape)}")


def _shorter_first(shape: Sequence[int], stack: Sequence[int], sides: Sequence[Sequence[int]]) -> View:
    ordered = sorted(sides, key=lambda side: math.prod(shape[axis] for axis in side))
    return View(tuple(shape), tuple(stack), tuple(tuple(side) for side in ordered))


def names_by_path(axis_names: Any) -> dict[str, tuple[str | None, ...]]:
    """A tree whose leaves are tuples of axis names as a dict from path to names; empty for None."""
    entries = jax.tree_util.tree_leaves_with_path(axis_names, is_leaf=lambda x: isinstance(x, tuple))
    return {path_name(key_path): tuple(names) for key_path, names in entries}
