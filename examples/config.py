"""A config that trains your own model on your own data with your own optimizer.

    shampax train --config=examples/config.py --workdir=runs/example

Takes about 10 seconds on two CPU cores, nearly all of it for compiling. The held-out accuracy after 60 steps is about
0.93; guessing gets 0.25. Variants:

  lion: the Linen model and Lion; the default.
  shampoo: the Linen model and Distributed Shampoo.
  nnx: the NNX model and Distributed Shampoo.
"""

from shampax.configs import base

VARIANTS = ("lion", "shampoo", "nnx")


def get_config(variant="lion"):
    """Return every knob at its default, except those set here."""
    config = base.get_config()
    config.task = base.component("examples.nnx_model:WavesNNXTask" if variant == "nnx" else "examples.model:WavesTask")
    config.data = base.component("examples.data:WavesData")
    if variant == "lion":
        config.optimizer = base.component("examples.optimizer:LionOptions", weight_decay=0.1)
        config.schedule.learning_rate = 1e-2
    else:
        config.optimizer = base.component(base.SHAMPOO, block_size=64, interval=5)
        config.schedule.learning_rate = 5e-2
    config.duration = "60 steps"
    config.batch_size = 32
    config.evaluation.every = "20 steps"
    config.checkpoint.every = "20 steps"
    config.simulated_devices = 2  # number of CPU devices where there is no GPU or TPU
    return config
