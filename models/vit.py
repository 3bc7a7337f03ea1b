"""Vision Transformers for image classification, and their task.

Dosovitskiy et al. 2021 (arXiv 2010.11929) in the plain form of Beyer, Zhai and Kolesnikov 2022 (arXiv 2205.01580):
fixed sines and cosines of both coordinates as positions, a norm before each part, and the mean over patches in place of
a class token. Registers are learned tokens beside the patches (Darcet et al. 2024, arXiv 2309.16588). Mixup is that of
Zhang et al. 2018 (arXiv 1710.09412).

Shapes in names: B batch, H height, W width, C channels, K classes, P patches of an image, R registers, T = P + R,
E embed. Parameters are float32; matmuls run in the compute dtype; norms, softmaxes and logits are float32.
"""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from . import classification
from .biased import PATTERN, Attention, GeluMLP, dense, norm
from .kernels import attention as kernels
from .layout import shard_batch
from .linen_task import Batch, BatchSpec, LinenTask, Metrics, check_options
from .modules import partitioned, run_layers

_EPSILON = 1e-6  # of the norms
_LONGEST = 10_000  # longest wavelength of the positions, in patches and units of 2 pi


@dataclasses.dataclass(frozen=True)
class ViTTask(LinenTask):
    """Classification of images by a Transformer over patches; the default is ViT-S/16.

    A batch holds uint8 "image" [B, H, W, C], int32 "label" [B] in 0 .. classes - 1, and float32 "weight" [B]; examples
    of weight 0 do not count.

    With mixup, training takes pairs of neighbours in the batch and makes of images x, y the images c x + (1 - c) y and
    c y + (1 - c) x, with the loss of both labels in these proportions; c is drawn for each pair from the distribution
    Beta(mixup, mixup). Training accuracy then refers to the first label.
    """

    classes: int = 1_000  # number of labels; must equal data.classes
    patch_size: int = 16  # side of a patch in pixels; must divide the sides of an image
    layers: int = 12  # blocks of attention and MLP
    embed_dim: int = 384  # width of the residual stream
    heads: int = 6  # attention heads, each of width embed_dim / heads
    mlp_dim: int = 1_536  # hidden width of the MLP, usually 4 embed_dim
    registers: int = 0  # learned tokens beside the patches; 4 are usual
    mixup: float = 0.0  # parameter of the Beta distribution of mixtures; 0 mixes nothing, 0.2 is usual
    label_smoothing: float = 0.0  # probability spread over all classes, in training
    init_std: float = 0.02  # standard deviation of initial kernels and registers; narrow models need more
    pixel_mean: tuple[float, ...] = (0.485, 0.456, 0.406)  # mean of each channel, of pixels from 0 to 1 (ImageNet's)
    pixel_std: tuple[float, ...] = (0.229, 0.224, 0.225)  # standard deviation of each channel
    attention: str = "auto"  # kernel: "xla", "splash" (TPU), "cudnn" (GPU), or "auto"
    remat: str = "none"  # recompute in the backward pass: none, full, dots, minimal, best, or names of values to keep
    compute_dtype: str = "float32"  # of activations and matmuls; "bfloat16" on accelerators

    def __post_init__(self):
        check_options(
            self,
            positive="classes patch_size layers embed_dim heads mlp_dim",
            not_negative="registers mixup",
            fractions="label_smoothing",
            attention=kernels.KERNELS,
        )
        for divisor, why in ((self.heads, "task.heads"), (4, "the 4 parts of the positions, which is")):
            if self.embed_dim % divisor:
                raise ValueError(
                    f"task.embed_dim={self.embed_dim}: must be divisible by {why}={divisor}; use "
                    f"{self.embed_dim // divisor * divisor or divisor}"
                )
        if self.init_std <= 0:
            raise ValueError(f"task.init_std={self.init_std}: must be above 0; 0.02 is usual")
        classification.check_pixels(self)

    def boxed(self, key: jax.Array) -> Any:
        """See `LinenTask.boxed`. Axes: layers, embed, mlp, heads, kv (in a head), classes, norm, None."""
        image = jnp.zeros((1, self.patch_size, self.patch_size, len(self.pixel_mean)))
        # There are too few patches for a kernel; parameters do not depend on their number.
        return ViT(dataclasses.replace(self, attention="xla")).init(key, image)

    def check_batch(self, batch_spec: BatchSpec) -> None:
        """See `LinenTask.check_batch`."""
        classification.check_images(self, batch_spec)
        height, width = batch_spec["image"].shape[1:3]
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"task.patch_size={self.patch_size}: must divide the sides {height} x {width} of an image; use "
                f"{math.gcd(self.patch_size, height, width)}"
            )
        self._kernel(batch_spec)

    def notes(self, batch_spec: BatchSpec) -> tuple[str, ...]:
        """Return which kernel computes attention in training, and why."""
        return ("attention: {} ({})".format(*self._kernel(batch_spec)),)

    def _kernel(self, batch_spec: BatchSpec) -> kernels.Choice:
        rows, tokens = batch_spec["image"].shape[0], self._patches(batch_spec) + self.registers
        shape = rows, tokens, self.heads, self.embed_dim // self.heads
        query = jax.ShapeDtypeStruct(shape, jnp.dtype(self.compute_dtype))
        return kernels.choose(self.attention, query, tokens, self.heads, PATTERN, drops=False)

    def _patches(self, batch_spec: BatchSpec) -> int:
        height, width = batch_spec["image"].shape[1:3]
        return (height // self.patch_size) * (width // self.patch_size)

    def loss(
        self, variables: dict[str, Any], batch: Batch, *, key: jax.Array, train: bool
    ) -> tuple[jax.Array, tuple[dict[str, Any], Metrics]]:
        """Return mean nats per unit of weight, no model state, and metrics; see `classification.measured`.

        Raises:
          ValueError: mixup has an odd number of examples.
        """
        image, labels = classification.normalized(self, batch["image"], jnp.dtype(self.compute_dtype)), batch["label"]
        smoothing = self.label_smoothing if train else 0.0
        if train and self.mixup:
            if len(labels) % 2:
                raise ValueError(
                    f"task.mixup={self.mixup}: needs pairs; use an even number of examples, not {len(labels)}"
                )
            share_B = _shares(key, self.mixup, batch["weight"])
            share_Bx1x1x1 = share_B[:, None, None, None].astype(image.dtype)
            image = share_Bx1x1x1 * image + (1 - share_Bx1x1x1) * _neighbours(image)
            logits_BxK: Any = ViT(self).apply(variables, image)
            nats_B, others_B = (
                classification.nats(logits_BxK, each, smoothing) for each in (labels, _neighbours(labels))
            )
            nats_B = share_B * nats_B + (1 - share_B) * others_B
        else:
            logits_BxK = ViT(self).apply(variables, image)
            nats_B = classification.nats(logits_BxK, labels, smoothing)
        loss, metrics = classification.measured(nats_B, logits_BxK, batch)
        return loss, ({}, metrics)

    def logits(self, variables: dict[str, Any], batch: Batch) -> jax.Array:
        """Return logits, float32 [B, K]."""
        image = classification.normalized(self, batch["image"], jnp.dtype(self.compute_dtype))
        logits: Any = ViT(self).apply(variables, image)
        return logits

    def flops(self, batch_spec: BatchSpec) -> float:
        """Return the training FLOPs of one batch: six per multiplication of the forward pass's matrix products.

        An image has layers x (4 E^2 + 2 E M + 2 T E) in each of T slots, the kernel of the patches in each of P, and
        E K. Recomputation by remat, norms and softmaxes are not counted, as is usual for MFU.
        """
        embed, patches = self.embed_dim, self._patches(batch_spec)
        tokens = patches + self.registers
        slot = self.layers * (4 * embed**2 + 2 * embed * self.mlp_dim + 2 * tokens * embed)
        patch = self.patch_size**2 * len(self.pixel_mean) * embed
        return 6.0 * batch_spec["image"].shape[0] * (tokens * slot + patches * patch + embed * self.classes)


def _neighbours(x_Bx: jax.Array) -> jax.Array:
    """Swap the two examples of each pair of neighbours."""
    pairs = x_Bx.reshape(len(x_Bx) // 2, 2, *x_Bx.shape[1:])
    return pairs[:, ::-1].reshape(x_Bx.shape)


def _shares(key: jax.Array, mixup: float, weights_B: jax.Array) -> jax.Array:
    """Return the share of each example in its mixture; 1 if it or its neighbour has no weight."""
    pairs = jax.random.beta(key, mixup, mixup, (len(weights_B) // 2,))
    real_B = (weights_B > 0) & (_neighbours(weights_B) > 0)
    return jnp.where(real_B, jnp.repeat(pairs, 2), 1.0)


class ViT(nn.Module):
    """Maps normalised images [B, H, W, C] to logits float32 [B, K]."""

    task: ViTTask

    @nn.compact
    def __call__(self, image_BxHxWxC: jax.Array) -> jax.Array:
        """Return logits."""
        task = self.task
        dtype = image_BxHxWxC.dtype
        patches_BxhxwxN = _patches(image_BxHxWxC, task.patch_size)
        high, wide = patches_BxhxwxN.shape[1:3]
        patches_BxPxN = patches_BxhxwxN.reshape(len(image_BxHxWxC), high * wide, -1)
        x_BxTxE = dense(task, task.embed_dim, (None,), ("embed",), name="patches")(patches_BxPxN)
        x_BxTxE += positions(high, wide, task.embed_dim).astype(dtype)
        if task.registers:
            init = partitioned(nn.initializers.truncated_normal(task.init_std), None, "embed")
            registers_RxE = self.param("registers", init, (task.registers, task.embed_dim)).astype(dtype)
            beside = jnp.broadcast_to(registers_RxE, (len(x_BxTxE), *registers_RxE.shape))
            x_BxTxE = jnp.concatenate([x_BxTxE, beside], axis=1)
        x_BxTxE = shard_batch(x_BxTxE)
        real_BxT = jnp.ones(x_BxTxE.shape[:2], jnp.int32)
        x_BxTxE, _ = run_layers(Block, (task,), x_BxTxE, real_BxT, layers=task.layers, remat=task.remat)
        x_BxTxE = norm("norm", dtype, _EPSILON)(x_BxTxE)
        x_BxE = shard_batch(x_BxTxE[:, : high * wide].astype(jnp.float32).mean(axis=1))
        zeros = nn.initializers.zeros_init()
        return nn.Dense(
            task.classes,
            kernel_init=partitioned(zeros, "embed", "classes"),
            bias_init=partitioned(zeros, "classes"),
            name="classifier",
        )(x_BxE)


class Block(nn.Module):
    """A norm and attention, then a norm and an MLP, each added to the residual stream [B, T, E]."""

    task: ViTTask

    @nn.compact
    def __call__(self, x_BxTxE: jax.Array, real_BxT: jax.Array) -> tuple[jax.Array, None]:
        """Return the residual stream after this layer."""
        dtype = x_BxTxE.dtype
        normed = norm("attention_norm", dtype, _EPSILON)(x_BxTxE)
        x_BxTxE += Attention(self.task, name="attention")(normed, real_BxT)
        normed = norm("mlp_norm", dtype, _EPSILON)(x_BxTxE)
        return shard_batch(x_BxTxE + GeluMLP(self.task, name="mlp")(normed)), None


def _patches(image_BxHxWxC: jax.Array, side: int) -> jax.Array:
    """Return the pixels of square patches, [B, H / side, W / side, side side C]."""
    count, height, width, channels = image_BxHxWxC.shape
    x = image_BxHxWxC.reshape(count, height // side, side, width // side, side, channels)
    return x.swapaxes(2, 3).reshape(count, height // side, width // side, side * side * channels)


def positions(high: int, wide: int, embed: int) -> jax.Array:
    """Return sines and cosines of the row and the column of each patch, float32 [high wide, E].

    A quarter of the E numbers each; wavelengths are 2 pi to 20,000 pi patches, as in arXiv 2205.01580.
    """
    frequency = 1 / _LONGEST ** (jnp.arange(embed // 4) / max(embed // 4 - 1, 1))
    rows, columns = (jnp.arange(count)[:, None] * frequency for count in (high, wide))
    shape = high, wide, embed // 4
    parts = [
        jnp.broadcast_to(wave(angle), shape) for angle in (rows[:, None], columns[None]) for wave in (jnp.sin, jnp.cos)
    ]
    return jnp.concatenate(parts, axis=-1).reshape(high * wide, embed)
