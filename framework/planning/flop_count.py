"""FLOPs of a traced function: its matrix products and convolutions, with the body of a scan counted at every turn.

Of a convolution what is multiplied counts: neither its padding nor the zeros between inputs, which the gradients of
strided ones have.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np


class Window(NamedTuple):
    """One spatial dimension of a convolution, as `jax.lax.conv_general_dilated` has it.

    Attributes:
      inputs, taps, outputs: sizes, of the kernel the second.
      stride: of the window.
      low: padding before the first input.
      input_dilation, tap_dilation: steps from one to the next.
    """

    inputs: int
    taps: int
    outputs: int
    stride: int
    low: int
    input_dilation: int
    tap_dilation: int

    @property
    def pairs(self) -> int:
        """Of an output and a tap that read an input."""
        places = np.arange(self.outputs)[:, None] * self.stride + np.arange(self.taps) * self.tap_dilation - self.low
        inside = (places >= 0) & (places <= (self.inputs - 1) * self.input_dilation)
        return int((inside & (places % self.input_dilation == 0)).sum())


def convolution(others: int, windows: Iterable[Window]) -> float:
    """FLOPs of a convolution of so many outputs times inputs that each reads, spatial dimensions left out."""
    return 2.0 * others * math.prod(window.pairs for window in windows)


def count(function: Callable[..., Any], *arguments: Any, while_turns: float) -> float:
    """FLOPs of one call, on one device where the function has parts that run per device (`jax.shard_map`).

    What stands outside such parts is divided evenly over the devices of the mesh in the context. Elementwise work is
    not counted.

    Args:
      function: to be traced.
      *arguments: ShapeDtypeStructs.
      while_turns: how often the body of a loop of unknown length is assumed to run; a loop around such loops runs once.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return _count(jax.make_jaxpr(function)(*arguments).jaxpr, while_turns, 1 if mesh.empty else 1 / mesh.size)


def _count(jaxpr: Any, while_turns: float, share: float) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        kind, params = equation.primitive.name, equation.params
        if kind == "dot_general":
            total += share * _product(equation)
        elif kind == "conv_general_dilated":
            total += share * _convolution(equation)
        elif kind == "scan":
            total += params["length"] * _count(params["jaxpr"].jaxpr, while_turns, share)
        elif kind == "while":
            body = params["body_jaxpr"].jaxpr
            turns = 1.0 if _loops(body) else while_turns
            total += turns * _count(body, while_turns, share)
        elif kind == "cond":
            total += max(_count(branch.jaxpr, while_turns, share) for branch in params["branches"])
        elif kind == "shard_map":
            parts = math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
            total += _count(params["jaxpr"], while_turns, share * parts)
        else:
            total += sum(_count(inner, while_turns, share) for inner in _inner(equation))
    return total


def _inner(equation: Any) -> Iterator[Any]:
    """The programs that an equation holds."""
    for value in equation.params.values():
        for each in value if isinstance(value, tuple) else (value,):
            inner = getattr(each, "jaxpr", each)
            if hasattr(inner, "eqns"):
                yield inner


def _loops(jaxpr: Any) -> bool:
    """Whether a program has a loop of unknown length anywhere."""
    return any(equation.primitive.name == "while" or any(map(_loops, _inner(equation))) for equation in jaxpr.eqns)


def _product(equation: Any) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    return 2.0 * math.prod(out) * math.prod(left[axis] for axis in contracted)


def _convolution(equation: Any) -> float:
    params = equation.params
    numbers = params["dimension_numbers"]
    inputs, kernel, out = (x.aval.shape for x in (*equation.invars[:2], equation.outvars[0]))
    columns = zip(
        (inputs[axis] for axis in numbers.lhs_spec[2:]),
        (kernel[axis] for axis in numbers.rhs_spec[2:]),
        (out[axis] for axis in numbers.out_spec[2:]),
        params["window_strides"],
        (low for low, _ in params["padding"]),
        params["lhs_dilation"],
        params["rhs_dilation"],
        strict=True,
    )
    batch, features = (out[axis] for axis in numbers.out_spec[:2])
    return convolution(batch * features * kernel[numbers.rhs_spec[1]], (Window(*each) for each in columns))
