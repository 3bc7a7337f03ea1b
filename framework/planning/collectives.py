"""The collectives of a compiled program, read from its HLO text."""

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

COLLECTIVES = ("all-to-all", "all-reduce", "all-gather", "reduce-scatter", "collective-permute")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "f64": 8}


class Collective(NamedTuple):
    """One collective of a program.

    Attributes:
      kind: one of COLLECTIVES.
      bytes: of its result, on one device.
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
    """All collectives of a compiled program, whether they run once or in a loop.

    An asynchronous one is counted where it starts; the steps of a chain by which a TPU hides one behind other work are
    one. The fusion by which a TPU makes a reduce-scatter of an all-reduce and a slice counts as a reduce-scatter.
    """
    result, chains = [], set()
    by_name = computations(text)
    for name, lines in by_name.items():
        if name.startswith("all-reduce-scatter"):
            continue
        for line in lines:
            fused = re.search(r" fusion\(.*calls=%?(all-reduce-scatter[\w.\-]*)", line)
            found = re.search(rf" ({'|'.join(COLLECTIVES)})(-start)?\(", line)
            chain = re.search(r"channel_id=\d+.*chain_id=\"\d+\"", line)
            if chain:
                link = re.findall(r"channel_id=\d+|chain_id=\"\d+\"", line)
                if tuple(link) in chains:
                    continue
                chains.add(tuple(link))
            if fused:
                inner = next(x for x in by_name[fused[1]] if re.search(r" all-reduce(-start)?\(", x))
                result.append(Collective("reduce-scatter", _result_bytes(line), _group(inner)))
            elif found:
                result.append(Collective(found[1], _result_bytes(line, started=bool(found[2])), _group(line)))
    return result


def total(found: Sequence[Collective], *kinds: str) -> int:
    """Bytes of the results of some kinds of collectives."""
    return sum(c.bytes for c in found if c.kind in kinds)


def computations(text: str) -> dict[str, list[str]]:
    """Name -> instructions of each computation of a compiled program."""
    result: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        header = re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if header:
            lines = result.setdefault(header[1], [])
        elif line.startswith(" "):
            lines.append(line)
    return result


def inside_loops(text: str) -> list[str]:
    """Instructions of all loops, with whatever their bodies and conditions call."""
    by_name = computations(text)
    waiting = [name for lines in by_name.values() for line in lines if " while(" in line for name in _called(line)]
    seen: dict[str, list[str]] = {}
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen[name] = by_name[name]
            waiting += [called for line in by_name[name] for called in _called(line)]
    return [line for lines in seen.values() for line in lines]


def _called(line: str) -> list[str]:
    names = re.findall(r"(?:body|condition|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)", line)
    for several in re.findall(r"(?:branch_computations|called_computations)=\{([^}]*)\}", line):
        names += re.findall(r"[\w.\-]+", several)
    return names


def _result_bytes(line: str, started: bool = False) -> int:
    """Of an instruction's result; what starts asynchronously has (operands, results, ...) for a result."""
    shape = line.split(" = ", 1)[1]
    shape = shape[: _end_of_shape(shape)]
    sizes = [
        _BYTES[kind] * math.prod(int(n) for n in dims.split(",") if n)
        for kind, dims in re.findall(r"\b(\w+)\[([\d,]*)\]", shape)
        if kind in _BYTES
    ]
    return max(sizes) if started else sum(sizes)


def _end_of_shape(text: str) -> int:
    depth = 0
    for at, character in enumerate(text):
        depth += (character in "({[") - (character in ")}]")
        if character == " " and depth == 0:
            return at
    raise ValueError(f"no instruction in {text!r}")


def _group(line: str) -> int:
    """Devices of a replica group, written as a list, as [groups,devices]<=[...] or as axes of a mesh; 2 of a pair."""
    if "source_target_pairs=" in line:
        return 2
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        return math.prod(int(sizes[name]) for name in re.findall(r"\w+", found[2]))
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]<=", line):
        return int(found[1])
    found = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    assert found, f"no replica groups that are understood in {line}"
    return len(found[1].split(","))
