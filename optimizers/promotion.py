"""JAX's default promotion of dtypes and ranks, whatever the user's program has set."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def standard_promotion(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Return the function, traced under `jax_numpy_dtype_promotion=standard` and `jax_numpy_rank_promotion=allow`."""

    @functools.wraps(function)
    def wrapped(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return function(*args, **kwargs)

    return wrapped
