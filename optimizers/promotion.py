"""JAX's default promotion of dtypes and ranks, whatever the user's program has set."""

import contextlib
from collections.abc import Iterator

import jax


@contextlib.contextmanager
def standard_promotion() -> Iterator[None]:
    """Trace under `jax_numpy_dtype_promotion=standard` and `jax_numpy_rank_promotion=allow`; also a decorator."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
