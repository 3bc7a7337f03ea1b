"""The contract between the trainer and a model: write a frozen dataclass with the methods of `Task`.

A config names it by import string, `config.task.name = "my_project.my_model:MyTask"`; its fields are knobs. The trainer
knows nothing else of a model. A task may also have the methods of `Judge`, `Generating`, `Scoring`, `Settling`,
`Sparse`, `Exchanged`, `Noted` and `Costed`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import jax
import numpy as np

from .dataset import Decoder

Batch = Mapping[str, jax.Array]
BatchSpec = Mapping[str, jax.ShapeDtypeStruct]
Metrics = dict[str, tuple[jax.Array, jax.Array]]  # name -> (total, weight), float32 scalars


class Task(Protocol):
    """The methods that every model must have. All are pure and traceable; none of them sees a mesh.

    `variables` are a nested dict of arrays. The optimizer trains `variables["params"]`. `variables["frozen"]`, if any,
    are parameters that nothing changes, such as the base of adapters: they have no gradient and no optimizer state, and
    `init_from` takes them from the parameters of another run. Every other collection, such as batch statistics, is
    model state that the loss replaces at every step. `batch` is a dict of arrays [B, ...], where B is the number of
    examples.
    """

    def init(self, key: jax.Array, batch_spec: BatchSpec) -> dict[str, Any]:
        """Return the initial variables, from a random key and the shapes of a batch, `batch_spec`.

        The trainer calls it under `jit` with sharded outputs, so that no device ever holds a whole large model, and
        under `jax.eval_shape`.
        """
        ...

    def loss(
        self, variables: dict[str, Any], batch: Batch, *, key: jax.Array, train: bool
    ) -> tuple[jax.Array, tuple[dict[str, Any], Metrics]]:
        """Return `(loss, (new_model_state, metrics))` of one batch.

        `new_model_state` holds the collections other than `params` and `frozen` (`{}` for none). The trainer sums
        totals and weights of each metric over micro-batches and evaluation batches, then divides. `metrics["loss"]` is
        required and `loss` must equal its total / weight: gradient accumulation relies on it. Padding examples are all
        zeros and must have no weight. `metrics["real_tokens"]`, if there, is the share of tokens that are no padding:
        the others count neither as speed nor for MFU.

        Args:
          variables: as returned by `init`.
          batch: arrays [B, ...]. With `config.microbatches`, these may be rows of one device only, if all devices have
            all parameters and there is no model state.
          key: random key, unique to the step, the micro-batch and, in that case, the device.
          train: Python bool; enables dropout and similar.
        """
        ...

    def logical_axes(self, variables: dict[str, Any]) -> dict[str, Any]:
        """Return for each variable a tuple with one name per dimension: "embed", "mlp", "heads", "vocab", ... or None.

        `variables` are arrays or `jax.ShapeDtypeStruct`s; the result is the same nested dict with tuples as leaves. The
        config's `sharding_rules` map each name to mesh axes; dimensions named None are replicated.
        """
        ...

    def flops(self, batch_spec: BatchSpec) -> float:
        """Return the floating-point operations of one training step on one batch: three times the forward pass.

        They are the numerator of MFU. Compute them analytically, and of attention only what a query may see: its own
        position and the earlier ones if it is causal.
        """
        ...


class Judge(Protocol):
    """Optional methods of a task: held-out metrics that are not means over examples, such as AUC or BLEU.

    Attributes:
      judged_metrics: names of the metrics that `judge` returns; a config may rank checkpoints by one of them.
    """

    judged_metrics: ClassVar[tuple[str, ...]] = ()

    def predict(self, variables: dict[str, Any], batch: Batch) -> dict[str, jax.Array]:
        """Return the predictions of a model with these `variables` for one held-out batch, arrays [B, ...]; pure."""
        ...

    def judge(self, predictions: Mapping[str, np.ndarray], decode: Decoder | None) -> tuple[dict[str, float], str]:
        """Return metrics by name over all held-out examples, and a line on how they were measured ("" for none).

        Args:
          predictions: outputs of `predict` for all held-out examples in order, without padding examples.
          decode: decodes the token ids of an example to text; None for data that are not text.
        """
        ...


class Generating(Protocol):
    """Optional methods of a task that continues texts; pure and traceable.

    The cache is a tree of arrays: what the model keeps of the tokens that it has read.
    """

    def prefill(
        self, variables: dict[str, Any], tokens: jax.Array, real: jax.Array, slots: int
    ) -> tuple[jax.Array, Any]:
        """Read prompts. Return the logits of the next token of each, float32 [B, V], and the cache.

        Args:
          variables: as returned by `init`.
          tokens: int32 [B, T], prompts with padding before or after them.
          real: bool [B, T], False for padding; a row may have no token.
          slots: number of tokens of a row, with padding, for which the cache must have room; above T.
        """
        ...

    def decode(self, variables: dict[str, Any], tokens: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        """Read one more token of each row, `tokens` int32 [B]. Return the logits of the next one, and the cache.

        `variables` are as returned by `init`. The cache is donated, and must keep its shapes.
        """
        ...


class Scoring(Protocol):
    """Optional method of a task that rates texts; pure and traceable."""

    def scores(self, variables: dict[str, Any], batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Return the log-probability of each target, float32 [B, T], and whether it is the most probable token.

        Args:
          variables: as returned by `init`.
          batch: int32 arrays [B, T + 1]: tokens, segments (0 is padding) and positions.
        """
        ...


