"""Malformed records of a source: skipped and counted up to a limit, and named by file and row in errors and reports."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

from ...base.errors import UserError

T = TypeVar("T")
_NAMED = 5  # malformed records that an error or a report names


@dataclasses.dataclass(frozen=True)
class Malformed:
    """A reader yields it in place of a record that it cannot use.

    Attributes:
      place: location of the record, "FILE, row N"; rows count from 1.
      reason: a few words, such as "not UTF-8 at byte 7".
    """

    place: str
    reason: str

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}"


class Rejects:
    """Counts the malformed records of one split.

    Args:
      limit: number of records that may be skipped; `data.max_malformed`.
      count: number of records counted so far.
      first: descriptions of the first few of them.
    """

    def __init__(self, limit: int, count: int = 0, first: Sequence[str] = ()):
        self.limit, self.count, self.first = limit, count, list(first)

    def sift(self, records: Iterable[T | Malformed]) -> Iterator[T]:
        """Yield the usable records in order.

        Raises:
          UserError: more records are malformed than the limit allows.
        """
        for record in records:
            if isinstance(record, Malformed):
                self.add(1, [str(record)])
                self.refuse_excess()
            else:
                yield record

    def add(self, count: int, first: Sequence[str]) -> None:
        """Count further records."""
        self.count += count
        self.first = [*self.first, *first][:_NAMED]

    def refuse_excess(self) -> None:
        """Raise UserError if more records are malformed than the limit allows."""
        if self.count > self.limit:
            raise UserError(
                f"data.max_malformed={self.limit}: {self}. Repair the data or raise the limit to skip them."
            )

    def to_json(self) -> dict[str, Any]:
        """Return the keyword arguments that restore the count."""
        return {"count": self.count, "first": self.first}

    def __str__(self) -> str:
        more = f"; and {self.count - len(self.first)} more" if self.count > len(self.first) else ""
        noun = "record is" if self.count == 1 else "records are"
        return f"{self.count:,} {noun} malformed ({'; '.join(self.first)}{more})"
