"""Malformed records of a source: skipped and counted up to a limit; past it the error names them by file and row."""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from ...base.errors import UserError

T = TypeVar("T")
_NAMED = 5  # as many as an error or a report can hold and still be read


@dataclasses.dataclass(frozen=True)
class Malformed:
    """What a reader gives in place of a record that it cannot use.

    Attributes:
      place: where it stands, "FILE, row N"; rows count from 1.
      reason: what is wrong with it, in a few words.
    """

    place: str
    reason: str

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}"


class Rejects:
    """The malformed records of one pass over a split.

    Args:
      limit: so many are skipped; `data.max_malformed`.
      count: how many there are already, as `to_json` says.
      first: the first few of them, likewise.
    """

    def __init__(self, limit: int, count: int = 0, first: Iterable[str] = ()):
        self.limit, self.count, self._first = limit, count, list(first)

    def sift(self, records: Iterable[T | Malformed]) -> Iterator[T]:
        """The usable records, in their order.

        Raises:
          UserError: more are malformed than the limit allows.
        """
        for record in records:
            if isinstance(record, Malformed):
                self._add(record)
            else:
                yield record

    def refuse_excess(self) -> None:
        """Raise UserError if there are more than the limit allows."""
        if self.count > self.limit:
            raise UserError(
                f"data.max_malformed is {self.limit}, and {self}; mend the data or skip them with a higher limit"
            )

    def after(self, others: "Rejects") -> "Rejects":
        """These and those of an earlier pass together."""
        return Rejects(self.limit, others.count + self.count, [*others._first, *self._first][:_NAMED])

    def to_json(self) -> dict[str, Any]:
        """As the keyword arguments that make the same again."""
        return {"count": self.count, "first": self._first}

    def __str__(self) -> str:
        """The count and the first few, in one line."""
        more = f"; and {self.count - len(self._first)} more" if self.count > len(self._first) else ""
        noun = "record is" if self.count == 1 else "records are"
        return f"{self.count:,} {noun} malformed ({'; '.join(self._first)}{more})"

    def _add(self, record: Malformed) -> None:
        self.count += 1
        if len(self._first) < _NAMED:
            self._first.append(str(record))
        self.refuse_excess()
