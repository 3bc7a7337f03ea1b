"""Read the collectives of a compiled program from its HLO text."""

import math
import re
from typing import NamedTuple

# Kind -> bytes that each of n devices must send for a byte of its result, in the algorithm that sends least.
_SENT = {
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: n - 1,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1,
}
_START = re.compile(rf" (?:({'|'.join(_SENT)})(-start)?|fusion)\(")
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
        """Bytes that each device must send."""
        return _SENT[self.kind](self.group) * self.bytes


def find(text: str) -> list[Collective]:
    """Return all collectives of a compiled program. A collective in a loop counts once.

    An asynchronous collective counts where it starts. On a TPU, the steps of a chain that overlaps a collective with
    other work count as one, and a fusion that makes a reduce-scatter of an all-reduce and a slice as a reduce-scatter.
    """
    result, chains = [], set()
    by_name = computations(text)
    for line in (
        line for name, lines in by_name.items() if not name.startswith("all-reduce-scatter") for line in lines
    ):
        start = _START.search(line)
        if start is None:
            continue
        chain = tuple(re.findall(r"channel_id=\d+|chain_id=\"\d+\"", line))
        if len(chain) > 1 and chain in chains:
            continue
        chains.add(chain)
        kind, asynchronous = start.groups()
        arrays = re.findall(r"\b(\w+)\[([\d,]*)\]", line[: start.start()])
        sizes = [
            _BYTES[type_] * math.prod(int(n) for n in shape.split(",") if n)
            for type_, shape in arrays
            if type_ in _BYTES
        ]
        if kind is not None:
            # An asynchronous start returns (operands, results, ...).
            result.append(Collective(kind, max(sizes) if asynchronous else sum(sizes), _group(line)))
        elif fused := re.search(r"calls=%?(all-reduce-scatter[\w.\-]*)", line):
            inner = next(each for each in by_name[fused[1]] if re.search(r" all-reduce(-start)?\(", each))
            result.append(Collective("reduce-scatter", sum(sizes), _group(inner)))
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
