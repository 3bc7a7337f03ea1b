"""A model: a small convolutional network in Flax Linen, and the task that trains it.

    python -m shampax.launch.train --config=examples/config.py --workdir=runs/example --config.task.width=32

`shampax/framework/task.py` is the contract; `nnx_model.py` has the same model in NNX. Batch statistics show how a task
keeps model state, and dropout how it uses random keys.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from examples.data import CLASSES, LENGTH


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
class WavesTask:
    """The task. Each field is a knob of `config.task`."""

    width: int = 16  # number of channels
    dropout: float = 0.1  # probability that a feature is dropped

    def init(self, key, batch_spec):
        """Return the initial variables: "params" is trained, every other collection is model state."""
        return nn.unbox(self._boxed(key))

    def loss(self, variables, batch, *, key, train):
        """Return `(loss, (new_model_state, metrics))`."""
        logits, state = self._net().apply(
            variables, batch["wave"], train, rngs={"dropout": key}, mutable=["batch_stats"]
        )
        metrics = measure(logits, batch)
        total, weight = metrics["loss"]
        return total / weight, (state, metrics)

    def logical_axes(self, variables):
        """Return a tuple of dimension names for each variable, None for dimensions that are never sharded."""

        def names(leaf: Any) -> tuple[str | None, ...]:
            boxed = isinstance(leaf, nn.LogicallyPartitioned)
            return tuple(leaf.names) if boxed else (None,) * leaf.ndim

        # eval_shape computes shapes only: this method must not allocate a whole large model.
        boxed = jax.eval_shape(lambda: self._boxed(jax.random.key(0)))
        return jax.tree.map(names, boxed, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned))

    def flops(self, batch_spec):
        """Return the floating-point operations of a training step."""
        return flops(batch_spec["wave"].shape[0], self.width)

    def _net(self):
        return WavesNet(self.width, self.dropout)

    def _boxed(self, key):
        return self._net().init(key, jnp.zeros((1, LENGTH, 1)), False)


def measure(logits, batch):
    """Return each metric as (total, weight). The trainer adds up both over batches, then divides."""
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    right = logits.argmax(axis=-1) == batch["label"]
    weight = batch["weight"]
    return {"loss": ((nats * weight).sum(), weight.sum()), "accuracy": ((right * weight).sum(), weight.sum())}


def flops(rows: int, width: int) -> float:
    """Return three times the forward pass, with 2 for each multiplication and addition."""
    return 6.0 * rows * width * LENGTH // 4 * (9 + CLASSES)
