"""FLOPs of a traced function: its matrix products and convolutions, with the body of a scan counted at every turn."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax


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
    devices = 1 if mesh.empty else mesh.size
    return _count(jax.make_jaxpr(function)(*arguments).jaxpr, while_turns, 1 / devices, devices)


def _count(jaxpr: Any, while_turns: float, share: float, devices: int) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        kind, params = equation.primitive.name, equation.params
        if kind == "dot_general":
            total += share * _product(equation)
        elif kind == "conv_general_dilated":
            total += share * _convolution(equation)
        elif kind == "scan":
            total += params["length"] * _count(params["jaxpr"].jaxpr, while_turns, share, devices)
        elif kind == "while":
            body = params["body_jaxpr"].jaxpr
            turns = 1.0 if _loops(body) else while_turns
            total += turns * _count(body, while_turns, share, devices)
        elif kind == "cond":
            total += max(_count(branch.jaxpr, while_turns, share, devices) for branch in params["branches"])
        elif kind == "shard_map":
            total += _count(params["jaxpr"], while_turns, share * devices, devices)
        else:
            total += sum(_count(inner, while_turns, share, devices) for inner in _inner(equation))
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
    numbers = equation.params["dimension_numbers"]
    kernel, out = equation.invars[1].aval.shape, equation.outvars[0].aval.shape
    outputs = kernel[numbers.rhs_spec[0]]
    return 2.0 * math.prod(out) * math.prod(kernel) / outputs
