"""Peak memory of a program that nobody has compiled: what is alive when most is.

The model of a compiler, one for all programs and fitted to none:

- Elementwise work, slices and changes of shape are fused into what reads them and take no memory, unless several
  operations read the result and it is smaller than what it is made from. Products, reductions, collectives, gathers and
  scatters write their results; a product that is only converted afterwards writes the converted one, and elementwise
  work that is only widened afterwards the narrow one.
- What a scatter adds is laid out row by row first, whatever the shape it had.
- An update of a slice, a scatter, fused work and what a loop carries go over what is read for the last time.
- The new state is written over the old one.
- Parameters that a loop reads by slices and converts to a narrower type are converted once, all layers together, before
  the outermost loop around it.
- Operations run in the order of the trace, and a value lives from the one that makes it to the last that reads it. The
  body of a loop adds its own peak to what is alive around it.
"""

import math
from collections.abc import Iterable, Mapping

from .device_program import COLLECTIVES, Body, Operation, Value

# Fused into what reads them; all others write what they make.
_ELEMENTWISE = """
    abs acos acosh add all_slice and asin asinh atan atan2 atanh bitcast_convert broadcast_in_dim cbrt ceil clamp
    compare complex constant convert cos cosh cosine count_leading_zeros digamma divide dynamic_slice erf erf_inv
    erfc exponential exponential_minus_one floor imag iota is_finite is_inf lgamma log log_plus_one logistic
    maximum minimum multiply negate next_after not optimization_barrier or pad partition_id popcnt power real
    remainder replica_id reshape reverse round_nearest_afz round_nearest_even rsqrt select shift_left
    shift_right_arithmetic shift_right_logical sign sine sinh slice sqrt square subtract tan tanh transpose xor
"""
FUSED = frozenset(_ELEMENTWISE.split())
# Written over their first operand, where nobody reads that any more.
_IN_PLACE = ("dynamic_update_slice", "scatter")
# What several operations read is made anew for each of them unless what it is made from is larger than it by this much:
# a row's mean or maximum, which normalisations and softmaxes read besides, costs nothing.
_SMALL = 1.25


# Nothing is fused into these, so that what they read is written; what only has another shape is there already.
_APART = frozenset((*COLLECTIVES, "while", "scatter", "sort", "custom_call"))
_RESHAPED = ("reshape", "transpose", "optimization_barrier")


class Fusion:
    """Which values of a body are written to memory.

    Attributes:
      sources: value -> the written values that it is made from; itself, if it is written.

    Args:
      body: to be analysed.
      outer: the same of what is made around the body.
    """

    def __init__(self, body: Body, outer: Mapping[Value, frozenset[Value]]):
        self.sources: dict[Value, frozenset[Value]] = dict(outer)
        for value in body.arguments:
            self.sources[value] = frozenset((value,))
        readers, apart = _readers(body), _read_apart(body)
        for operation in body.operations:
            self._place(operation, readers, apart)

    def _place(self, operation: Operation, readers: Mapping[Value, frozenset[int]], apart: frozenset[Value]) -> None:
        if operation.kind == "optimization_barrier":
            for operand, result in zip(operation.operands, operation.results, strict=True):
                self.sources[result] = self.sources[operand]
        elif operation.kind == "while":
            (inner,) = operation.bodies
            carried = zip(operation.operands, operation.results, inner.arguments, inner.results, strict=True)
            for operand, result, before, after in carried:
                self.sources[result] = self.sources[operand] if before is after else frozenset((result,))
        elif operation.kind in FUSED:
            (value,) = operation.results
            made_from = self.of(operation.operands)
            cheap = sum(each.bytes for each in made_from) <= _SMALL * value.bytes and not (made_from and value in apart)
            alone = len(readers.get(value, ())) <= 1 and value not in apart
            self.sources[value] = made_from if cheap or alone else frozenset((value,))
        else:
            self.sources.update((value, frozenset((value,))) for value in operation.results)

    def of(self, values: Iterable[Value]) -> frozenset[Value]:
        """The written values that some values are made from."""
        return frozenset().union(*(self.sources[value] for value in values))

    def written(self, operation: Operation) -> list[Value]:
        """Those of an operation's results that are written to memory."""
        return [value for value in operation.results if self.sources[value] == {value}]


