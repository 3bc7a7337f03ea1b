"""A deep learning recommendation model and its task (Naumov et al., arXiv 1906.00091): prediction of clicks.

A bottom MLP maps integers and embedding tables map categories to vectors; a top MLP maps the dot products of all pairs
of these vectors, and the bottom MLP's output, to a logit. A category may have several values, whose vectors are pooled.
Tables may be narrower than the vectors, which then are their rows times a matrix (Mixed Dimension Embeddings, Ginart et
al., arXiv 1909.11810). Shapes in names: B batch, I integers, F categories, L most values of a category, V = F + 1
vectors, D their width.

Initialisation is that of the paper's code: kernels normal with variance 2 / (inputs + outputs), biases normal with
variance 1 / outputs, tables uniform up to 1 / sqrt(rows).
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from . import tables
from .linen_task import Batch, BatchSpec, Metrics, check_options

MISSING = -(2**31)  # an empty integer field in the data
_LEAST_VARIANCE = 1e-3  # added to the variance of normalised integers, which may be constant
_KERNEL = nn.initializers.variance_scaling(1.0, "fan_avg", "normal")
_NEW_WEIGHT = 0.01  # least weight of the latest batch in running statistics


@dataclasses.dataclass(frozen=True)
class DLRMTask:
    """Click-through prediction.

    A batch holds integers int32 [B, I] (`MISSING` for an empty field), categories uint32 [B, F] (32-bit hashes), label
    int32 [B] and weight float32 [B], 0 for padding examples. A category's row is its hash modulo the size of its table,
    so the data do not depend on the sizes of tables. Of multi-hot categories uint32 [B, F, L], values int32 [B, F] are
    real; a category without values has a vector of zeros.
    """

    rows: tuple[int, ...] = (1_000,) * 26  # rows of each category's table; colliding hashes share a row
    embed_dim: int = 16  # width of the vectors and of the bottom MLP's output
    width_power: float = 0.0  # a table of n rows is embed_dim x (fewest rows / n)^width_power wide, a power of two
    pooling: str = "sum"  # of the vectors of a multi-hot category: "sum" or "mean"
    bottom: tuple[int, ...] = (512, 256, 64, 16)  # widths of the MLP over the integers; the last must be embed_dim
    top: tuple[int, ...] = (512, 256)  # hidden layer widths of the MLP over the interactions
    normalize_integers: bool = False  # normalise log integers by running statistics; not published, helps small data
    dropout: float = 0.0  # dropout rate of the top MLP's hidden units
    compute_dtype: str = "float32"  # of activations and matmuls; "bfloat16" on accelerators
    sparse_updates: bool = False  # a step touches only rows that its batch uses; for tables larger than a batch

    def __post_init__(self):
        check_options(self, fractions="dropout", not_negative="width_power", pooling=("sum", "mean"))
        for name in ("rows", "bottom", "top"):
            if not getattr(self, name) or min(getattr(self, name)) < 1:
                raise ValueError(f"task.{name}={getattr(self, name)}: give sizes of at least 1")
        if self.bottom[-1] != self.embed_dim:
            raise ValueError(f"task.bottom={self.bottom}: must end in task.embed_dim={self.embed_dim}")
        if tables.total_rows(self.rows) >= 2**31:
            raise ValueError(f"task.rows: {sum(self.rows):,} rows in total; at most {2**31 - 2**11:,} fit int32")

    def init(self, key: jax.Array, batch_spec: BatchSpec) -> dict[str, Any]:
        """Return {"params": ...} and, with `normalize_integers`, {"statistics": ...}: nested dicts, float32."""
        if "categories" not in batch_spec:
            raise ValueError(f"the batch has {sorted(batch_spec)} and no 'categories'; DLRM needs click data")
        count = batch_spec["categories"].shape[1]
        if count != len(self.rows):
            raise ValueError(
                f"task.rows: has {len(self.rows)} tables, but the data have {count} categories; give one for each"
            )
        one = {name: jnp.zeros((1, *spec.shape[1:]), spec.dtype) for name, spec in batch_spec.items()}
        variables: Any = DLRM(self).init(key, one["integers"], one["categories"], one.get("values"), train=False)
        return variables

    def loss(
        self, variables: dict[str, Any], batch: Batch, *, key: jax.Array, train: bool
    ) -> tuple[jax.Array, tuple[dict[str, Any], Metrics]]:
        """Return mean nats per example (0 for an empty batch), new statistics, and metrics as (total, weight).

        metrics: "loss", nats of the sigmoid cross-entropy; "accuracy", with a probability of one half counted as no.
        """
        logits_B, state = self.logits(variables, batch, key=key if train else None)
        clicked_B = batch["label"] > 0
        nats_B = jax.nn.softplus(jnp.where(clicked_B, -logits_B, logits_B))
        weight = batch["weight"].sum()
        nats = (batch["weight"] * nats_B).sum()
        right = (batch["weight"] * ((logits_B > 0) == clicked_B)).sum()
        metrics = {"loss": (nats, weight), "accuracy": (right, weight)}
        return nats / jnp.maximum(weight, 1), (state, metrics)

    def logits(
        self, variables: dict[str, Any], batch: Batch, *, key: jax.Array | None = None
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Return log odds of a click, float32 [B], and the statistics; with a key, both as in training."""
        inputs = batch["integers"], batch["categories"], batch.get("values"), batch.get("place")
        if key is None:
            logits: Any = DLRM(self).apply(variables, *inputs, train=False)
            return logits, {name: tree for name, tree in variables.items() if name != "params"}
        (logits, state) = DLRM(self).apply(
            variables, *inputs, train=True, rngs={"dropout": key}, mutable=["statistics"]
        )
        return logits, dict(state)

    @functools.cached_property
    def widths(self) -> tuple[int, ...]:
        """Return the width of each table: that of the rule, rounded to the nearest power of two, at most embed_dim."""
        fewest = min(self.rows)
        exact = [self.embed_dim * (fewest / rows) ** self.width_power for rows in self.rows]
        return tuple(
            self.embed_dim if width >= self.embed_dim else min(self.embed_dim, 2 ** max(0, round(math.log2(width))))
            for width in exact
        )

    @functools.cached_property
    def arrays(self) -> dict[str, "TableArray"]:
        """Return name of the parameter -> tables of one width that it holds."""
        found: dict[str, TableArray] = {}
        for width in sorted(set(self.widths), reverse=True):
            fields = tuple(field for field, each in enumerate(self.widths) if each == width)
            name = "embedding" if width == self.embed_dim else f"embedding_{width}"
            found[name] = TableArray(width, fields, tuple(self.rows[field] for field in fields))
        return found

    @property
    def sparse(self) -> tuple[str, ...]:
        """See `framework.task.Sparse`."""
        return tuple(self.arrays) if self.sparse_updates else ()

    def used_rows(
        self, batch: Batch, axes: Mapping[str, Sequence[str]]
    ) -> tuple[dict[str, jax.Array], dict[str, Any], jax.Array]:
        """See `framework.task.Sparse.used_rows`."""
        found = {
            name: tables.used(array.lookups(batch["categories"], batch.get("values")), array.total, axes[name])
            for name, array in self.arrays.items()
        }
        places = {name: used.place for name, used in found.items()}
        filled = jnp.stack([used.filled for used in found.values()]).max()
        return {name: used.rows for name, used in found.items()}, {**batch, "place": places}, filled

    judged_metrics: ClassVar[tuple[str, ...]] = ("auc", "log_loss", "calibration")

    def predict(self, variables: dict[str, Any], batch: Batch) -> dict[str, jax.Array]:
        """Return log odds and labels [B]."""
        return {"logit": self.logits(variables, batch)[0], "label": batch["label"]}

    def judge(
        self, predictions: Mapping[str, np.ndarray], decode: Callable[[np.ndarray], str] | None
    ) -> tuple[dict[str, float], str]:
        """Return AUC, log loss in nats and calibration (mean prediction / mean label, or NaN) over all examples."""
        del decode  # no text
        logits, labels = predictions["logit"].astype(np.float64), predictions["label"]
        predicted, happened = np.exp(-np.logaddexp(0, -logits)).mean(), labels.mean()
        metrics = {
            "auc": auc(logits, labels),
            "log_loss": float((np.logaddexp(0, logits) - labels * logits).mean()),
            "calibration": float(predicted / happened) if happened else float("nan"),
        }
        return metrics, f"AUC over {len(labels):,} held-out examples, {labels.mean():.1%} of them positive; ties half"

    def logical_axes(self, variables: dict[str, Any]) -> dict[str, Any]:
        """Return "rows" for the rows of tables; everything else is small and replicated."""
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: ("rows", None) if path[-1].key in self.arrays else (None,) * len(leaf.shape), variables
        )

    def flops(self, batch_spec: BatchSpec) -> float:
        """Return the training FLOPs of one batch: 6 per weight of the MLPs and per factor of the pairs' products.

        The whole V x V square of products counts, because it is computed; lookups do not.
        """
        examples, integers = batch_spec["integers"].shape
        vectors = len(self.rows) + 1
        widths = [integers, *self.bottom], [self.embed_dim + vectors * (vectors - 1) // 2, *self.top, 1]
        weights = sum(a * b for layers in widths for a, b in itertools.pairwise(layers))
        weights += sum(width * self.embed_dim for width in self.widths if width < self.embed_dim)
        return 6.0 * examples * (weights + vectors**2 * self.embed_dim)


class TableArray(NamedTuple):
    """The tables of one width, which one parameter holds.

    Attributes:
      width: their width.
      fields: their categories.
      sizes: their rows.
    """

    width: int
    fields: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def total(self) -> int:
        """Return the number of rows of the parameter; this number stands for no row."""
        return tables.total_rows(self.sizes)

    def lookups(self, categories_BxFx: jax.Array, values_BxF: jax.Array | None) -> jax.Array:
        """Return the rows of the values of all fields, int32 [B, lookups]; `total` where there is no value."""
        own = np.asarray(self.fields)
        rows = tables.row_numbers(categories_BxFx[:, own], self.sizes)
        if values_BxF is not None:
            rows = jnp.where(_real(rows.shape[-1], values_BxF[:, own]), rows, self.total)
        return rows.reshape(len(rows), -1)


def _real(most: int, values_BxF: jax.Array) -> jax.Array:
    """Return which values are real, bool [B, F, L]."""
    return jnp.arange(most) < values_BxF[..., None]


def pooled(found_BxSxD: jax.Array, values_BxF: jax.Array, pooling: str) -> jax.Array:
    """Return the sum or the mean of the vectors of each field, [B, F, D]; zeros for a field without values."""
    examples, fields = values_BxF.shape
    found_BxFxLxD = found_BxSxD.reshape(examples, fields, -1, found_BxSxD.shape[-1])
    real = _real(found_BxFxLxD.shape[2], values_BxF)[..., None]
    total_BxFxD = jnp.where(real, found_BxFxLxD, 0).sum(axis=2)
    return (
        total_BxFxD / jnp.maximum(values_BxF, 1)[..., None].astype(total_BxFxD.dtype)
        if pooling == "mean"
        else total_BxFxD
    )


class DLRM(nn.Module):
    """Maps integers [B, I] and categories [B, F] or [B, F, L] to log odds [B]."""

    task: DLRMTask

    @nn.compact
    def __call__(
        self,
        integers_BxI: jax.Array,
        categories_BxFx: jax.Array,
        values_BxF: jax.Array | None = None,
        place: Mapping[str, jax.Array] | None = None,
        *,
        train: bool,
    ) -> jax.Array:
        """Return log odds, float32; `place` tells where the rows of the lookups are in parameters with fewer rows."""
        task, dtype = self.task, jnp.dtype(self.task.compute_dtype)
        vectors = []
        for name, (width, fields, sizes) in task.arrays.items():
            if place is None:
                table = self.param(name, functools.partial(tables.initial_tables, sizes=sizes, width=width))
                rows_BxS = task.arrays[name].lookups(categories_BxFx, values_BxF)
            else:  # `param` would refuse the number of rows
                table, rows_BxS = self.get_variable("params", name), place[name]
            found = tables.look_up(table, rows_BxS, dtype)
            if values_BxF is not None:
                found = pooled(found, values_BxF[:, np.asarray(fields)], task.pooling)
            if width < task.embed_dim:
                shape = width, task.embed_dim
                kernels = [self.param(f"projection_{field}", _KERNEL, shape) for field in fields]
                found = jnp.einsum("bfw,fwd->bfd", found, jnp.stack(kernels).astype(dtype))
            vectors.append(found)
        embedded_BxFxD = vectors[0]
        if len(vectors) > 1:
            order = np.argsort([field for array in task.arrays.values() for field in array.fields])
            embedded_BxFxD = jnp.concatenate(vectors, axis=1)[:, order]
        x, present = logarithms(integers_BxI), integers_BxI != MISSING
        if task.normalize_integers:
            x = Normalized(name="normalized")(x, present, train=train)
        # A learned value for each integer, initially 0, replaces missing ones.
        x = jnp.where(present, x, self.param("missing", nn.initializers.zeros, (x.shape[-1],)))
        x = MLP(task.bottom, dtype=dtype, name="bottom")(x.astype(dtype), train=train)
        x = jnp.concatenate([x, interactions(x, embedded_BxFxD)], axis=-1)
        x = MLP(task.top, dropout=task.dropout, dtype=dtype, name="top")(x, train=train)
        return _dense(1, jnp.dtype(jnp.float32), "logit")(x.astype(jnp.float32))[:, 0]


class MLP(nn.Module):
    """Dense layers, each followed by a ReLU and dropout."""

    widths: Sequence[int]
    dtype: Any
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Map [B, inputs] to [B, widths[-1]]."""
        for number, width in enumerate(self.widths):
            x = nn.relu(_dense(width, self.dtype, f"layer_{number}")(x))
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return x


class Normalized(nn.Module):
    """Normalises each column by the batch's mean and variance in training, otherwise by running ones."""

    @nn.compact
    def __call__(self, x_BxI: jax.Array, present_BxI: jax.Array, *, train: bool) -> jax.Array:
        """Return the normalised columns [B, I]; missing entries do not count.

        Over the first 100 batches, running statistics are plain means, so that short runs have usable ones.
        """
        kept: dict[str, Any] = {
            name: self.variable("statistics", name, make, shape)
            for name, make, shape in (
                ("mean", jnp.zeros, x_BxI.shape[-1:]),
                ("variance", jnp.ones, x_BxI.shape[-1:]),
                ("batches", jnp.zeros, ()),
            )
        }
        if not train:
            return (x_BxI - kept["mean"].value) * jax.lax.rsqrt(kept["variance"].value + _LEAST_VARIANCE)
        count_I = present_BxI.sum(axis=0, dtype=jnp.float32)
        mean_I = jnp.where(present_BxI, x_BxI, 0).sum(axis=0) / jnp.maximum(count_I, 1)
        variance_I = jnp.where(present_BxI, jnp.square(x_BxI - mean_I), 0).sum(axis=0) / jnp.maximum(count_I, 1)
        if not self.is_initializing():
            kept["batches"].value += 1
            share = jnp.maximum(1 / kept["batches"].value, _NEW_WEIGHT)
            for name, now_I in (("mean", mean_I), ("variance", variance_I)):
                kept[name].value += jnp.where(count_I > 0, share * (now_I - kept[name].value), 0)
        return (x_BxI - mean_I) * jax.lax.rsqrt(variance_I + _LEAST_VARIANCE)


def logarithms(integers_BxI: jax.Array) -> jax.Array:
    """Return log(1 + max(x, 0)), float32."""
    return jnp.log1p(jnp.maximum(integers_BxI, 0).astype(jnp.float32))


def interactions(dense_BxD: jax.Array, embedded_BxFxD: jax.Array) -> jax.Array:
    """Return dot products of all pairs of different vectors, [B, V (V - 1) / 2]: the lower triangle by rows."""
    vectors_BxVxD = jnp.concatenate([dense_BxD[:, None], embedded_BxFxD], axis=1)
    products_BxVxV = jnp.einsum("bvd,bwd->bvw", vectors_BxVxD, vectors_BxVxD)
    rows, columns = np.tril_indices(vectors_BxVxD.shape[1], -1)
    return products_BxVxV[:, rows, columns]


def _dense(width: int, dtype: jnp.dtype, name: str) -> nn.Dense:
    return nn.Dense(
        width,
        dtype=dtype,
        kernel_init=_KERNEL,
        bias_init=nn.initializers.normal(width**-0.5),
        name=name,
    )


def auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Return the exact area under the ROC curve, by the rank statistic of Mann and Whitney; ties count half.

    NaN if one of the classes is missing or a score is NaN.

    Args:
      scores: [examples], any increasing function of the predictions.
      labels: [examples], 1 for positives and 0 for negatives.
    """
    _, place, counts = np.unique(scores, return_inverse=True, return_counts=True)
    positives = np.bincount(place, weights=labels, minlength=len(counts))
    negatives = counts - positives
    pairs = positives.sum() * negatives.sum()
    if not pairs or np.isnan(scores).any():
        return float("nan")
    below = np.cumsum(negatives) - negatives
    return float((positives * (below + negatives / 2)).sum() / pairs)
