"""Describe where the values of a parameter are among the tensors of a Hugging Face folder.

A parameter of all layers is one array; a folder has one tensor per layer, and per expert. A tensor may have other axes:
a kernel [E, H, D] is stored as [H * D, E].
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Tensors:
    """The tensors of a parameter: one for each index of its leading axes.

    Attributes:
      name: name of a tensor, with {0}, {1}, ... for the index.
      stacked: sizes of the leading axes.
      split: shape of a tensor after axes that it joins are split.
      order: axes of the split tensor in the order of the parameter.
      shape: shape of a tensor.
      added: number to add to the values of a tensor.
      first: number in a name for index 0 of the first axis; a stack may begin at a later layer.
    """

    name: str
    stacked: tuple[int, ...]
    split: tuple[int, ...]
    order: tuple[int, ...]
    shape: tuple[int, ...]
    added: float = 0.0
    first: int = 0

    @classmethod
    def parse(cls, text: str, sizes: Mapping[str, int], added: float = 0.0, first: int = 0) -> "Tensors":
        """Return the tensors that a text describes.

        Args:
          text: "layers.{L}.q_proj.weight: H*D E -> E H D": a name with the stacked axes, the axes of a tensor and those
            of the parameter after the stacked ones; without an arrow they are the same.
          sizes: axis -> size.
          added: as the attribute.
          first: as the attribute.
        """
        name, _, axes = text.partition(": ")
        stored, _, wanted = axes.partition(" -> ")
        split = stored.replace("*", " ").split()
        stacked = [part.partition("}")[0] for part in name.split("{")[1:]]
        return cls(
            name=name.format(**{axis: f"{{{number}}}" for number, axis in enumerate(stacked)}),
            stacked=tuple(sizes[axis] for axis in stacked),
            split=tuple(sizes[axis] for axis in split),
            order=tuple(split.index(axis) for axis in (wanted or " ".join(split)).split()),
            shape=tuple(math.prod(sizes[axis] for axis in joined.split("*")) for joined in stored.split()),
            added=added,
            first=first,
        )

    def names(self) -> Iterator[tuple[tuple[int, ...], str]]:
        """Yield each index of the leading axes, and the name of its tensor."""
        for index in itertools.product(*map(range, self.stacked)):
            yield index, self.name.format(*(number + self.first * (at == 0) for at, number in enumerate(index)))

    def view(self, tensor: Any) -> Any:
        """Return a NumPy array of the shape of a tensor in the layout of the parameter, without copying it."""
        return tensor.reshape(self.split).transpose(self.order)

    @property
    def parameter(self) -> tuple[int, ...]:
        """Shape of the parameter."""
        return (*self.stacked, *(self.split[axis] for axis in self.order))
