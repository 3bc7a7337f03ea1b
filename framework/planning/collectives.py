"""Read the collectives of a compiled program from its HLO text."""

import math
import re
from typing import NamedTuple

_KINDS = "all-to-all|all-reduce|all-gather|reduce-scatter|collective-permute"
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "f64": 8}


class Collective(NamedTuple):
    """One collective of a program.

    Attributes:
      kind: "all-to-all", "all-reduce", "all-gather", "reduce-scatter" or "collective-permute".
      bytes: size of its result on one device.
      group: number of devices that take part together.
    """

    kind: str
    bytes: int
    group: int

    @property
    def sent(self) -> float:
        """Bytes that each device must send, in the algorithm that sends least."""
        others = self.group - 1
        return {
            "all-reduce": 2 * others / self.group,
            "all-gather": others / self.group,
            "reduce-scatter": others,
            "all-to-all": others / self.group,
            "collective-permute": 1.0,
        }[self.kind] * self.bytes


def find(text: str) -> list[Collective]:
    """Return all collectives of a compiled program. A collective in a loop counts once.

    An asynchronous collective counts where it starts. On a TPU, the steps of a chain that overlaps a collective with
    other work count as one, and a fusion that makes a reduce-scatter of an all-reduce and a slice as a reduce-scatter.
    """
    result, chains = [], set()
    by_name = computations(text)
    for name, lines in by_name.items():
        if name.startswith("all-reduce-scatter"):
            continue
        for line in lines:
            if re.search(r"channel_id=\d+.*chain_id=\"\d+\"", line):
                chain = tuple(re.findall(r"channel_id=\d+|chain_id=\"\d+\"", line))
                if chain in chains:
                    continue
                chains.add(chain)
            if fused := re.search(r" fusion\(.*calls=%?(all-reduce-scatter[\w.\-]*)", line):
                inner = next(each for each in by_name[fused[1]] if re.search(r" all-reduce(-start)?\(", each))
                result.append(Collective("reduce-scatter", sum(_result_sizes(line)), _group(inner)))
            elif found := re.search(rf" ({_KINDS})(-start)?\(", line):
                sizes = _result_sizes(line)
                # An asynchronous start returns (operands, results, ...).
                result.append(Collective(found[1], max(sizes) if found[2] else sum(sizes), _group(line)))
    return result


def computations(text: str) -> dict[str, list[str]]:
    """Return the instructions of each computation of a compiled program, by name."""
    result: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        header = re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if header:
            lines = result.setdefault(header[1], [])
        elif line.startswith(" "):
            lines.append(line)
    return result


def _result_sizes(line: str) -> list[int]:
    """Return the bytes of each array in an instruction's result."""
    shape = line.split(" = ", 1)[1]
    depth = 0
    for end, character in enumerate(shape):
        depth += (character in "({[") - (character in ")}]")
        if character == " " and depth == 0:
            shape = shape[:end]
            break
    arrays = re.findall(r"\b(\w+)\[([\d,]*)\]", shape)
    return [_BYTES[kind] * math.prod(int(n) for n in dims.split(",") if n) for kind, dims in arrays if kind in _BYTES]


def _group(line: str) -> int:
    """Return the size of a replica group, written as a list, as [groups,devices]<=[...] or as axes of a mesh."""
    if "source_target_pairs=" in line:
        return 2
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        return math.prod(int(sizes[name]) for name in re.findall(r"\w+", found[2]))
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]<=", line):
        return int(found[1])
    found = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    assert found, f"unknown form of replica groups in {line}"
    return len(found[1].split(","))
