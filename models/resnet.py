"""Residual networks for image classification, ResNet v1.5, and their task.

He et al. 2016 (arXiv 1512.03385) with the stride of a bottleneck in its 3x3 convolution, as in MLPerf's "v1.5". Shapes
in names: B batch, H height, W width, C channels, K classes.

Parameters are float32; convolutions run in the compute dtype; normalisation, logits and loss are float32.

Initialisation follows Goyal et al. 2017 (arXiv 1706.02677, section 5.1): convolutions are normal with variance
2 / fan_out, the scale of the last normalisation of each block is 0, so that a block begins as its shortcut, and the
classifier has standard deviation 0.01.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from . import classification
from .batch_norm import BatchNorm
from .layout import shard_batch
from .linen_task import Batch, BatchSpec, LinenTask, Metrics, check_options
from .modules import partitioned, scan_layers

_EXPANSION = {"bottleneck": 4, "basic": 1}  # channels of a block's result, relative to its width


@dataclasses.dataclass(frozen=True)
class ResNetTask(LinenTask):
    """Classification of images.

    A batch holds uint8 "image" [B, H, W, C], int32 "label" [B] in 0 .. classes - 1, and float32 "weight" [B]:
    examples of weight 0 do not count, not even in batch statistics. The default is ResNet-50.
    """

    classes: int = 1_000  # number of labels; must equal data.classes
    stages: tuple[int, ...] = (3, 4, 6, 3)  # blocks per stage; every stage but the first halves the image
    width: int = 64  # channels inside the blocks of the first stage; each later stage doubles them
    block: str = "bottleneck"  # "bottleneck": 1x1, 3x3, 1x1 with 4x channels; "basic": 3x3 twice
    stem: str = "imagenet"  # "imagenet": 7x7 and pool, stride 2 each; "small": one 3x3, for images of 28 or 32
    stem_stride: int = 1  # stride of the small stem; 2 makes all later layers four times cheaper
    label_smoothing: float = 0.0  # probability spread over all classes, in training (MLPerf: 0.1)
    batch_norm_group: int = 0  # examples normalised together; 0 is the whole micro-batch, on all devices
    batch_norm_momentum: float = 0.9  # momentum of the running statistics; short runs need less
    pixel_mean: tuple[float, ...] = (0.485, 0.456, 0.406)  # mean of each channel, of pixels from 0 to 1 (ImageNet's)
    pixel_std: tuple[float, ...] = (0.229, 0.224, 0.225)  # standard deviation of each channel
    compute_dtype: str = "float32"  # of convolutions and activations; "bfloat16" on accelerators

    def __post_init__(self):
        check_options(
            self,
            positive="classes width stem_stride",
            not_negative="batch_norm_group",
            fractions="label_smoothing batch_norm_momentum",
            block=_EXPANSION,
            stem=("imagenet", "small"),
        )
        if not self.stages or min(self.stages) < 1:
            raise ValueError(f"task.stages={self.stages}: each needs at least 1 block, as in (3, 4, 6, 3)")
        if self.stem == "imagenet" and self.stem_stride != 1:
            raise ValueError(f"task.stem_stride={self.stem_stride}: applies to the small stem; leave it at 1")
        classification.check_pixels(self)

    def boxed(self, key: jax.Array) -> Any:
        """See `LinenTask.boxed`.

        Axes: layers (equal blocks of a stage), height, width, conv_in, conv_out (of kernels; Shampoo uses a matrix
        [height x width x conv_in, conv_out]), classes, norm (channels of normalisations and their statistics).
        """
        image = jnp.zeros((1, 32, 32, len(self.pixel_mean)), jnp.uint8)  # no parameter depends on the image's size
        return ResNet(self, train=False).init(key, image, jnp.ones(1))

    def check_batch(self, batch_spec: BatchSpec) -> None:
        """See `LinenTask.check_batch`."""
        classification.check_images(self, batch_spec)

    def loss(
        self, variables: dict[str, Any], batch: Batch, *, key: jax.Array, train: bool
    ) -> tuple[jax.Array, tuple[dict[str, Any], Metrics]]:
        """Return mean nats per unit of weight, the new batch statistics, and metrics; see `classification.measured`."""
        del key  # nothing is random
        logits_BxK, model_state = self.logits(variables, batch, train=train)
        nats_B = classification.nats(logits_BxK, batch["label"], self.label_smoothing if train else 0.0)
        loss, metrics = classification.measured(nats_B, logits_BxK, batch)
        return loss, (model_state, metrics)

    def logits(self, variables: dict[str, Any], batch: Batch, *, train: bool) -> tuple[jax.Array, dict[str, Any]]:
        """Return logits, float32 [B, K], and the batch statistics, updated in training."""
        output: Any = ResNet(self, train).apply(
            variables, batch["image"], batch["weight"], mutable=["batch_stats"] if train else False
        )
        return output if train else (output, {name: variables[name] for name in variables if name != "params"})

    def flops(self, batch_spec: BatchSpec) -> float:
        """Return the training FLOPs of one batch: six per multiplication of a forward pass.

        Convolutions and the classifier count, with the zeros that pad an image; normalisation and pooling do not.
        """
        examples, height, width, channels = batch_spec["image"].shape
        products = 0
        for kernel, stride, channels_in, channels_out, before in self._convolutions(channels):
            at = (math.ceil(side / (before * stride)) for side in (height, width))
            products += kernel**2 * channels_in * channels_out * math.prod(at)
        features = self.width * 2 ** (len(self.stages) - 1) * _EXPANSION[self.block]
        return float(6 * examples * (products + features * self.classes))

    def _convolutions(self, channels: int) -> Iterator[tuple[int, int, int, int, int]]:
        """Yield (kernel, stride, channels in, channels out, factor by which the image was reduced before) of each."""
        kernel, stride, pool = (7, 2, 2) if self.stem == "imagenet" else (3, self.stem_stride, 1)
        yield kernel, stride, channels, self.width, 1
        scale, channels = stride * pool, self.width
        for stage, blocks in enumerate(self.stages):
            for number in range(blocks):
                stride, shortcut, plan = _plan(self, stage, number)
                if shortcut:
                    yield 1, stride, channels, plan[-1][1], scale
                for kernel, channels_out, stride in plan:
                    yield kernel, stride, channels, channels_out, scale
                    scale, channels = scale * stride, channels_out


def _plan(task: ResNetTask, stage: int, number: int) -> tuple[int, bool, list[tuple[int, int, int]]]:
    """Return a block's stride, whether its shortcut is a convolution, and its (kernel, channels out, stride)s."""
    width = task.width * 2**stage
    stride = 2 if stage and not number else 1
    if task.block == "basic":
        # The stem already has the channels of the first stage.
        return stride, bool(stage) and not number, [(3, width, stride), (3, width, 1)]
    return stride, not number, [(1, width, 1), (3, width, stride), (1, width * _EXPANSION["bottleneck"], 1)]


