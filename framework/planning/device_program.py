"""The train step as each device runs it, before anything is compiled: its operations, with the shapes of one device.

JAX lowers the step with the shardings of its arguments. Shardy, the partitioner inside XLA, then decides where every
intermediate lies and which collectives that takes; it runs here by itself, in seconds, on any machine. What follows in
a real compilation, fusion and buffers, is estimated by `fusion` and `liveness`.
"""

import dataclasses
import functools
import io
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jax.extend.mlir import ir, passmanager

from . import flop_count

COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "reduce-scatter", "collective-permute")
_PASSES = (
    "builtin.module(sdy-propagation-pipeline,func.func(sdy-sharding-constraint-to-reshard,"
    "sdy-insert-explicit-reshards{enable-full-version=true},sdy-reshard-to-collectives))"
)
_BYTES = {"i1": 1, "i8": 1, "ui8": 1, "bf16": 2, "f16": 2, "i16": 2, "ui16": 2, "f32": 4, "i32": 4, "ui32": 4}


class Value:
    """An array of the program.

    Attributes:
      shape: on one device.
      dtype: as MLIR writes it ("f32", "bf16", "i1", ...).
      bytes: on one device, without the padding of a layout.
      held: with it.
    """

    __slots__ = ("bytes", "dtype", "held", "shape")

    def __init__(self, shape: tuple[int, ...], dtype: str):
        self.shape, self.dtype = shape, dtype
        itemsize = _BYTES.get(dtype, 8)
        self.bytes = math.prod(shape) * itemsize
        self.held = tiled(shape, itemsize)


@dataclasses.dataclass(eq=False)
class Operation:
    """One operation. Calls and `shard_map` are inlined.

    Attributes:
      kind: its name without the dialect, "dot_general" or "while"; of a collective one of COLLECTIVES.
      operands, results: what it reads and makes; what its bodies read from outside is no operand.
      bodies: of a loop its body, of a condition its branches.
      flops: of a product or convolution, 0 of others.
      passes: of bfloat16 that a product takes at its precision.
      group: devices that take part in a collective, or among which "all_slice" divides what each of them has.
      turns: of a loop; None where the data decide.
    """

    kind: str
    operands: tuple[Value, ...]
    results: tuple[Value, ...]
    bodies: tuple["Body", ...] = ()
    flops: float = 0.0
    passes: int = 1
    group: int = 1
    turns: int | None = None


@dataclasses.dataclass(eq=False)
class Body:
    """A sequence of operations.

    Attributes:
      arguments: what is given to it: what a loop carries, or the step's state and batch.
      operations: in the order of the trace.
      results: what it returns.
    """

    arguments: tuple[Value, ...]
    operations: list[Operation]
    results: tuple[Value, ...]


