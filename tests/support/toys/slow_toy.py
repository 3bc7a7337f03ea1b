"""The toy data for runs that last long enough to be disturbed."""

import dataclasses
import time

import toy


class SlowSource(toy.ToySource):
    """Rows with a delay."""

    def __getitem__(self, index):
        time.sleep(0.008)
        return super().__getitem__(index)


@dataclasses.dataclass(frozen=True)
class SlowData(toy.ToyData):
    """About 30 batches of 8 a second, read by two threads."""

    def examples(self, split, cache):
        return SlowSource(self.rows, 1) if split == "train" else toy.ToySource(self.heldout_rows, 2)
