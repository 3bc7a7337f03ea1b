"""Judge a compiled program: the least time that each device needs for it, by class of work.

An instruction takes the longer of its FLOPs at the peak of their precision and its bytes at the bandwidth of the main
memory. Bytes are those that it must read and write: arrays that the compiler keeps in faster memory are free, and of a
stack of which it reads or writes a slice, the slice counts. Collectives take the bytes that a device must send.
Nothing overlaps. Loops count at every turn, kernels by formulas of the task.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...optimizers.plan import patterns
from ..sharding.chips import Chip
from . import collectives, hlo

# (name, operands, results) -> (FLOPs, bytes of the main memory) of a kernel, None if it is not known.
KernelCost = Callable[[str, Sequence[Any], Sequence[Any]], tuple[float, float] | None]
# (regex over JAX's names of operations, class), first match wins
_CLASSES = (
    (r".*(attention|splash|fmha).*", "attention"),
    (r".*(mlp|moe|experts?\b).*", "MLP"),
    (r".*(head|logits|logsumexp|ve->|embed|vocabulary|take_along_axis|_take\b).*", "embedding, head and loss"),
    (r".*jvp.*", "other"),
    (r".*train_step.*", "optimizer"),
    (r".*", "other"),
)
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota", "partition-id"),
    *("replica-id", "opt-barrier", "optimization-barrier", "add-dependency", "get-dimension-size", "domain", "infeed"),
    *("outfeed", "send", "recv"),
}
_FREE_CALLS = re.compile(r'custom_call_target="(AllocateBuffer|Sharding|SPMD\w+|AssumeGatherIndicesInBound)"')
_SLICES = ("slice", "dynamic-slice", "gather")
_MOST_TAPS = 10**7
_NAMED = ("int8", "int16", "int32", "uint8", "uint16", "uint32", "float16", "bfloat16", "float32", "float64")


@dataclasses.dataclass(frozen=True)
class Part:
    """Work of one class on each device in a run of a program.

    Attributes:
      seconds: least time; 0 if the device is not known.
      product_seconds: the part of it in which FLOPs are at their peak.
      flops: FLOPs of products.
      bytes: bytes read and written in the main memory.
    """

    seconds: float = 0.0
    product_seconds: float = 0.0
    flops: float = 0.0
    bytes: float = 0.0


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Collectives of one kind on each device in a run of a program.

    Attributes:
      count: number of collectives.
      bytes: size of their results.
      sent: bytes that a device must send.
      crossing: bytes of `sent` that leave its slice or node.
      seconds: least time; 0 if the device is not known.
    """

    count: float = 0.0
    bytes: float = 0.0
    sent: float = 0.0
    crossing: float = 0.0
    seconds: float = 0.0


def _plus(first: Any, second: Any, times: float) -> Any:
    return type(first)(
        *(getattr(first, field.name) + times * getattr(second, field.name) for field in dataclasses.fields(first))
    )


@dataclasses.dataclass
class Work:
    """Work of a program on each device.

    Attributes:
      parts: class of work -> its figures.
      traffic: kind of collective -> its figures.
      assumed: what the figures assume because the program does not tell it.
    """

    parts: dict[str, Part] = dataclasses.field(default_factory=dict)
    traffic: dict[str, Traffic] = dataclasses.field(default_factory=dict)
    assumed: dict[str, None] = dataclasses.field(default_factory=dict)  # ordered, each once

    @property
    def seconds(self) -> float:
        """Least time for everything but collectives."""
        return sum(part.seconds for part in self.parts.values())

    @property
    def network_seconds(self) -> float:
        """Least time for the collectives."""
        return sum(each.seconds for each in self.traffic.values())

    @property
    def flops(self) -> float:
        """FLOPs of all products."""
        return sum(part.flops for part in self.parts.values())

    def add(self, other: "Work", times: float = 1.0) -> None:
        """Add `times` other work."""
        for mine, theirs in ((self.parts, other.parts), (self.traffic, other.traffic)):
            for name, figures in theirs.items():
                mine[name] = _plus(mine.get(name, type(figures)()), figures, times)
        self.assumed |= other.assumed


def judge(
    text: str, chip: Chip | None, *, tpu: bool = False, kernel: KernelCost | None = None, islands: Sequence[int] = ()
) -> Work:
    """Return the work of a compiled program.

    Args:
      text: the program, as `jax.stages.Compiled.as_text()` returns it.
      chip: figures of the device, None if they are not known; all times are then 0.
      tpu: whether it is a TPU, which multiplies float32 in passes of bfloat16.
      kernel: formulas of the kernels.
      islands: number of the slice or node of each device of the mesh; empty for a single one.
    """
    module = hlo.parse(text)
    return _Walk(module, chip, tpu, kernel or (lambda *_: None), islands).of(module.entry)


