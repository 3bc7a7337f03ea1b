"""A model: a small convolutional network in Flax Linen, and the task that trains it.

    shampax train --config=examples/config.py --workdir=runs/example --config.task.width=32

`shampax/framework/task.py` is the contract. `LinenTask` derives `init` and `logical_axes` from the module; a task may
also implement them itself. Batch statistics show how a task keeps model state, and dropout how it uses random keys.
`nnx_model.py` has the same model in NNX.
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
import optax

from examples.data import CLASSES, LENGTH
from shampax.models.linen_task import LinenTask


class WavesNet(nn.Module):
    """Map waves [B, LENGTH, 1] to logits [B, CLASSES]."""

    width: int
    dropout: float

    @nn.compact
    def __call__(self, wave, train):
        """Return the logits."""
        # Names of dimensions: `config.sharding_rules` maps them to mesh axes, and Shampoo stacks and folds by them.
        kernel = nn.with_logical_partitioning(nn.initializers.lecun_normal(), (None, None, "mlp"))
        x = nn.Conv(self.width, (9,), strides=4, kernel_init=kernel, name="conv")(wave)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9, name="norm")(x))
        x = nn.Dropout(self.dropout, deterministic=not train)(x.reshape(len(x), -1))
        return nn.Dense(CLASSES, name="out")(x)


@dataclasses.dataclass(frozen=True)
class WavesTask(LinenTask):
    """The task. Each field is a knob of `config.task`."""

    width: int = 16  # number of channels
    dropout: float = 0.1  # probability that a feature is dropped

    def boxed(self, key):
        """Return the initial variables with the names of their dimensions."""
        return self._net().init(key, jnp.zeros((1, LENGTH, 1)), False)

    def loss(self, variables, batch, *, key, train):
        """Return `(loss, (new_model_state, metrics))`."""
        logits, state = self._net().apply(
            variables, batch["wave"], train, rngs={"dropout": key}, mutable=["batch_stats"]
        )
        metrics = measure(logits, batch)
        total, weight = metrics["loss"]
        return total / weight, (state, metrics)

    def flops(self, batch_spec):
        """Return the floating-point operations of a training step."""
        return flops(batch_spec["wave"].shape[0], self.width)

    def _net(self):
        return WavesNet(self.width, self.dropout)


def measure(logits, batch):
    """Return each metric as (total, weight). The trainer adds up both over batches, then divides."""
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    right = logits.argmax(axis=-1) == batch["label"]
    weight = batch["weight"]
    return {"loss": ((nats * weight).sum(), weight.sum()), "accuracy": ((right * weight).sum(), weight.sum())}


def flops(rows: int, width: int) -> float:
    """Return three times the forward pass, with 2 for each multiplication and addition."""
    return 6.0 * rows * width * LENGTH // 4 * (9 + CLASSES)
