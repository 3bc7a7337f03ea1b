"""Read the collectives of a compiled program."""

import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from . import hlo

# Kind -> bytes that each of n devices must send for a byte of its result, in the algorithm that sends least.
_SENT = {
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: n - 1,
    "all-to-all": lambda n: (n - 1) / n,
    "ragged-all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: float(n > 1),
    "send": lambda n: 2 * (n - 1) / n,
}
_SENDER = re.compile(rf"({'|'.join(sorted(_SENT, key=len, reverse=True))})(-start)?")
# A fusion of an all-reduce and a slice on TPUs.
_SCATTER = "all-reduce-scatter"


class Collective(NamedTuple):
    """One collective of a program.

    Attributes:
      kind: "all-to-all", "ragged-all-to-all", "all-reduce", "all-gather", "reduce-scatter", "collective-permute", or
        "send", the part of an all-reduce between slices, which the runtime of TPUs does.
      bytes: size of its result on one device.
      group: number of devices that take part together.
      islands: number of slices or nodes that these devices are on.
    """

    kind: str
    bytes: float
    group: int
    islands: int = 1

    @property
    def sent(self) -> float:
        """Bytes that each device must send."""
        return _SENT[self.kind](self.group) * self.bytes

    @property
    def crossing(self) -> float:
        """Bytes of `sent` that leave the slice or node.

        A collective over several of them first runs inside each. Its devices then share the transfer between them.
        """
        inside = self.group // self.islands
        if self.kind in ("collective-permute", "send", "all-to-all", "ragged-all-to-all"):
            return _SENT[self.kind](self.islands) * self.bytes
        part = self.bytes if self.kind == "reduce-scatter" else self.bytes / inside
        return _SENT[self.kind](self.islands) * part


def find(text: str) -> list[Collective]:
    """Return all collectives of a compiled program. A collective in a loop counts once.

    An asynchronous collective counts where it starts. On a TPU, the steps of a chain that overlaps a collective with
    other work count as one, and a fusion that makes a reduce-scatter of an all-reduce and a slice as a reduce-scatter.
    """
    module = hlo.parse(text)
    return [each for _, each in in_computations(module, list(module.computations))]


def in_computations(
    module: hlo.Module, names: Sequence[str], islands: Sequence[int] = ()
) -> Iterator[tuple[str, Collective]]:
    """Yield (name of the computation, collective) for some computations of a program.

    Args:
      module: the program.
      names: names of computations.
      islands: number of the slice or node of each device of the program; empty for a single one.
    """
    chains: set[tuple[str, ...]] = set()
    for name in names:
        if name.startswith(_SCATTER):
            continue
        for instruction in module.computations[name].values():
            found = of_instruction(module, instruction, islands)
            if found and begins(instruction, chains):
                yield name, found


def begins(instruction: hlo.Instruction, chains: set[tuple[str, ...]]) -> bool:
    """Return whether a collective is the first of a chain that overlaps it with other work, and add it to `chains`."""
    chain = tuple(re.findall(r"channel_id=\d+|chain_id=\"\d+\"", instruction.attributes))
    if len(chain) > 1 and chain in chains:
        return False
    chains.add(chain)
    return True


def of_instruction(module: hlo.Module, instruction: hlo.Instruction, islands: Sequence[int] = ()) -> Collective | None:
    """Return the collective that an instruction is, or None."""
    if instruction.opcode == "fusion":
        fused = instruction.called("calls")[0]
        if not fused.startswith(_SCATTER):
            return None
        inner = next(each for each in module.computations[fused].values() if each.opcode.startswith("all-reduce"))
        return Collective("reduce-scatter", instruction.bytes, *_reach(inner, islands))
    match = _SENDER.fullmatch(instruction.opcode)
    if match is None:
        return None
    if match[1] == "send":
        slices = max(2, len(set(islands)))
        across = "megascale" in instruction.attributes  # others go to the host
        return Collective("send", instruction.arrays[0].bytes, slices, slices) if across else None
    # An asynchronous start returns (operands, results, ...).
    size = max(array.bytes for array in instruction.arrays) if match[2] else instruction.bytes
    return Collective(match[1], size, *_reach(instruction, islands))


def _reach(instruction: hlo.Instruction, islands: Sequence[int]) -> tuple[int, int]:
    """Return the number of devices of a group, and of the slices or nodes that the widest group covers."""
    groups = groups_of(instruction.attributes)
    if not groups:  # all devices
        return max(1, len(islands)), len(set(islands)) or 1
    if "source_target_pairs=" in instruction.attributes:
        groups = [pair for pair in groups if pair[0] != pair[1]] or groups[:1]
    widest = max(len({islands[n] for n in group}) for group in groups) if islands else 1
    return len(set(groups[0])), widest


def groups_of(attributes: str) -> list[list[int]]:
    """Return the groups of devices of a collective, in each form that XLA prints; pairs for a permutation."""
    if found := re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((.*?\))\))? ?\{(.*?)\}", attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", found[1])}
        devices = _iota(found[2] or f"[{math.prod(sizes.values())}]").reshape(list(sizes.values()))
        inside = [list(sizes).index(name) for name in re.findall(r"\w+", found[3])]
        outside = [axis for axis in range(len(sizes)) if axis not in inside]
        size = math.prod(devices.shape[axis] for axis in inside)
        return devices.transpose(outside + inside).reshape(-1, size).tolist()
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", attributes):
        return _iota(found[2]).reshape([int(n) for n in found[1].split(",")]).tolist()
    found = re.search(r"(?:replica_groups|source_target_pairs)=\{((?:\{[\d,]+\},?)*)\}", attributes)
    assert found, f"unknown form of replica groups in {attributes[:300]}"
    return [[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", found[1])]


def _iota(text: str) -> np.ndarray:
    """Return the numbers of `[4,2]T(1,0)`: 0, 1, ... in the shape [4, 2], transposed."""
    shape, _, axes = text.partition("T")
    lengths = [int(n) for n in re.findall(r"\d+", shape)]
    order = [int(n) for n in re.findall(r"\d+", axes)] or list(range(len(lengths)))
    return np.arange(math.prod(lengths)).reshape(lengths).transpose(order)