class ResNet(nn.Module):
    """Maps images uint8 [B, H, W, C] and weights [B] to logits float32 [B, K]."""

    task: ResNetTask
    train: bool

    @nn.compact
    def __call__(self, image_BxHxWxC: jax.Array, weights_B: jax.Array) -> jax.Array:
        """Return logits."""
        task = self.task
        dtype = jnp.dtype(task.compute_dtype)
        x = classification.normalized(task, image_BxHxWxC, dtype)

        small = task.stem == "small"
        x = _conv(task, task.width, 3 if small else 7, task.stem_stride if small else 2, "stem")(x)
        x = nn.relu(_norm(task, "stem_norm")(x, weights_B, self.train))
        if not small:
            around = ((1, 1), (1, 1))
            x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=around)  # pyright: ignore[reportArgumentType]
        x = shard_batch(x)

        for stage, blocks in enumerate(task.stages):
            x = Block(task, self.train, stage, 0, name=f"stage{stage + 1}_first")(x, weights_B)
            if blocks > 1:
                stack = scan_layers(
                    lambda block, x, weights_B: (block(x, weights_B), None), blocks - 1, state=("batch_stats",)
                )
                x, _ = stack(Block(task, self.train, stage, 1, name=f"stage{stage + 1}_rest"), x, weights_B)

        x_BxC = x.astype(jnp.float32).mean(axis=(1, 2))
        init = partitioned(nn.initializers.normal(0.01), "conv_in", "classes")
        bias_init = partitioned(nn.initializers.zeros_init(), "classes")
        return nn.Dense(task.classes, kernel_init=init, bias_init=bias_init, name="classifier")(x_BxC)


class Block(nn.Module):
    """Convolutions beside a shortcut: [B, H, W, C] to [B, H / stride, W / stride, C'].

    `number` counts the blocks of the stage; the first changes the shape, all others are equal.
    """

    task: ResNetTask
    train: bool
    stage: int
    number: int

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array, weights_B: jax.Array) -> jax.Array:
        """Return the images after this block."""
        task = self.task
        stride, shortcut, plan = _plan(task, self.stage, self.number)
        y, kept = x_BxHxWxC, x_BxHxWxC
        for i, (kernel, channels, step) in enumerate(plan, 1):
            y = _conv(task, channels, kernel, step, f"conv{i}")(y)
            y = _norm(task, f"norm{i}", zero_scale=i == len(plan))(y, weights_B, self.train)
            y = nn.relu(y) if i < len(plan) else y
        if shortcut:
            kept = _conv(task, plan[-1][1], 1, stride, "shortcut")(kept)
            kept = _norm(task, "shortcut_norm")(kept, weights_B, self.train)
        return shard_batch(nn.relu(kept + y))


def _conv(task: ResNetTask, channels: int, kernel: int, stride: int, name: str) -> nn.Conv:
    """Return a convolution padded equally on both sides; its result has ceil(side / stride) places."""
    init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
    return nn.Conv(
        channels,
        (kernel, kernel),
        strides=stride,
        padding=((kernel // 2, kernel // 2),) * 2,
        use_bias=False,
        dtype=jnp.dtype(task.compute_dtype),
        kernel_init=partitioned(init, "height", "width", "conv_in", "conv_out"),
        name=name,
    )


def _norm(task: ResNetTask, name: str, zero_scale: bool = False) -> BatchNorm:
    return BatchNorm(
        momentum=task.batch_norm_momentum,
        group=task.batch_norm_group,
        zero_scale=zero_scale,
        dtype=jnp.dtype(task.compute_dtype),
        name=name,
    )
