"""One small network with batch norm and dropout, in NNX and, also with adapters, in Linen, and data to train it."""

import contextlib
import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from shampax.models import lora
from shampax.models.linen_task import LinenTask
from shampax.models.nnx_task import NNXTask

INPUTS, CLASSES = 6, 4


class Net(nnx.Module):
    def __init__(self, width, dropout, rngs):
        kernel = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("embed", "mlp"))
        sizes = ((INPUTS, width), (width, width))
        self.hidden = nnx.List([nnx.Linear(*size, kernel_init=kernel, rngs=rngs) for size in sizes])
        self.norm = nnx.BatchNorm(width, momentum=0.8, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        self.out = nnx.Linear(width, CLASSES, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.hidden[0](x)))
        x = self.dropout(nnx.relu(self.hidden[1](x)))
        return self.out(x)


def measures(logits, batch):
    weights = batch["weights"]
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
    right = logits.argmax(axis=-1) == batch["labels"]
    return {"loss": ((nats * weights).sum(), weights.sum()), "accuracy": ((right * weights).sum(), weights.sum())}


@dataclasses.dataclass(frozen=True)
class NNXNetTask(NNXTask):
    width: int = 8
    dropout: float = 0.3

    def module(self, rngs):
        return Net(self.width, self.dropout, rngs)

    def measure(self, module, batch, *, train):
        return measures(module(batch["points"]), batch)

    def flops(self, batch_spec):
        return 6.0 * batch_spec["points"].shape[0] * self.width * (INPUTS + self.width + CLASSES)


class LinenNet(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(self.width, name="hidden_0")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.8, name="norm")(x))
        return nn.Dense(CLASSES, name="out")(nn.relu(nn.Dense(self.width, name="hidden_1")(x)))


def linen_loss(width, variables, batch, train):
    """Return the same as `Task.loss`, without dropout."""
    logits, state = LinenNet(width).apply(variables, batch["points"], train, mutable=["batch_stats"])
    metrics = measures(logits, batch)
    return metrics["loss"][0] / metrics["loss"][1], (state, metrics)


@dataclasses.dataclass(frozen=True)
class LinenNetTask(LinenTask):
    rank: int = 0  # of adapters

    @property
    def adapters(self):
        return lora.Adapters(self.rank, 3.0, ("hidden_0", "hidden_1"))

    def boxed(self, key):
        with self.adapters.attached() if self.rank else contextlib.nullcontext():
            variables = LinenNet(8).init(key, jnp.zeros((1, INPUTS)), False)
        return self.adapters.split(variables, jnp.float32, ()) if self.rank else variables

    def loss(self, variables, batch, *, key, train):
        with self.adapters.attached() if self.rank else contextlib.nullcontext():
            inside = {"params": lora.joined(variables), "batch_stats": variables["batch_stats"]}
            return linen_loss(8, inside, batch, train)

    def flops(self, batch_spec):
        return 1.0


class Points:
    """Points on a plane, labelled by octant; each is a function of its index."""

    def __init__(self, length, seed):
        self.length, self.seed = length, seed

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        points = np.random.default_rng((self.seed, index)).normal(size=INPUTS).astype(np.float32)
        label = 2 * (points[0] > 0) + (points[1] > points[2])
        return {"points": points, "labels": np.int32(label), "weights": np.float32(1)}


@dataclasses.dataclass(frozen=True)
class PointsData:
    rows: int = 200

    @property
    def tokens_per_example(self):
        return 1

    def spec(self):
        shapes = {"points": ((INPUTS,), np.float32), "labels": ((), np.int32), "weights": ((), np.float32)}
        return {name: jax.ShapeDtypeStruct(*each) for name, each in shapes.items()}

    def prepare(self, cache):
        cache.mkdir(parents=True, exist_ok=True)

    def examples(self, split, cache):
        return Points(self.rows, 1) if split == "train" else Points(20, 2)


def batch_of(rows=16):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *(Points(rows, 3)[row] for row in range(rows)))
