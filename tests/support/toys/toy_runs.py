"""Make short runs of the toy task, and read their workdirs."""

import json

import jax
import numpy as np

from shampax.configs import base

ADAMW = "shampax.optimizers.baselines:AdamWOptions"


SHAMPOO = "shampax.optimizers.shampoo:ShampooOptions"


UNITS = ("steps_per_second", "examples_per_second", "tokens_per_second", "input_wait")
TIMES = ("seconds", *(f"throughput/{unit}" for unit in UNITS))


def make_config(**changes):
    config = base.get_config()
    config.task = base.component("toy:ToyTask", **changes.pop("task", {}))
    config.data = base.component("toy:ToyData")
    config.optimizer = changes.pop("optimizer", base.component(ADAMW))
    config.duration = "12 steps"
    config.batch_size = 8
    config.evaluation.every = "4 steps"
    config.checkpoint.every = "5 steps"
    config.log.every = "2 steps"
    config.trackers = ()
    config.schedule.learning_rate = 0.02
    config.update_from_flattened_dict(changes)
    return config


def two():
    return jax.devices()[:2]


def lines(workdir):
    """Return the history without times."""
    read = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if k not in TIMES and not k.startswith(("host/", "checkpoint/"))}
        for line in read
    ]


def saved(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def arrays(workdir, step):
    """Return all arrays of a checkpoint, read without the trainer."""
    import orbax.checkpoint as ocp

    path = workdir / "checkpoints" / str(step) / "state"
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        as_numpy = ocp.RestoreArgs(restore_type=np.ndarray)
        restore_args = jax.tree.map(lambda _: as_numpy, checkpointer.metadata(path).item_metadata.tree)
        return checkpointer.restore(path, restore_args=restore_args)
