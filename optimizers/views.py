"""How a parameter is seen as a stack of matrices: which axes stack, which fold into rows, which into columns."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax

from .patterns import path_name


@dataclasses.dataclass(frozen=True)
class MatrixView:
    """A parameter of `shape` as [stack, rows, cols].

    Attributes:
      shape: the parameter's own shape.
      order: a permutation of its axes: the stack's, then the rows', then the columns'.
      stack, rows, cols: the sizes after folding.
    """

    shape: tuple[int, ...]
    order: tuple[int, ...]
    stack: int
    rows: int
    cols: int

    @property
    def is_matrix(self) -> bool:
        """Whether both sides are longer than one; all else has nothing for Shampoo to precondition."""
        return self.stack > 0 and self.rows > 1 and self.cols > 1


def matrix_axes(
    rank: int,
    names: Sequence[str | None] | None,
    *,
    stack_axes: Sequence[str],
    fold_axes: Sequence[str],
    stack: int = 0,
) -> tuple[list[int], list[int], list[int]]:
    """Which axes of a parameter stack, which form the one side of its matrices and which the other.

    With axis names, axes named in `stack_axes` stack, and a run of neighbours named in `fold_axes` folds into one
    side: [embed, heads, head_dim] is embed x (heads head_dim). Otherwise the first `stack` axes stack, the last axis is
    one side and the rest folds into the other, as conv kernels do: [kh, kw, cin, cout] is (kh kw cin) x cout.

    Returns:
      (stack, first side, second side), each in rising order; the first side's first axis precedes the second's.
    """
    axes = list(range(rank))
    if names is None:
        stacked, rest, folded = axes[:stack], axes[stack:], []
    else:
        stacked = [axis for axis in axes if names[axis] in stack_axes]
        rest = [axis for axis in axes if axis not in stacked]
        folded = [axis for axis in rest if names[axis] in fold_axes]
    runs_together = bool(folded) and folded[-1] - folded[0] == len(folded) - 1
    if runs_together and len(folded) < len(rest) and (folded[0] == rest[0] or folded[-1] == rest[-1]):
        sides = [folded, [axis for axis in rest if axis not in folded]]
    else:
        sides = [rest[:-1], rest[-1:]]
    if all(sides):
        sides.sort()
    return stacked, sides[0], sides[1]


def matrix_view(
    shape: Sequence[int],
    names: Sequence[str | None] | None,
    *,
    stack_axes: Sequence[str],
    fold_axes: Sequence[str],
    stack: int = 0,
) -> MatrixView:
    """The matrix view of a parameter by `matrix_axes`, the shorter side first.

    With the shorter side first, a matrix and its transpose share a bucket.

    Raises:
      ValueError: the number of names is not the number of axes.
    """
    if names is not None and len(names) != len(shape):
        raise ValueError(f"axis names {tuple(names)} have {len(names)} entries for a parameter of shape {tuple(shape)}")
    stacked, *sides = matrix_axes(len(shape), names, stack_axes=stack_axes, fold_axes=fold_axes, stack=stack)
    sides.sort(key=lambda side: math.prod(shape[axis] for axis in side))
    rows, cols = (math.prod(shape[axis] for axis in side) for side in sides)
    return MatrixView(
        shape=tuple(shape),
        order=(*stacked, *sides[0], *sides[1]),
        stack=math.prod(shape[axis] for axis in stacked),
        rows=rows,
        cols=cols,
    )


def names_by_path(axis_names: Any) -> dict[str, tuple[str | None, ...]]:
    """A tree whose leaves are tuples of axis names as a dict from path to names; empty for None."""
    entries = jax.tree_util.tree_leaves_with_path(axis_names, is_leaf=lambda x: isinstance(x, tuple))
    return {path_name(key_path): tuple(names) for key_path, names in entries}
