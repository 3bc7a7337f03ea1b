"""Parse the text of a compiled program into computations and instructions."""

import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

_BYTES = {
    "pred": 1.0,
    **dict.fromkeys(("s2", "u2"), 0.25),
    **dict.fromkeys(("s4", "u4", "f4e2m1fn"), 0.5),
    **dict.fromkeys(("s8", "u8"), 1.0),
    **dict.fromkeys(("s16", "u16", "f16", "bf16"), 2.0),
    **dict.fromkeys(("s32", "u32", "f32"), 4.0),
    **dict.fromkeys(("s64", "u64", "f64", "c64"), 8.0),
    "c128": 16.0,
}
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")
_CALLED = r"(?:^|[ ,]){}=%?([\w.\-]+)"


class Array(NamedTuple):
    """An array of a program.

    Attributes:
      dtype: as in HLO, for example "bf16".
      shape: lengths of the axes.
      layout: order of the axes, tiles and memory space; "" for a scalar.
    """

    dtype: str
    shape: tuple[int, ...]
    layout: str

    @property
    def bytes(self) -> float:
        """Bytes without the padding of tiles."""
        return _BYTES.get(self.dtype, 1.0) * math.prod(self.shape)

    @property
    def hbm_bytes(self) -> float:
        """Bytes in the main memory of the device: 0 for an array in VMEM, SMEM or the memory of the host."""
        return 0.0 if "S(" in self.layout else self.bytes


class Instruction(NamedTuple):
    """An instruction.

    Attributes:
      name: unique in its program.
      opcode: for example "fusion".
      arrays: its result, several for a tuple.
      operands: names of instructions of the same computation.
      literal: text of the operands, for a constant its value and for a parameter its number.
      attributes: text after the operands.
      root: whether its result is that of the computation.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    literal: str
    attributes: str
    root: bool

    @property
    def scope(self) -> str:
        """JAX's name of the operation that it comes from, with the scopes around it; "" for one of the compiler's."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    @property
    def bytes(self) -> float:
        """Bytes of the result."""
        return sum(array.bytes for array in self.arrays)

    def called(self, *keys: str) -> list[str]:
        """Return the names of the computations that the attributes `keys` name."""
        found = []
        for key in keys:
            if match := re.search(_CALLED.format(key), self.attributes):
                found.append(match[1])
            elif match := re.search(rf"{key}=\{{([^}}]*)\}}", self.attributes):
                found += re.findall(r"[\w.\-]+", match[1])
        return found

    def attribute(self, key: str) -> str:
        """Return the text between the braces of an attribute, or "" if the instruction has no such attribute."""
        found = re.search(rf"\b{key}=\{{([^}}]*)\}}", self.attributes)
        return found[1] if found else ""


Computation = Mapping[str, Instruction]


class Module(NamedTuple):
    """A compiled program: the name of its first computation, and all computations by name."""

    entry: str
    computations: Mapping[str, Computation]

    def fused(self, instruction: Instruction) -> Computation:
        """Return the computation of a fusion."""
        return self.computations[instruction.called("calls")[0]]


def parse(text: str) -> Module:
    """Return the program of a text such as `jax.stages.Compiled.as_text()` returns."""
    entry, computations = "", {}
    for name, is_entry, lines in _split(text):
        computations[name] = {each.name: each for each in map(_instruction, lines)}
        entry = name if is_entry else entry
    return Module(entry, computations)


def _split(text: str) -> Iterator[tuple[str, bool, list[str]]]:
    """Yield each computation: its name, whether it is the first to run, and its instructions, one per text."""
    name, is_entry, lines = "", False, []
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        if header := _HEADER.match(line):
            is_entry, name, lines = bool(header[1]), header[2], []
        elif line == "}":
            yield name, is_entry, lines
            name = ""
        elif name and _INSTRUCTION.match(line):
            lines.append(line)
        elif name and lines:  # attributes of kernels contain newlines
            lines[-1] += line


def _instruction(line: str) -> Instruction:
    start = _INSTRUCTION.match(line)
    assert start
    rest = line[start.end() :]
    types = _closed(rest) if rest.startswith("(") else rest.index(" ")
    opcode, _, _ = rest[types + 1 :].partition("(")
    rest = (arrays := rest)[types + 1 + len(opcode) :]
    end = _closed(rest)
    return Instruction(
        name=start[2],
        opcode=opcode,
        arrays=tuple(
            Array(dtype, tuple(int(n) for n in shape.split(",") if n), layout)
            for dtype, shape, layout in _ARRAY.findall(arrays[:types])
        ),
        operands=tuple(re.findall(r"%([\w.\-]+)", rest[:end])),
        literal=rest[1 : end - 1],
        attributes=rest[end:],
        root=bool(start[1]),
    )


def _closed(text: str) -> int:
    """Return the length of the part in brackets at the start of the text."""
    depth = 0
    for end, character in enumerate(text, 1):
        depth += (character in "([{") - (character in ")]}")
        if not depth:
            return end
    raise AssertionError(f"brackets are not closed: {text[:200]}")
