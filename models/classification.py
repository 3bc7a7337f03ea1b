"""Classification of images: pixels, losses and metrics, and checks that all models of images share.

A task has `pixel_mean` and `pixel_std`: mean and standard deviation of each channel, of pixels from 0 to 1.

Shapes in names: B batch, H height, W width, C channels, K classes.
"""

from typing import Any

import jax
import jax.numpy as jnp

from .linen_task import Batch, BatchSpec, Metrics


def check_pixels(task: Any) -> None:
    """Raise ValueError if mean and standard deviation do not belong together."""
    if len(task.pixel_mean) != len(task.pixel_std) or not task.pixel_mean or min(task.pixel_std) <= 0:
        raise ValueError(
            f"task.pixel_mean={task.pixel_mean} and task.pixel_std={task.pixel_std}: give each channel a value; the "
            "latter must be positive"
        )


def check_images(task: Any, batch_spec: BatchSpec) -> None:
    """Raise ValueError if a batch has no images, or images of another number of channels."""
    if "image" not in batch_spec:
        raise ValueError(
            f"the batch has {sorted(batch_spec)} and no 'image'; {type(task).__name__} needs image data, "
            "shampax.framework.data.images:ImageData"
        )
    if batch_spec["image"].shape[3:] != (len(task.pixel_mean),):
        raise ValueError(
            f"task.pixel_mean={task.pixel_mean}: images of shape {batch_spec['image'].shape} do not have "
            f"{len(task.pixel_mean)} channels; give it, and task.pixel_std, a value for each channel"
        )


def normalized(task: Any, image_BxHxWxC: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Return pixels of mean 0 and deviation 1 over the data."""
    mean, std = jnp.array(task.pixel_mean), jnp.array(task.pixel_std)
    return ((image_BxHxWxC.astype(jnp.float32) / 255 - mean) / std).astype(dtype)


def nats(logits_BxK: jax.Array, label_B: jax.Array, smoothing: float) -> jax.Array:
    """Return the cross-entropy of each example, with label smoothing (Szegedy et al. 2016, section 7)."""
    log_p_BxK = jax.nn.log_softmax(logits_BxK)
    nats_B = -jnp.take_along_axis(log_p_BxK, label_B[:, None], axis=-1)[:, 0]
    return (1 - smoothing) * nats_B - smoothing * log_p_BxK.mean(axis=-1) if smoothing else nats_B


def measured(nats_B: jax.Array, logits_BxK: jax.Array, batch: Batch) -> tuple[jax.Array, Metrics]:
    """Return mean nats per unit of weight (0 without any), and metrics as (total, weight).

    metrics: "loss"; "accuracy", the share of labels with the largest logit; "top5", with one of the five largest. Ties
    count against the label.
    """
    weights_B = batch["weight"]
    # Negated, so that a NaN logit does not rank its label first.
    rank_B = (~(logits_BxK < jnp.take_along_axis(logits_BxK, batch["label"][:, None], axis=-1))).sum(axis=-1)

    def total(values_B: jax.Array) -> jax.Array:
        return jnp.where(weights_B > 0, values_B * weights_B, 0).sum(dtype=jnp.float32)

    weight = weights_B.sum(dtype=jnp.float32)
    metrics = {
        "loss": (total(nats_B), weight),
        "accuracy": (total(rank_B <= 1), weight),
        "top5": (total(rank_B <= 5), weight),
    }
    return total(nats_B) / jnp.where(weight > 0, weight, 1), metrics