class _Walk:
    def __init__(self, module: hlo.Module, chip: Chip | None, tpu: bool, kernel: KernelCost, islands: Sequence[int]):
        self._module, self._chip, self._tpu, self._kernel, self._islands = module, chip, tpu, kernel, islands
        self._known: dict[str, Work] = {}
        self._chains: set[tuple[str, ...]] = set()

    def of(self, name: str) -> Work:
        """Return the work of a computation."""
        if name not in self._known:
            total = Work()
            for instruction in self._module.computations[name].values():
                self._add(total, instruction, name)
            self._known[name] = total
        return self._known[name]

    def _add(self, total: Work, instruction: hlo.Instruction, name: str) -> None:
        opcode = instruction.opcode
        if found := collectives.of_instruction(self._module, instruction, self._islands):
            self._add_collective(total, instruction, found)
        elif opcode == "while":
            turns = trips(self._module, instruction, self._module.computations[name])
            if turns is None and (turns := frequency_of(instruction.scope)) == 1:
                total.assumed["loops whose turns the program does not tell run once"] = None
            total.add(self.of(instruction.called("body")[0]), turns)
        elif opcode == "conditional":
            self._add_branches(total, instruction)
        elif opcode in ("call", "async-start"):
            for called in instruction.called("to_apply", "calls"):
                total.add(self.of(called))
        elif opcode not in _FREE and not opcode.endswith(("-done", "-update")):
            self._add_work(total, instruction, self._module.computations[name])

    def _add_collective(self, total: Work, instruction: hlo.Instruction, found: collectives.Collective) -> None:
        if not collectives.begins(instruction, self._chains):
            return
        seconds = 0.0
        if self._chip:
            seconds = (found.sent - found.crossing) / self._chip.links + found.crossing / self._chip.network
        total.add(Work(traffic={found.kind: Traffic(1.0, found.bytes, found.sent, found.crossing, seconds)}))

    def _add_branches(self, total: Work, instruction: hlo.Instruction) -> None:
        branches = [
            self.of(name) for name in instruction.called("branch_computations", "true_computation", "false_computation")
        ]
        branches.sort(key=lambda each: (each.seconds, each.flops, sum(part.bytes for part in each.parts.values())))
        often, rarely = branches[0], branches[-1]
        frequency = frequency_of(instruction.scope)
        total.add(rarely, frequency)
        total.add(often, 1 - frequency)

    def _add_work(self, total: Work, instruction: hlo.Instruction, computation: hlo.Computation) -> None:
        scope, flops, product_seconds = instruction.scope, 0.0, 0.0
        if instruction.opcode == "custom-call":
            if _FREE_CALLS.search(instruction.attributes):
                return
            flops, size = self._of_kernel(total, instruction, computation)
            product_seconds = flops / self._chip.flops if self._chip else 0.0
        else:
            size = traffic_of(self._module, instruction, computation)
            products = list(products_of(self._module, instruction, computation))
            for product, inside in products:
                count = flops_of(product, inside)
                flops += count
                product_seconds += count / self._peak(product, inside) if self._chip else 0.0
            if instruction.opcode == "fusion":
                inner = self._module.fused(instruction)
                for each in inner.values():
                    if found := collectives.of_instruction(self._module, each, self._islands):
                        self._add_collective(total, each, found)
                scopes = [each.scope for each, _ in products] + [each.scope for each in inner.values() if each.root]
                scope = scope or next(filter(None, scopes), "")
        seconds = max(product_seconds, size / self._chip.bandwidth) if self._chip else 0.0
        part = Part(seconds, product_seconds, flops, size)
        total.add(Work(parts={patterns.first_match(_CLASSES, scope): part}))

    def _of_kernel(
        self, total: Work, instruction: hlo.Instruction, computation: hlo.Computation
    ) -> tuple[float, float]:
        target = re.search(r'custom_call_target="([^"]*)"', instruction.attributes)
        name = f"{target[1] if target else ''} {instruction.scope} {instruction.name}"
        operands = [array for operand in instruction.operands for array in computation[operand].arrays]
        size = traffic_of(self._module, instruction, computation)
        if found := self._kernel(name, [_struct(x) for x in operands], [_struct(x) for x in instruction.arrays]):
            return found[0], max(size, found[1])
        if estimate := re.search(r'"cost_estimate":\{([^}]*)\}', instruction.attributes):
            figures = dict(re.findall(r'"(\w+)":"?(\d+)', estimate[1]))
            return float(figures.get("flops", 0)), max(size, float(figures.get("bytes_accessed", 0)))
        if contracted := re.search(r'"lhs_contracting_dimensions":\["?(\d+)', instruction.attributes):  # of cuBLAS
            return 2.0 * math.prod(instruction.arrays[0].shape) * operands[0].shape[int(contracted[1])], size
        if target and target[1].startswith(("tpu_custom_call", "__")):
            total.assumed[f"the kernel {target[1]} ({instruction.name}) has no FLOPs"] = None
        return 0.0, size

    def _peak(self, product: hlo.Instruction, computation: hlo.Computation) -> float:
        """Return the FLOP/s of the device for a product in its precision."""
        assert self._chip
        if all(
            computation[name].arrays[0].bytes <= 2 * math.prod(computation[name].arrays[0].shape)
            for name in product.operands[:2]
        ):
            return self._chip.flops
        if algorithm := re.search(r"algorithm=dot_bf16_bf16_f32_x(\d)", product.attributes):
            return self._chip.flops / int(algorithm[1])
        if "algorithm=dot_bf16" in product.attributes:
            return self._chip.flops
        if "algorithm=dot_tf32" in product.attributes:
            return self._chip.flops / 2
        precision = product.attribute("operand_precision")
        if "highest" in precision or "f64" in {computation[name].arrays[0].dtype for name in product.operands[:2]}:
            return self._chip.float32
        if self._tpu:
            return self._chip.flops / (3 if "high" in precision else 1)
        return self._chip.flops / 2  # TF32