@functools.lru_cache(maxsize=10_000)
def tiled(shape: tuple[int, ...], itemsize: int) -> int:
    """Bytes of an array on a TPU: two of its dimensions lie in tiles of 8 x 128, those that take least padding."""
    least = math.prod(shape) * itemsize
    if len(shape) < 2 or not least:
        return least

    def rows(size: int) -> int:
        return 8 * math.ceil(size / 8) if size > 4 else 1 << (size - 1).bit_length()

    pairs = itertools.permutations(shape, 2)
    return min(least // (row * lane) * rows(row) * 128 * math.ceil(lane / 128) for row, lane in pairs)


def read(lowered: Any) -> Body:
    """The program of one device.

    Args:
      lowered: of `jax.jit(...).lower(...)`; it is left as it is.
    """
    module = lowered.compiler_ir("stablehlo")
    with module.context, ir.Location.unknown():
        written = io.BytesIO()
        module.operation.write_bytecode(written)
        copy = ir.Module.parse(written.getvalue())
        _spell_out_squares(copy)
        passmanager.PassManager.parse(_PASSES).run(copy.operation)
        body = _Reader(copy).program()
    _scatter_reductions(body)
    return body


def _spell_out_squares(module: Any) -> None:
    """Shardy has no rule for `chlo.square`: what is made of divided arrays by it would be whole on every device."""
    found: list[Any] = []

    def note(operation: Any) -> Any:
        if operation.name == "chlo.square":
            found.append(operation)
        return ir.WalkResult.ADVANCE

    module.operation.walk(note)
    for operation in found:
        factor = operation.operands[0]
        product = ir.Operation.create(
            "stablehlo.multiply",
            results=[operation.results[0].type],
            operands=[factor, factor],
            loc=operation.location,
            ip=ir.InsertionPoint(operation),
        )
        operation.results[0].replace_all_uses_with(product.results[0])
        operation.operation.erase()


def _scatter_reductions(body: Body) -> None:
    """A reduction of which devices keep parts is a reduce-scatter, and a reduction among those that keep the same part.

    The compiler makes these of the two; nobody holds the whole sum.
    """
    readers: dict[Value, list[Operation]] = {}
    for operation in body.operations:
        for inner in operation.bodies:
            _scatter_reductions(inner)
        for value in operation.operands:
            readers.setdefault(value, []).append(operation)
    made: list[Operation] = []
    replaced: set[Operation] = set()
    for operation in body.operations:
        by = readers.get(operation.results[0], []) if operation.results else []
        if operation in replaced:
            continue
        sliced = operation.kind == "all-reduce" and [x.kind for x in by] == ["all_slice"]
        if not sliced or operation.results[0] in body.results:
            made.append(operation)
            continue
        (part,), parts = by[0].results, by[0].group
        others = operation.group // parts
        scattered = Value(part.shape, part.dtype) if others > 1 else part
        made.append(dataclasses.replace(operation, kind="reduce-scatter", results=(scattered,), group=parts))
        if others > 1:
            made.append(Operation("all-reduce", (scattered,), (part,), group=others))
        replaced.add(by[0])
    body.operations[:] = made


class _Reader:
    """Turns a module with shardings into a Body. Equal operations on equal operands become one, as in any compiler."""

    def __init__(self, module: Any):
        self.functions: dict[str, Any] = {}
        self.mesh: dict[str, int] = {}
        for each in module.body.operations:
            operation = each.operation
            if operation.name == "sdy.mesh":
                pairs = re.findall(r'"([^"]+)"=(\d+)', str(operation.attributes["mesh"]))
                self.mesh = {name: int(size) for name, size in pairs}
            else:
                self.functions[ir.StringAttr(operation.attributes["sym_name"]).value] = operation

    def program(self) -> Body:
        main = self.functions["main"]
        block = main.regions[0].blocks[0]
        given: Any = main.attributes["arg_attrs"] if "arg_attrs" in main.attributes else [{}] * len(block.arguments)
        arguments = tuple(
            self._value(value, str(attributes["sdy.sharding"]) if "sdy.sharding" in attributes else "")
            for value, attributes in zip(block.arguments, given, strict=True)
        )
        operations: list[Operation] = []
        return Body(arguments, operations, self._block(block, arguments, {}, operations, {}))

    def _value(self, value: Any, sharding: str) -> Value:
        found = re.fullmatch(r"tensor<((?:\d+x)*)(.+)>", str(value.type))
        if not found:
            return Value((0,), str(value.type))
        shape = [int(size) for size in found[1].split("x") if size]
        if sharding:
            parts = _parts(sharding, tuple(self.mesh.items()))
            shape = [-(-size // part) for size, part in zip(shape, parts, strict=True)]
        return Value(tuple(shape), found[2])

    def _block(
        self,
        block: Any,
        arguments: Sequence[Value],
        outer: Mapping[Any, Value],
        operations: list[Operation],
        seen: dict[Any, tuple[Value, ...]],
    ) -> tuple[Value, ...]:
        """Append the operations of a block; returns what it returns. `seen` has those that have been appended."""
        known = dict(outer)
        known.update(zip(block.arguments, arguments, strict=True))
        for each in block.operations:
            operation = each.operation
            operands = tuple(known[value] for value in operation.operands)
            if operation.name.endswith(".return"):
                return operands
            results = self._operation(operation, operands, known, operations, seen)
            known.update(zip(operation.results, results, strict=True))
        raise AssertionError("a block that does not return")

    def _operation(
        self,
        operation: Any,
        operands: tuple[Value, ...],
        known: Mapping[Any, Value],
        operations: list[Operation],
        seen: dict[Any, tuple[Value, ...]],
    ) -> tuple[Value, ...]:
        name = operation.name
        if name == "func.call":
            callee = self.functions[ir.FlatSymbolRefAttr(operation.attributes["callee"]).value]
            return self._block(callee.regions[0].blocks[0], operands, {}, operations, seen)
        if name == "sdy.manual_computation":  # of all axes: inside, shapes are those of a device
            return self._block(operation.regions[0].blocks[0], operands, {}, operations, seen)
        shardings = _shardings(operation)
        made = tuple(
            self._value(value, shardings[i] if i < len(shardings) else "") for i, value in enumerate(operation.results)
        )
        kind = name.split(".")[1]
        if kind == "while":
            body = operation.regions[1].blocks[0]
            carried = tuple(Value(value.shape, value.dtype) for value in made)
            inner: list[Operation] = []
            returned = self._block(body, carried, known, inner, {})
            operations.append(
                Operation(kind, operands, made, (Body(carried, inner, returned),), turns=_turns(operation))
            )
            return made
        if kind in ("case", "if"):
            bodies = []
            for region in operation.regions:
                inner = []
                returned = self._block(region.blocks[0], (), known, inner, {})
                bodies.append(Body((), inner, returned))
            operations.append(Operation(kind, operands, made, tuple(bodies)))
            return made
        attributes = {name: str(operation.attributes[name]) for name in operation.attributes}
        key = (name, operands, tuple((value.shape, value.dtype) for value in made), tuple(attributes.items()))
        if key not in seen:
            seen[key] = made
            kind = kind.replace("_", "-") if kind.replace("_", "-") in COLLECTIVES else kind
            operations.append(
                Operation(
                    kind,
                    operands,
                    made,
                    flops=_flops(kind, attributes, operands, made),
                    passes=_passes(attributes, made),
                    group=self._group(attributes) if kind in COLLECTIVES or kind == "all_slice" else 1,
                )
            )
        return seen[key]

    def _group(self, attributes: Mapping[str, str]) -> int:
        if groups := attributes.get("replica_groups"):
            if found := re.search(r"tensor<\d+x(\d+)xi64>", groups):
                return int(found[1])
            # From JAX 0.12 on, of `shard_map`: #stablehlo.replica_group_mesh_axes<mesh = @mesh, axes = [...]>.
            assert "axis_ref" in groups and "sub_axis" not in groups, f"no replica groups are understood in {groups}"
            return _product_of_axes(groups, self.mesh)
        text = " ".join(value for name, value in attributes.items() if name.endswith("_axes") or name == "params")
        return max(1, _product_of_axes(text, self.mesh))


def _shardings(operation: Any) -> list[str]:
    attributes = operation.attributes
    if "out_sharding" in attributes:
        return [str(attributes["out_sharding"])]
    if "sdy.sharding" not in attributes:
        return []
    return re.findall(r"<@[^>]*>", str(attributes["sdy.sharding"]))


@functools.lru_cache(maxsize=10_000)
def _parts(sharding: str, mesh: tuple[tuple[str, int], ...]) -> tuple[int, ...]:
    """Into how many parts each dimension is cut."""
    dimensions = re.findall(r"\{([^}]*)\}", sharding[sharding.index("[") : sharding.index("]")])
    return tuple(_product_of_axes(each, dict(mesh)) for each in dimensions)


def _product_of_axes(text: str, mesh: Mapping[str, int]) -> int:
    """Of axes as `"data"`, or as `"data":(2)4`, which are 4 of its devices."""
    found = re.findall(r'"([^"]+)"(?::\(\d+\)(\d+))?', text)
    return math.prod(int(part) if part else mesh[name] for name, part in found)


def _turns(operation: Any) -> int | None:
    """Of a loop that counts up to a constant from zero, as `lax.scan` makes; None of others."""
    condition = operation.regions[0].blocks[0]
    listed = [each.operation for each in condition.operations]
    if len(listed) > 4 or listed[-2].name != "stablehlo.compare":
        return None
    constants = [str(each.attributes["value"]) for each in listed if "value" in each.attributes]
    found = re.fullmatch(r"dense<(\d+)> : tensor<i32>", constants[0]) if len(constants) == 1 else None
    return int(found[1]) if found else None


def _passes(attributes: Mapping[str, str], made: Sequence[Value]) -> int:
    """As `jax.lax.Precision` has them on a TPU."""
    if made[0].dtype != "f32":
        return 1
    precision = attributes.get("precision_config", "")
    return 6 if "HIGHEST" in precision else 3 if "HIGH" in precision else 1


def _flops(kind: str, attributes: Mapping[str, str], operands: Sequence[Value], made: Sequence[Value]) -> float:
    if kind == "dot_general":
        found = re.search(r"lhs_contracting_dimensions = \[([\d, ]*)\]", attributes["dot_dimension_numbers"])
        contracted = [int(axis) for axis in found[1].split(",")] if found else []
        return 2.0 * math.prod(made[0].shape) * math.prod(operands[0].shape[axis] for axis in contracted)
    if kind == "convolution":
        return _convolution(attributes, operands[0].shape, operands[1].shape, made[0].shape)
    return 0.0


def _convolution(
    attributes: Mapping[str, str], inputs: Sequence[int], kernel: Sequence[int], out: Sequence[int]
) -> float:
    found = re.search(r"\[([^\]]*)\]x\[([^\]]*)\]->\[([^\]]*)\]", attributes["dimension_numbers"])
    assert found, attributes["dimension_numbers"]
    axes = [[axis.strip() for axis in found[part].split(",")] for part in (1, 2, 3)]
    places = sorted(axis for axis in axes[0] if axis.isdigit())
    count = len(places)

    def numbers(name: str, default: int, size: int) -> list[int]:
        """What is in "array<i64: 2, 2>", "dense<[[1, 1], [0, 0]]> : ..." or "dense<1> : ...", which stands for all."""
        text = re.sub(r":\s*tensor.*|i64", "", attributes.get(name, ""))
        values = [int(each) for each in re.findall(r"-?\d+", text)] or [default]
        return values if len(values) == size else values * size

    columns = zip(
        *(
            [shape[names.index(place)] for place in places]
            for shape, names in zip((inputs, kernel, out), axes, strict=True)
        ),
        numbers("window_strides", 1, count),
        numbers("padding", 0, 2 * count)[::2],
        numbers("lhs_dilation", 1, count),
        numbers("rhs_dilation", 1, count),
        strict=True,
    )
    others = out[axes[2].index("b")] * out[axes[2].index("f")] * kernel[axes[1].index("i")]
    return flop_count.convolution(others, (flop_count.Window(*each) for each in columns))
