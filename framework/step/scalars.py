"""Carry the scalars that a compiled step measures to the host in one array."""

import functools
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np


@jax.tree_util.register_pytree_node_class
class Scalars(Mapping[str, np.generic]):
    """Named scalars of a compiled function, float32 or int32, in one array.

    Looking up a name waits for the device and transfers all of them, once.

    Args:
      names: of the scalars.
      integer: whether each of them is an integer.
      bits: [scalars] int32; a float32 is kept by its bits.
    """

    def __init__(self, names: tuple[str, ...], integer: tuple[bool, ...], bits: jax.Array):
        self.names, self.integer, self.bits = names, integer, bits

    @classmethod
    def pack(cls, values: Mapping[str, jax.Array]) -> "Scalars":
        """Return scalars in one array. Other floats are rounded to float32."""
        integer = tuple(not jnp.issubdtype(value.dtype, jnp.floating) for value in values.values())
        bits = [
            value.astype(jnp.int32) if whole else jax.lax.bitcast_convert_type(value.astype(jnp.float32), jnp.int32)
            for value, whole in zip(values.values(), integer, strict=True)
        ]
        return cls(tuple(values), integer, jnp.stack(bits) if bits else jnp.zeros(0, jnp.int32))

    @functools.cached_property
    def _read(self) -> dict[str, np.generic]:
        bits = np.asarray(self.bits)
        read = zip(self.names, self.integer, bits, bits.view(np.float32), strict=True)
        return {name: count if whole else number for name, whole, count, number in read}

    def __getitem__(self, name: str) -> np.generic:
        return self._read[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def tree_flatten(self) -> tuple[tuple[jax.Array], tuple[tuple[str, ...], tuple[bool, ...]]]:
        """Return the array, and the names and kinds, which are static."""
        return (self.bits,), (self.names, self.integer)

    @classmethod
    def tree_unflatten(cls, static: tuple[tuple[str, ...], tuple[bool, ...]], bits: tuple[jax.Array]) -> "Scalars":
        """Return the scalars of a flattened tree."""
        return cls(*static, *bits)