def peak(body: Body, outer: Mapping[Value, frozenset[Value]] | None = None) -> int:
    """Bytes that a body needs at most besides its arguments, which are there already.

    Args:
      body: a step, or what is inside of an operation.
      outer: of `Fusion`.
    """
    fusion = Fusion(body, outer or {})
    dying = _dying(body, fusion)
    narrowed = _narrowed(body)
    returned, given = set(body.results), set(body.arguments)
    alive: dict[Value, int] = {}
    begun, ended = _converted_ahead(body)
    total = highest = 0
    for number, operation in enumerate(body.operations):
        total += begun[number]
        inside = max((peak(inner, fusion.sources) for inner in operation.bodies), default=0)
        highest = max(highest, total + _laid_out_anew(operation))
        new = {value: narrowed.get(value, value.held) for value in fusion.written(operation)}
        overwritten = fusion.of(_overwritten(operation)) & set(dying[number])
        room = sum(alive.get(value, 0) for value in overwritten)
        if operation.kind in _IN_PLACE and fusion.of(operation.operands[:1]) & given:
            new = dict.fromkeys(new, 0)
        if operation.kind != "while":
            new = {value: 0 if value in returned else size for value, size in new.items()}
        highest = max(highest, total + max(0, sum(new.values()) - room) + inside)
        alive |= new
        total += sum(new.values()) - sum(alive.pop(value, 0) for value in dying[number]) - ended[number]
    return highest


def _overwritten(operation: Operation) -> tuple[Value, ...]:
    """What an operation may write its results over."""
    if operation.kind == "while":
        (inner,) = operation.bodies
        pairs = zip(operation.operands, inner.arguments, inner.results, strict=True)
        return tuple(operand for operand, before, after in pairs if before is not after)
    if operation.kind in _IN_PLACE:
        return operation.operands[:1]
    return operation.operands if operation.kind in FUSED else ()


def _laid_out_anew(operation: Operation) -> int:
    """Bytes of a scatter's updates in tiles of 8 rows, where these are padded: the 26 of [65536, 26, 128] take 32."""
    if operation.kind != "scatter":
        return 0
    shape = operation.operands[-1].shape
    rows = shape[-2] if len(shape) > 2 else 8
    return operation.operands[-1].bytes // rows * 8 * math.ceil(rows / 8) if rows % 8 else 0


def _dying(body: Body, fusion: Fusion) -> list[list[Value]]:
    """For each operation the written values that nobody reads after it."""
    last: dict[Value, int] = {}
    for number, operation in enumerate(body.operations):
        written = fusion.written(operation)
        if written or operation.kind == "while":
            inside = (value for inner in operation.bodies for value in _from_outside(inner))
            last.update(dict.fromkeys(fusion.of((*operation.operands, *inside)), number))
            for value in written:
                last.setdefault(value, number)
    for value in fusion.of(body.results):
        last[value] = len(body.operations)
    dying: list[list[Value]] = [[] for _ in range(len(body.operations) + 1)]
    for value, number in last.items():
        dying[number].append(value)
    return dying


def _readers(body: Body) -> dict[Value, frozenset[int]]:
    """Which operations that write something read each value, themselves or through what is fused into them."""
    readers: dict[Value, frozenset[int]] = dict.fromkeys(body.results, frozenset((len(body.operations),)))
    for number in range(len(body.operations) - 1, -1, -1):
        operation = body.operations[number]
        by = frozenset((number,))
        if operation.kind in FUSED:
            through = frozenset().union(*(readers.get(value, frozenset()) for value in operation.results))
            by = through if len(through) <= 1 or _widens(operation) else by
        inside = (value for inner in operation.bodies for value in _from_outside(inner))
        for value in (*operation.operands, *inside):
            readers[value] = readers.get(value, frozenset()) | by
    return readers