class Settling(Protocol):
    """Optional method of a task: the end of a step for its model state."""

    def settle(self, model_state: dict[str, Any]) -> dict[str, Any]:
        """Return the model state after a step, given that after the last micro-batch; pure and traceable."""
        ...


class Sparse(Protocol):
    """Optional methods of a task with tables of which a step reads and changes only the rows that its batch uses.

    The step takes these rows out of the tables and of the optimizer's state, runs as for small tables and puts them
    back. The optimizer must treat the tables by rows, so that the gradient of a row changes nothing else.

    Attributes:
      sparse: paths of the tables, parameters [rows, ...]; () updates all tables as other parameters.
    """

    sparse: tuple[str, ...]

    def used_rows(
        self, batch: Batch, axes: Mapping[str, Sequence[str]]
    ) -> tuple[dict[str, jax.Array], dict[str, Any], jax.Array]:
        """Return the rows that a batch uses, the batch for tables of these rows, and how full they are; traceable.

        The rows of a table are int32 [n], each row once; places that are left over hold the table's number of rows. Of
        devices that share a table, the part of each of them has rows of its own part of the table. The loss then gets
        tables [n, ...] in their order. If the last result is above 1, rows are missing, and the step is skipped.

        Args:
          batch: arrays [B, ...] of all devices.
          axes: path of a table -> mesh axes that share its rows.
        """
        ...


class Tensors(Protocol):
    """The tensors of a Hugging Face folder that hold a parameter.

    Attributes:
      shape: shape of each of them.
      added: number to add to the values of a tensor, in the parameter.
    """

    shape: tuple[int, ...]
    added: float

    @property
    def parameter(self) -> tuple[int, ...]:
        """Return the shape of the parameter."""
        ...

    def names(self) -> Iterable[tuple[tuple[int, ...], str]]:
        """Yield each index of the leading axes of the parameter, and the name of its tensor."""
        ...

    def view(self, tensor: np.ndarray) -> np.ndarray:
        """Return a tensor in the layout of the parameter after its leading axes, without copying it."""
        ...