def frequency_of(scope: str) -> float:
    """Return how often a condition takes its costlier branch, or a loop of unknown turns runs, by the scope around it.

    `jax.named_scope("5_in_50")` stands around the condition of work that 5 of 50 steps do, "rarely" around that
    of work that a run hardly ever does. Any other condition counts as always.
    """
    if found := re.search(r"(?:^|/)(?:(\d+)_in_(\d+)|rarely)/[^/]*$", scope):
        return int(found[1]) / int(found[2]) if found[1] else 0.0
    return 1.0


def trips(module: hlo.Module, loop: hlo.Instruction, computation: hlo.Computation) -> int | None:
    """Return the number of turns of a loop, None if the program does not tell it."""
    if found := re.search(r"known_trip_count\D*(\d+)", loop.attributes):
        return int(found[1])
    condition = module.computations[loop.called("condition")[0]]
    test = next(each for each in condition.values() if each.root)
    sides = [condition[name] for name in test.operands]
    if test.opcode == "fusion":
        test, given = next(each for each in module.fused(test).values() if each.root), sides
        sides = []
        for name in test.operands:
            inner = module.fused(next(each for each in condition.values() if each.root))[name]
            sides.append(given[int(inner.literal)] if inner.opcode == "parameter" else inner)
    if test.opcode != "compare" or "direction=LT" not in test.attributes or len(sides) != 2:
        return None
    counter, limit = sides
    if limit.opcode != "constant" or counter.opcode != "get-tuple-element":
        return None
    start = 0
    number = int(re.search(r"index=(\d+)", counter.attributes)[1])  # type: ignore
    given = computation[loop.operands[0]]
    if given.opcode == "tuple" and computation[given.operands[number]].opcode == "constant":
        start = int(computation[given.operands[number]].literal)
    return max(0, int(limit.literal) - start)


def products_of(module: hlo.Module, instruction: hlo.Instruction, computation: hlo.Computation):
    """Yield (instruction, its computation) for each product of an instruction, also inside fusions."""
    if instruction.opcode in ("dot", "convolution"):
        yield instruction, computation
    elif instruction.opcode == "fusion":
        fused = module.fused(instruction)
        for each in fused.values():
            yield from products_of(module, each, fused)


def flops_of(product: hlo.Instruction, computation: hlo.Computation) -> float:
    """Return the FLOPs of a dot or a convolution: two for each pair of numbers that are multiplied."""
    left, right = (computation[name].arrays[0].shape for name in product.operands[:2])
    result = product.arrays[0].shape
    if product.opcode == "dot":
        contracted = [int(n) for n in product.attribute("lhs_contracting_dims").split(",") if n]
        return 2.0 * math.prod(result) * math.prod(left[axis] for axis in contracted)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", product.attributes)
    assert labels, product.attributes[:300]
    of_left, of_right, of_result = labels.groups()
    pairs = float(result[of_result.index("b")] * result[of_result.index("f")] * right[of_right.index("i")])
    window = _window(product.attribute("window"))
    for axis in filter(str.isdigit, of_right):
        lengths = left[of_left.index(axis)], right[of_right.index(axis)], result[of_result.index(axis)]
        how: list[Any] = [values[int(axis)] for values in window.values()] if window else [1, 1, 1, (0, 0)]
        pairs *= _taps(*lengths, *how)
    return 2.0 * pairs


def _window(text: str) -> dict[str, list[Any]]:
    """Return stride, dilations and padding of a convolution for each axis; {} for one without axes."""
    given = dict(each.split("=") for each in text.split())
    if "size" not in given:
        return {}
    axes = given["size"].count("x") + 1
    found: dict[str, list[Any]] = {
        key: [int(n) for n in given[key].split("x")] if key in given else [1] * axes
        for key in ("stride", "lhs_dilate", "rhs_dilate")
    }
    pads = given.get("pad", "x".join(["0_0"] * axes)).split("x")
    return found | {"pad": [tuple(int(n) for n in pad.split("_")) for pad in pads]}


