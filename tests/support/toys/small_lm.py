"""A small language model of bytes, trained for four steps."""

import jax

from shampax.configs import base
from shampax.framework.config import overrides
from shampax.framework.train import train
from shampax.launch.generate import DATA, TASK

SIZES = {"layers": 1, "embed_dim": 16, "heads": 2, "kv_heads": 1, "head_dim": 8, "mlp_dim": 32}


def train_small(workdir, *changes):
    """Train on two devices and return the result."""
    config = base.get_config()
    config.task = base.component(TASK, vocab_size=257, **SIZES)
    config.data = base.component(DATA, vocab_size=257, sequence_length=32, max_records=2)
    config.optimizer = base.component("shampax.optimizers.baselines:AdamWOptions")
    fixed = ["duration=4 steps", "batch_size=8", "checkpoint.every=2 steps", "evaluation.every=2 steps"]
    overrides.apply(config.lock(), [*fixed, "evaluation.batches=8", *changes])
    return train(config, workdir, devices=jax.devices()[:2])
