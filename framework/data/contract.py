"""The contract between the trainer and a data set: what the config's `data` section names, a frozen dataclass.

A data set may also have `fingerprint(cache)`; `fingerprint` here gives the answer for those that have none.
"""

from pathlib import Path
from typing import Protocol, runtime_checkable

from .documents import Split
from .pipeline import Source


class Data(Protocol):
    """What a data set must offer to be trained on."""

    @property
    def tokens_per_example(self) -> int:
        """Tokens (or what else is counted) that an example trains on."""
        ...

    def prepare(self, cache: Path) -> None:
        """Put into `cache`, the run's own folder, what `examples` needs; one process calls it, before any reads.

        Raises:
          UserError: the data cannot be used.
        """
        ...

    def examples(self, split: Split, cache: Path) -> Source:
        """Random access to the examples of a split."""
        ...


@runtime_checkable
class _Fingerprinted(Protocol):
    def fingerprint(self, cache: Path) -> str: ...


def fingerprint(data: Data, cache: Path) -> str:
    """Text that differs where the examples do, and not where they only lie elsewhere or were made anew.

    A run that resumes can tell by it whether its data are still the same. "" for a data set that does not say.

    Args:
      data: after `prepare`.
      cache: what it was prepared in.
    """
    return data.fingerprint(cache) if isinstance(data, _Fingerprinted) else ""
