"""The contract between the trainer and a model: a task is all the trainer knows of one.

To train a model of your own, write a frozen dataclass with the four methods of `Task` and name it in the
config by import string, `config.task.name = "my_project.my_model:MyTask"`; the other keys of the section are
its fields.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

Batch = Mapping[str, jax.Array]
BatchSpec = Mapping[str, jax.ShapeDtypeStruct]
Metrics = dict[str, tuple[jax.Array, jax.Array]]  # name -> (total, weight), float32 scalars


class Task(Protocol):
    """What a model must offer to be trained. Every method is pure and traceable; no method sees a mesh.

    `variables` are a plain nested dict of arrays: `{"params": {...}}` holds what the optimizer trains, and
    any other collection (batch statistics, say) is model state that the loss replaces at every step. `batch`
    is a dict of arrays that share their leading dimension, the examples.
    """

    def init(self, key: jax.Array, batch_spec: BatchSpec) -> dict[str, Any]:
        """The variables at the start of training.

        The trainer calls it under `jit` with sharded outputs, so that no device ever holds the whole of a
        large model, and under `jax.eval_shape`.
        """
        ...

    def loss(
        self, variables: dict[str, Any], batch: Batch, *, key: jax.Array, train: bool
    ) -> tuple[jax.Array, tuple[dict[str, Any], Metrics]]:
        """`(loss, (new_model_state, metrics))` of one batch.

        `new_model_state` holds the collections other than `params` (`{}` if there are none). `metrics` maps
        names to (total, weight); the trainer adds totals and weights over micro-batches and evaluation
        batches and divides at the end. `metrics["loss"]` is required and `loss` must equal its total /
        weight: gradient accumulation relies on it. Examples that only fill up a batch are all zeros and must have no
        weight. `train` is a Python bool (dropout and the like), `key` is unique to the step and micro-batch.
        """
        ...

    def logical_axes(self, variables: dict[str, Any]) -> dict[str, Any]:
        """For each variable a tuple with one name per dimension ("embed", "mlp", "heads", "vocab", ... or
        None).

        `variables` are arrays or `jax.ShapeDtypeStruct`s; the result has the same dicts with tuples as
        leaves. The config's `sharding_rules` say on which mesh axis each name is laid; None stays whole.
        """
        ...

    def flops(self, batch_spec: BatchSpec) -> float:
        """Floating-point operations of one training step on one batch: three times the forward pass.

        Analytic, since the compiler's own count sees the body of a scanned layer once.
        """
        ...


@runtime_checkable
class Judge(Protocol):
    """What a task may offer besides: held-out metrics that are no sums over examples, such as AUC or BLEU."""

    def predict(self, variables: dict[str, Any], batch: Batch) -> dict[str, jax.Array]:
        """What the judgement needs of one held-out batch: arrays [examples, ...]; pure and traceable."""
        ...

    def judge(
        self, predictions: Mapping[str, np.ndarray], decode: Callable[[np.ndarray], str] | None
    ) -> tuple[dict[str, float], str]:
        """Metrics by name over all held-out examples, and a line on how they were measured ("" for none).

        Args:
          predictions: of `predict`, the arrays of all batches one after the other, in the order of the held-out
            split, without the examples that fill up the last batch.
          decode: turns the numbers of an example into text, where the data are text.
        """
        ...


def judge_of(task: Any) -> Judge | None:
    """The task as a judge, if it is one."""
    return task if isinstance(task, Judge) else None
