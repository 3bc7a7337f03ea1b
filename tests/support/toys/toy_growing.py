"""Toy rows that exist as far as the file `rows` in a folder says, and why no more will, in its file `failed`.

The file `asked` has the last row that a run has asked for. The folder is the environment variable GROWING.
"""

import contextlib
import dataclasses
import os
import threading
import time
from pathlib import Path

import toy
import toy_many

from shampax.configs import base


def get_config():
    config = toy_many.get_config()
    config.data = base.component("toy_growing:GrowingData")
    config.duration = "12 steps"
    config.checkpoint.every = "50 steps"
    return config


def place():
    return Path(os.environ["GROWING"])


@dataclasses.dataclass(frozen=True)
class GrowingData(toy.ToyData):
    grows = True

    @contextlib.contextmanager
    def ahead(self, cache, examples):
        yield lambda: (place() / "failed").read_text() if (place() / "failed").exists() else ""

    def examples(self, split, cache):
        return GrowingRows(self.rows, 1) if split == "train" else super().examples(split, cache)


class GrowingRows(toy.ToySource):
    def __init__(self, length, seed):
        super().__init__(length, seed)
        self.stopped = threading.Event()

    def order(self, seed):
        import grain

        return grain.MapDataset.range(2**40).map(self.index).seed(seed)

    def index(self, position):
        while int((place() / "rows").read_text()) <= position:
            if self.stopped.is_set():
                raise LookupError("stopped")
            time.sleep(0.02)
        return position % self.length

    def made(self, position):
        (place() / "asked").write_text(f"{position}")
        return int((place() / "rows").read_text())

    def stop(self):
        self.stopped.set()
