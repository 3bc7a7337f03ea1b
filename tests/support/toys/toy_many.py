"""A config and data for runs of several processes, which a test can follow and let fail in one process.

The environment variable FAULT is "KIND INDEX", the fault and its process: "options" are refused, "input" cannot be
read, "row" raises during training, "heldout" is a damaged held-out row, or "stale" does not list the newest checkpoint,
as on a network file system.
"""

import dataclasses
import os
import time

import toy

from shampax.configs import base
from shampax.framework.base.errors import UserError


def get_config():
    config = base.get_config()
    config.task = base.component("toy:ToyTask")
    config.data = base.component("toy_many:ManyData")
    config.optimizer = base.component("shampax.optimizers.baselines:AdamWOptions")
    config.duration = "80 steps"
    config.batch_size = 8
    config.evaluation.every = "20 steps"
    config.checkpoint.every = "10 steps"
    config.log.every = "2 steps"
    config.processes.death_seconds = 5.0
    if fault() == "stale":
        from shampax.framework.checkpoint import store

        listed = store.checkpoints
        store.checkpoints = lambda workdir: listed(workdir)[:-1]
    return config


@dataclasses.dataclass(frozen=True)
class ManyData(toy.ToyData):
    row_seconds: float = 0.03  # two threads read four rows a step: a signal comes before the end of the run
    heldout_seconds: float = 0.0

    def __post_init__(self):
        if fault() == "options":
            raise UserError("row_seconds is refused")

    def examples(self, split, cache):
        if fault() == "input":
            raise UserError(f"no rows for {split}")
        rows = super().examples(split, cache)
        return SlowRows(rows, self.row_seconds if split == "train" else self.heldout_seconds, split)


class SlowRows:
    def __init__(self, rows, seconds, split):
        self.rows, self.seconds, self.split, self.read = rows, seconds, split, 0

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        time.sleep(self.seconds)
        self.read += 1
        if fault() == "row" and self.read > 60:
            raise LookupError(f"row {index} is torn")
        if fault() == "heldout" and self.split != "train":
            raise UserError("a held-out row is damaged")
        return self.rows[index]


def fault():
    kind, _, index = os.environ.get("FAULT", "").partition(" ")
    return kind if index == os.environ["JAX_PROCESS_ID"] else None
