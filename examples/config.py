"""A config that trains your own model on your own data with your own optimizer.

    python -m shampax.launch.train --config=examples/config.py --workdir=runs/example

Takes about 10 seconds on two CPU cores, nearly all of it for compiling. The held-out accuracy after 60 steps is about
0.93; guessing gets 0.25. Variants:

  nnx: the model in Flax NNX.
  shampoo: Distributed Shampoo in place of Lion.
"""

from shampax.configs import base

VARIANTS = ("lion", "nnx", "shampoo")


def get_config(variant="lion"):
    """Return every knob at its default, except those set here."""
    config = base.get_config()
    config.task = base.component("examples.nnx_model:WavesNNXTask" if variant == "nnx" else "examples.model:WavesTask")
    config.data = base.component("examples.data:WavesData")
    config.optimizer = base.component("examples.optimizer:LionOptions", weight_decay=0.1)
    config.schedule.learning_rate = 1e-2
    if variant == "shampoo":
        config.optimizer = base.component(base.SHAMPOO, block_size=64, interval=5)
        config.schedule.learning_rate = 5e-2
    config.duration = "60 steps"
    config.batch_size = 32
    config.evaluation.every = "20 steps"
    config.checkpoint.every = "20 steps"
    config.simulated_devices = 2  # number of CPU devices where there is no GPU or TPU
    return config