def _taps(length: int, taps: int, results: int, stride: int, spread: int, apart: int, pad: tuple[int, int]) -> int:
    """Return how many numbers of an axis are multiplied, of all `results` together: not padding, not gaps.

    Compilers write batches of products as axes of a convolution with large padding or gaps.
    """
    if taps * results > _MOST_TAPS:
        return taps * results
    places = np.arange(results)[:, None] * stride + np.arange(taps) * apart - pad[0]
    return int(np.count_nonzero((places >= 0) & (places <= (length - 1) * spread) & (places % spread == 0)))


def traffic_of(module: hlo.Module, instruction: hlo.Instruction, computation: hlo.Computation) -> float:
    """Return the bytes of the main memory that an instruction must read and write."""
    operands = [computation[name] for name in instruction.operands]
    if instruction.opcode.endswith("-start"):  # copies between memories: (destination, source, ...)
        source, target = operands[0].arrays[0], instruction.arrays[0]
        size = min(source.bytes, target.bytes)
        return size * bool(source.hbm_bytes) + size * bool(target.hbm_bytes)
    if instruction.opcode == "fusion":
        fused = module.fused(instruction)
        read = sum(
            _read(module, fused, _parameter(fused, number))
            for number, operand in enumerate(operands)
            if len(operand.arrays) == 1 and operand.arrays[0].hbm_bytes
        )
        written = _written(module, fused)
        return read + sum(
            min(size, array.bytes) for size, array in zip(written, instruction.arrays, strict=True) if array.hbm_bytes
        )
    if instruction.opcode == "dynamic-update-slice":
        size = operands[1].bytes
        return size * (bool(operands[1].arrays[0].hbm_bytes) + bool(instruction.arrays[0].hbm_bytes))
    if instruction.opcode in _SLICES:
        return instruction.bytes * bool(operands[0].arrays[0].hbm_bytes) + _hbm_bytes(instruction)
    return sum(_hbm_bytes(operand) for operand in operands if len(operand.arrays) == 1) + _hbm_bytes(instruction)


def _hbm_bytes(instruction: hlo.Instruction) -> float:
    return sum(array.hbm_bytes for array in instruction.arrays)


def _parameter(fused: hlo.Computation, number: int) -> hlo.Instruction:
    return next(each for each in fused.values() if each.opcode == "parameter" and each.literal == str(number))


def _read(module: hlo.Module, fused: hlo.Computation, given: hlo.Instruction) -> float:
    """Return the bytes that a fused computation reads of a value: all, unless all its users take slices."""
    total = 0.0
    for user in (each for each in fused.values() if given.name in each.operands):
        first = user.operands[0] == given.name
        if user.opcode in _SLICES and first:
            total += user.bytes
        elif user.opcode == "dynamic-update-slice" and first:
            pass
        elif user.opcode == "bitcast":
            total += _read(module, fused, user)
        elif user.opcode == "fusion":
            inner = module.fused(user)
            total += sum(
                _read(module, inner, _parameter(inner, number))
                for number, name in enumerate(user.operands)
                if name == given.name
            )
        else:
            return given.bytes
    return min(total, given.bytes)


def _written(module: hlo.Module, fused: hlo.Computation) -> list[float]:
    """Return the bytes that a fused computation writes to each of its results."""
    root = next(each for each in fused.values() if each.root)
    if root.opcode == "tuple":
        return [size for name in root.operands for size in _bytes_written(module, fused, fused[name])]
    return _bytes_written(module, fused, root)


def _bytes_written(module: hlo.Module, fused: hlo.Computation, result: hlo.Instruction) -> list[float]:
    if result.opcode == "dynamic-update-slice":
        return [fused[result.operands[1]].bytes]
    if result.opcode == "fusion":
        return _written(module, module.fused(result))
    if result.opcode == "bitcast":
        inner = fused[result.operands[0]]
        if inner.opcode in ("dynamic-update-slice", "bitcast"):
            return _bytes_written(module, fused, inner)
    return [array.bytes for array in result.arrays]


def _struct(array: hlo.Array) -> jax.ShapeDtypeStruct:
    names = {"pred": "bool", "f16": "float16", "f32": "float32", "f64": "float64", "bf16": "bfloat16"}
    integers = {
        f"{sign}{bits}": f"{kind}{bits}" for sign, kind in (("s", "int"), ("u", "uint")) for bits in (8, 16, 32)
    }
    name = (names | integers).get(array.dtype)
    return jax.ShapeDtypeStruct(array.shape, jnp.dtype(name or "int8"))