class Exchanged(Protocol):
    """Optional methods of a task whose parameters Hugging Face folders hold, too."""

    @classmethod
    def knobs_of_folder(cls, config: Mapping[str, Any], adapter: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return the fields of the task of a folder, given its config.json and the adapter_config.json of an adapter.

        Raises:
          ValueError: no task of this class computes the same.
        """
        ...

    def folder_tensors(self, config: Mapping[str, Any]) -> Mapping[str, Tensors]:
        """Return path of each parameter -> its tensors in a folder with this config.json.

        Raises:
          ValueError: the model of the folder is not this task.
        """
        ...

    def folder_config(self, model_type: str) -> dict[str, Any]:
        """Return a config.json for the parameters of this task; `model_type` is its family, "" any that fits.

        Raises:
          ValueError: no folder can hold them.
        """
        ...

    def folder_state(self, config: Mapping[str, Any]) -> Mapping[str, Tensors]:
        """Return path of each array of the model state that a folder with this config.json holds -> its tensors."""
        ...

    def folder_may_have(self, name: str, config: Mapping[str, Any]) -> bool:
        """Return whether a folder may have a tensor that holds neither a parameter nor model state.

        Args:
          name: of the tensor.
          config: config.json of the folder.
        """
        ...

    def adapter_tensors(self, config: Mapping[str, Any], adapter: Mapping[str, Any]) -> Mapping[str, Tensors]:
        """Return path of each trained parameter -> its tensors in a PEFT folder.

        Args:
          config: config.json of the base.
          adapter: adapter_config.json.

        Raises:
          ValueError: the adapters of the folder are not those of this task.
        """
        ...

    def adapter_config(self, model_type: str) -> dict[str, Any]:
        """Return the adapter_config.json of this task, {} without adapters; `model_type` is the family of the base."""
        ...

    def merged(
        self, path: str, place: tuple[slice, ...], values: np.ndarray, read: Callable[[str], np.ndarray]
    ) -> np.ndarray:
        """Return a part of a frozen parameter with what its adapter adds.

        Args:
          path: of the parameter.
          place: place of the part in it.
          values: the part.
          read: returns the trained parameter of a path.
        """
        ...


class Noted(Protocol):
    """Optional method of a task: lines about its choices that are printed once, when a run starts."""

    def notes(self, batch_spec: BatchSpec) -> tuple[str, ...]:
        """Return lines about a global batch on the mesh in the context (`jax.set_mesh`)."""
        ...


def sparse_of(task: Any) -> Sparse | None:
    """Return the task if it has tables of which a step changes some rows, else None."""
    return task if getattr(task, "sparse", ()) else None


def settled(task: Any, model_state: dict[str, Any]) -> dict[str, Any]:
    """Return the model state after a step: as it is, unless the task has the method of `Settling`."""
    return task.settle(model_state) if hasattr(task, "settle") else model_state


class Costed(Protocol):
    """Optional methods of a task for planning."""

    def square_flops(self, batch_spec: BatchSpec) -> float:
        """Return `flops` with the whole T x T square of causal attention, as some publications count it."""
        ...

    def kernel_cost(
        self, name: str, operands: Sequence[jax.ShapeDtypeStruct], results: Sequence[jax.ShapeDtypeStruct]
    ) -> tuple[float, float] | None:
        """Return FLOPs, and bytes read and written, of one call of a kernel; None if it is not known.

        Args:
          name: its target, JAX's name of the operation with its scopes, and the compiler's name.
          operands: arrays that it reads.
          results: arrays that it writes, with those that it only uses meanwhile.
        """
        ...


def square_flops_of(task: Any, batch_spec: BatchSpec) -> float | None:
    """Return the FLOPs with whole squares of attention, None if the task has no such method."""
    return task.square_flops(batch_spec) if hasattr(task, "square_flops") else None


def kernel_cost_of(
    task: Any, name: str, operands: Sequence[jax.ShapeDtypeStruct], results: Sequence[jax.ShapeDtypeStruct]
) -> tuple[float, float] | None:
    """Return FLOPs and bytes of a kernel, None if the task does not know it."""
    return task.kernel_cost(name, operands, results) if hasattr(task, "kernel_cost") else None


def notes_of(task: Any, batch_spec: BatchSpec) -> tuple[str, ...]:
    """Return the notes of the task, none if it has no such method."""
    return task.notes(batch_spec) if hasattr(task, "notes") else ()


def judge_of(task: Any) -> Judge | None:
    """Return the task if it has the methods of `Judge`, else None."""
    return task if hasattr(task, "predict") and hasattr(task, "judge") else None
