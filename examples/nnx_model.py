"""The model of `model.py` in Flax NNX.

    shampax train --config=examples/config.py:nnx --workdir=runs/example_nnx

`NNXTask` splits the module into parameters and model state, switches it between training and evaluation, and seeds its
random streams from the key of each step.
"""

import dataclasses

from flax import nnx

from examples.data import CLASSES, LENGTH
from examples.model import flops, measure
from shampax.models.nnx_task import NNXTask


class WavesModule(nnx.Module):
    """Map waves [B, LENGTH, 1] to logits [B, CLASSES]."""

    def __init__(self, width: int, dropout: float, rngs: nnx.Rngs):
        kernel = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, None, "mlp"))
        self.conv = nnx.Conv(1, width, (9,), strides=4, kernel_init=kernel, rngs=rngs)
        self.norm = nnx.BatchNorm(width, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        self.out = nnx.Linear(LENGTH // 4 * width, CLASSES, rngs=rngs)

    def __call__(self, wave):
        """Return the logits."""
        x = nnx.relu(self.norm(self.conv(wave)))
        return self.out(self.dropout(x.reshape(len(x), -1)))


@dataclasses.dataclass(frozen=True)
class WavesNNXTask(NNXTask):
    """The task. Each field is a knob of `config.task`."""

    width: int = 16  # number of channels
    dropout: float = 0.1  # probability that a feature is dropped

    def module(self, rngs):
        """Return the module at the start of training."""
        return WavesModule(self.width, self.dropout, rngs)

    def measure(self, module, batch, *, train):
        """Return the metrics of a batch."""
        return measure(module(batch["wave"]), batch)

    def flops(self, batch_spec):
        """Return the floating-point operations of a training step."""
        return flops(batch_spec["wave"].shape[0], self.width)