def _widens(operation: Operation) -> bool:
    """Whether it only converts to a wider type, which nobody writes: the narrow one is."""
    return operation.kind == "convert" and operation.results[0].bytes > sum(x.bytes for x in operation.operands)


def _converted_ahead(body: Body) -> tuple[list[int], list[int]]:
    """Bytes of converted stacks that begin to be alive with each operation, and of those that end with it.

    What the body itself is given and leaves as it is was converted around it.
    """
    spans: dict[Value, tuple[int, int, int]] = {}
    unchanged = set(_unchanged(body))
    for number, operation in enumerate(body.operations):
        if operation.kind == "while":
            (inner,) = operation.bodies
            narrow = _narrow_stacks(inner)
            for operand, argument in zip(operation.operands, inner.arguments, strict=True):
                if argument in narrow and operand not in unchanged:
                    first, _, _ = spans.get(operand, (number, 0, 0))
                    spans[operand] = first, number, narrow[argument]
    begun, ended = ([0] * len(body.operations) for _ in range(2))
    for first, last, size in spans.values():
        begun[first] += size
        ended[last] += size
    return begun, ended


def _unchanged(body: Body) -> list[Value]:
    """What a loop carries and does not write."""
    return [before for before, after in zip(body.arguments, body.results, strict=False) if before is after]


def _narrow_stacks(loop: Body) -> dict[Value, int]:
    """What a loop leaves as it is and reads by slices alone, to convert them to one narrower type, itself or in a loop
    inside of it; and its bytes in that type.
    """
    readers: dict[Value, list[tuple[Operation, int]]] = {}
    for operation in loop.operations:
        for place, value in enumerate(operation.operands):
            readers.setdefault(value, []).append((operation, place))

    def widths(value: Value) -> set[int]:
        """Bits of a byte that are left of it, by each reader; 0 of one that reads it as it is."""
        found: set[int] = set()
        for operation, place in readers.get(value, ()):
            if operation.kind in ("dynamic_slice", "reshape", "transpose") and place == 0:
                found |= widths(operation.results[0])
            elif operation.kind == "convert" and operation.results[0].bytes < value.bytes:
                found.add(8 * operation.results[0].bytes // value.bytes)
            elif operation.kind == "while":
                (inner,) = operation.bodies
                argument = inner.arguments[place]
                found.add(8 * _narrow_stacks(inner).get(argument, 0) // max(1, argument.held))
            else:
                found.add(0)
        return found

    stacks = {value: widths(value) for value in _unchanged(loop)}
    return {value: value.held * min(bits) // 8 for value, bits in stacks.items() if len(bits) == 1 and 0 not in bits}


def _read_apart(body: Body) -> frozenset[Value]:
    """What elementwise work makes for operations that nothing is fused into, and that do not write over it."""
    makers = {value: operation for operation in body.operations for value in operation.results}
    found = set()
    for operation in body.operations:
        if operation.kind in _APART:
            for value in set(operation.operands) - set(_overwritten(operation)):
                while value in makers and makers[value].kind in _RESHAPED:
                    value = makers[value].operands[makers[value].results.index(value)]
                found.add(value)
    return frozenset(found)


def _from_outside(body: Body) -> set[Value]:
    """What a body reads that it is neither given nor makes."""
    known, needed = set(body.arguments), set()
    for operation in body.operations:
        needed.update(value for value in operation.operands if value not in known)
        for inner in operation.bodies:
            needed |= _from_outside(inner) - known
        known.update(operation.results)
    return needed | (set(body.results) - known)


def _narrowed(body: Body) -> dict[Value, int]:
    """Products whose results are only converted, and the bytes of the converted ones."""
    readers: dict[Value, list[Operation]] = {}
    for operation in body.operations:
        for value in operation.operands:
            readers.setdefault(value, []).append(operation)
    found = {}
    for operation in body.operations:
        if operation.kind in ("dot_general", "convolution"):
            (value,) = operation.results
            by = readers.get(value, [])
            if len(by) == 1 and by[0].kind == "convert":
                found[value] = min(value.held, by[0].results[0].held)
    return found
