"""What XLA's compiler for TPUs has assigned memory to, read from what it dumps before it generates code.

    XLA_FLAGS='--xla_dump_to=DIR --xla_dump_hlo_as_text' \
        python -m shampax.launch.plan --config=shampax/configs/lm.py:1b --topology=v5e:16x16
    python -m shampax.benchmarks.assigned_memory DIR

Prints JSON, bytes on a device: "arguments"; "alive", most that is alive at a time, in all memories of the device;
"laid_out", what is set aside of its main memory, with the gaps between arrays.
"""

import argparse
import json
import re
from collections.abc import Iterable
from pathlib import Path

_SMALL = 4_000  # bytes of arrays that are passed over: thousands of scalars


def assigned(folder: Path) -> dict[str, int]:
    """The figures of the one program whose dumps are in a folder."""
    spans = _spans(_read(folder, "live-range"))
    allocations: dict[int, tuple[int, str]] = {}
    arrays: dict[int, list[tuple[int, int, int, int]]] = {}
    number = 0
    for line in _read(folder, "buffer-assignment").splitlines():
        if found := re.match(r"allocation (\d+): size (\d+), ?(.*)", line):
            number = int(found[1])
            allocations[number] = int(found[2]), found[3]
        elif found := re.match(
            r" value: <\d+ (\S+?)(?:\{([\d,]*)\})?(?: \(phi\))? @\d+> \(size=(\d+),offset=(\d+)\)", line
        ):
            size, offset = int(found[3]), int(found[4])
            if "preallocated-temp" in allocations[number][1] and size >= _SMALL:
                arrays.setdefault(number, []).append((*spans[found[1], found[2] or ""], offset, offset + size))
    fixed = sum(size for size, kind in allocations.values() if not re.search("preallocated-temp|thread-local", kind))
    times = {begin for some in arrays.values() for begin, *_ in some}
    alive = max(
        sum(_union((low, high) for begin, end, low, high in some if begin <= time <= end) for some in arrays.values())
        for time in times
    )
    laid_out = re.search(r"Total bytes: (\d+)", _read(folder, "memory-usage-report"))
    assert laid_out, "the report begins with the main memory"
    return {
        "arguments": sum(size for size, kind in allocations.values() if kind.startswith("parameter")),
        "alive": fixed + alive,
        "laid_out": int(laid_out[1]),
    }


def _read(folder: Path, what: str) -> str:
    (path,) = folder.glob(f"*.after_optimizations-{what}.txt")
    return path.read_text()


def _spans(text: str) -> dict[tuple[str, str], tuple[int, int]]:
    """(instruction, index in its result) -> the first and the last instruction with which it is alive."""
    listed = text.split("BufferLiveRange:")[1].split("Live ranges at")[0]
    found = re.findall(r"^\s+(\S+?)\{([\d,]*)\}:(\d+)-(\d+)", listed, flags=re.MULTILINE)
    return {(name, index): (int(begin), int(end)) for name, index, begin, end in found}


def _union(intervals: Iterable[tuple[int, int]]) -> int:
    """Bytes that some intervals cover; arrays that share memory count once."""
    total = reached = 0
    for low, high in sorted(intervals):
        total += max(0, high - max(low, reached))
        reached = max(reached, high)
    return total


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    print(json.dumps(assigned(parser.parse_args().folder)))
