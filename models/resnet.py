"""Residual networks for image classification, ResNet v1.5, and their task.

He et al. 2016 (arXiv 1512.03385) with the stride of a bottleneck in its 3x3 convolution, as MLPerf's "v1.5" has it.
Shapes in names: B batch, H height, W width, C channels, K classes.

Parameters are float32; convolutions run in the compute dtype; normalisation, logits and loss are float32.

Initialisation is that of Goyal et al. 2017 (arXiv 1706.02677, section 5.1): convolutions are normal with variance
2 / fan_out, the scale of the last normalisation of each block is 0, so that a block begins as its shortcut, and the
classifier has standard deviation 0.01.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from .batch_norm import BatchNorm
from .layout import shard_batch

Batch = Mapping[str, jax.Array]
BatchSpec = Mapping[str, jax.ShapeDtypeStruct]
Metrics = dict[str, tuple[jax.Array, jax.Array]]

_EXPANSION = {"bottleneck": 4, "basic": 1}  # channels of a block's result, relative to its width
_STEMS = ("imagenet", "small")


@dataclasses.dataclass(frozen=True)
class ResNetTask:
    """Classification of images, as the trainer sees it.

    A batch holds uint8 "image" [B, H, W, C], int32 "label" [B] in 0 .. classes - 1, and float32 "weight" [B]: 0 for
    examples that count for nothing, not in batch statistics either. ResNet-50 is the default.
    """

    classes: int = 1_000  # must be the data's
    stages: tuple[int, ...] = (3, 4, 6, 3)  # blocks in each; every stage but the first halves the image
    width: int = 64  # channels inside the blocks of the first stage; each further stage has twice as many
    block: str = "bottleneck"  # 1x1, 3x3, 1x1 with four times as many channels out; or "basic", 3x3 twice
    stem: str = "imagenet"  # 7x7 with stride 2 and a pool with stride 2; or "small", one 3x3, for images of 28 or 32
    stem_stride: int = 1  # of the small stem; 2 makes all that follows four times as cheap
    label_smoothing: float = 0.0  # share of the target spread over all classes, in training (MLPerf: 0.1)
    batch_norm_group: int = 0  # examples normalised together; 0 is all of a micro-batch, on all devices
    batch_norm_momentum: float = 0.9  # of the running statistics; less for a short run
    batch_norm_epsilon: float = 1e-5  # added to the variance
    pixel_mean: tuple[float, ...] = (0.485, 0.456, 0.406)  # of each channel, of pixels from 0 to 1: ImageNet's
    pixel_std: tuple[float, ...] = (0.229, 0.224, 0.225)  # likewise
    compute_dtype: str = "float32"  # of convolutions and activations; "bfloat16" on accelerators
    scan_blocks: bool = True  # one traced block for all like ones of a stage; False unrolls them, to compare

    def __post_init__(self):
        if not self.stages or min(self.stages) < 1:
            raise ValueError(f"task.stages is {self.stages}; each needs at least 1 block, as in (3, 4, 6, 3)")
        for name in ("classes", "width", "stem_stride"):
            if getattr(self, name) < 1:
                raise ValueError(f"task.{name} is {getattr(self, name)}; it must be at least 1")
        if self.block not in _EXPANSION:
            raise ValueError(f"task.block is {self.block!r}; use one of {', '.join(_EXPANSION)}")
        if self.stem not in _STEMS:
            raise ValueError(f"task.stem is {self.stem!r}; use one of {', '.join(_STEMS)}")
        if self.stem == "imagenet" and self.stem_stride != 1:
            raise ValueError(f"task.stem_stride is {self.stem_stride}, but it is the small stem's; leave it at 1")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"task.label_smoothing is {self.label_smoothing}; it must be at least 0 and below 1")
        if not 0 <= self.batch_norm_momentum < 1:
            raise ValueError(f"task.batch_norm_momentum is {self.batch_norm_momentum}; it must be 0 or more, below 1")
        if self.batch_norm_group < 0 or self.batch_norm_epsilon <= 0:
            raise ValueError(
                f"task.batch_norm_group {self.batch_norm_group} must be >= 0 and task.batch_norm_epsilon "
                f"{self.batch_norm_epsilon} > 0"
            )
        if len(self.pixel_mean) != len(self.pixel_std) or not self.pixel_mean or min(self.pixel_std) <= 0:
            raise ValueError(
                f"task.pixel_mean {self.pixel_mean} and task.pixel_std {self.pixel_std} need a value for each channel, "
                "and the latter must be positive"
            )
        if self.compute_dtype not in ("float32", "bfloat16"):
            raise ValueError(f"task.compute_dtype is {self.compute_dtype!r}; use 'float32' or 'bfloat16'")

    def init(self, key: jax.Array, batch_spec: BatchSpec) -> dict[str, Any]:
        """{"params": ..., "batch_stats": ...}, float32 plain dicts; pure, works under jax.eval_shape.

        Raises:
          ValueError: the batch has no images, or none with as many channels as `pixel_mean` has values.
        """
        if "image" not in batch_spec:
            raise ValueError(f"the batch has {sorted(batch_spec)} and no 'image'; a ResNet needs image data")
        if batch_spec["image"].shape[3:] != (len(self.pixel_mean),):
            raise ValueError(
                f"images of shape {batch_spec['image'].shape} do not have the {len(self.pixel_mean)} channels of "
                f"task.pixel_mean {self.pixel_mean}; give it, and task.pixel_std, a value for each channel"
            )
        return nn.unbox(self._boxed_init(key))

    def loss(
        self, variables: dict[str, Any], batch: Batch, *, key: jax.Array, train: bool
    ) -> tuple[jax.Array, tuple[dict[str, Any], Metrics]]:
        """Mean nats per unit of weight, the new batch statistics, and the metrics as (total, weight).

        metrics: "loss", in training with label smoothing (Szegedy et al. 2016, section 7); "accuracy", the share of
        labels that have the largest logit; "top5", of those among the five largest. Ties count against the label.
        """
        del key  # nothing is random
        weights_B = batch["weight"]
        logits_BxK, model_state = self.logits(variables, batch, train=train)
        log_p_BxK = jax.nn.log_softmax(logits_BxK)
        label_Bx1 = batch["label"][:, None]
        nats_B = -jnp.take_along_axis(log_p_BxK, label_Bx1, axis=-1)[:, 0]
        if train and self.label_smoothing:
            nats_B = (1 - self.label_smoothing) * nats_B - self.label_smoothing * log_p_BxK.mean(axis=-1)
        # Negated, so that a logit that is not a number ranks no label first.
        rank_B = (~(logits_BxK < jnp.take_along_axis(logits_BxK, label_Bx1, axis=-1))).sum(axis=-1)

        def total(values_B: jax.Array) -> jax.Array:
            return jnp.where(weights_B > 0, values_B * weights_B, 0).sum(dtype=jnp.float32)

        weight = weights_B.sum(dtype=jnp.float32)
        metrics = {
            "loss": (total(nats_B), weight),
            "accuracy": (total(rank_B <= 1), weight),
            "top5": (total(rank_B <= 5), weight),
        }
        return total(nats_B) / jnp.where(weight > 0, weight, 1), (model_state, metrics)

    def logits(self, variables: dict[str, Any], batch: Batch, *, train: bool) -> tuple[jax.Array, dict[str, Any]]:
        """Float32 [B, K], and the batch statistics, new ones in training."""
        output: Any = ResNet(self, train).apply(
            variables, batch["image"], batch["weight"], mutable=["batch_stats"] if train else False
        )
        return output if train else (output, {name: variables[name] for name in variables if name != "params"})

    def logical_axes(self, variables: dict[str, Any]) -> dict[str, Any]:
        """A tuple of names per array, one for each dimension.

        Names: layers (like blocks of a stage), height, width, conv_in, conv_out (of kernels; Shampoo sees a matrix
        [height x width x conv_in, conv_out]), classes, norm (channels of normalisations and their statistics).
        """
        boxed = jax.eval_shape(lambda: self._boxed_init(jax.random.key(0)))
        names = jax.tree.map(
            lambda box: tuple(box.names), boxed, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)
        )
        return jax.tree.map(lambda _, axes: axes, variables, names)

    def flops(self, batch_spec: BatchSpec) -> float:
        """Training FLOPs of one batch: six for each multiplication of convolutions and classifier in a forward pass.

        Products with the zeros that pad an image count, as hardware computes them; normalisation and pooling do not.
        """
        examples, height, width, channels = batch_spec["image"].shape
        products = 0
        for kernel, stride, channels_in, channels_out, before in self._convolutions(channels):
            at = (math.ceil(side / (before * stride)) for side in (height, width))
            products += kernel**2 * channels_in * channels_out * math.prod(at)
        return float(6 * examples * (products + self._features * self.classes))

    @property
    def _features(self) -> int:
        """Channels that the classifier reads."""
        return self.width * 2 ** (len(self.stages) - 1) * _EXPANSION[self.block]

    def _convolutions(self, channels: int) -> Iterator[tuple[int, int, int, int, int]]:
        """(kernel, stride, channels in, channels out, how often the image is halved before, as a factor) of each."""
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

    def _boxed_init(self, key: jax.Array) -> Any:
        image = jnp.zeros((1, 32, 32, len(self.pixel_mean)), jnp.uint8)  # no parameter depends on the image's size
        return ResNet(self, train=False).init(key, image, jnp.ones(1))


def _plan(task: ResNetTask, stage: int, number: int) -> tuple[int, bool, list[tuple[int, int, int]]]:
    """Of a block: its stride, whether its shortcut is a convolution, and its (kernel, channels out, stride)s."""
    width = task.width * 2**stage
    stride = 2 if stage and not number else 1
    if task.block == "basic":
        # The stem's channels are those of the first stage already.
        return stride, bool(stage) and not number, [(3, width, stride), (3, width, 1)]
    return stride, not number, [(1, width, 1), (3, width, stride), (1, width * _EXPANSION["bottleneck"], 1)]


class ResNet(nn.Module):
    """Images uint8 [B, H, W, C] and weights [B] to logits float32 [B, K]."""

    task: ResNetTask
    train: bool

    @nn.compact
    def __call__(self, image_BxHxWxC: jax.Array, weights_B: jax.Array) -> jax.Array:
        """Logits."""
        task = self.task
        dtype = jnp.dtype(task.compute_dtype)
        mean, std = jnp.array(task.pixel_mean), jnp.array(task.pixel_std)
        x = ((image_BxHxWxC.astype(jnp.float32) / 255 - mean) / std).astype(dtype)

        small = task.stem == "small"
        x = _conv(task, task.width, 3 if small else 7, task.stem_stride if small else 2, "stem")(x)
        x = nn.relu(_norm(task, "stem_norm")(x, weights_B, self.train))
        if not small:
            around = ((1, 1), (1, 1))
            x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=around)  # pyright: ignore[reportArgumentType]
        x = shard_batch(x)

        for stage, blocks in enumerate(task.stages):
            x = Block(task, self.train, stage, 0, name=f"stage{stage + 1}_first")(x, weights_B)
            rest = f"stage{stage + 1}_rest"
            if blocks > 1 and task.scan_blocks:
                stack = nn.scan(
                    lambda block, x, weights_B: (block(x, weights_B), None),
                    variable_axes={"params": 0, "batch_stats": 0},
                    split_rngs={"params": True},
                    in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType]
                    length=blocks - 1,
                    metadata_params={nn.PARTITION_NAME: "layers"},
                )
                x, _ = stack(Block(task, self.train, stage, 1, name=rest), x, weights_B)
            elif blocks > 1:
                for number in range(1, blocks):
                    x = Block(task, self.train, stage, number, name=f"{rest}_{number}")(x, weights_B)

        x_BxC = x.astype(jnp.float32).mean(axis=(1, 2))
        init = nn.with_logical_partitioning(nn.initializers.normal(0.01), ("conv_in", "classes"))
        bias_init = nn.with_logical_partitioning(nn.initializers.zeros_init(), ("classes",))
        return nn.Dense(task.classes, kernel_init=init, bias_init=bias_init, name="classifier")(x_BxC)


class Block(nn.Module):
    """Convolutions beside a shortcut: [B, H, W, C] to [B, H / stride, W / stride, C'].

    `number` is the block's in its stage; the first changes the shape, all others are alike.
    """

    task: ResNetTask
    train: bool
    stage: int
    number: int

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array, weights_B: jax.Array) -> jax.Array:
        """The images after this block."""
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
    """Padded evenly on both sides, so that the result has ceil(side / stride) places."""
    init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
    return nn.Conv(
        channels,
        (kernel, kernel),
        strides=stride,
        padding=((kernel // 2, kernel // 2),) * 2,
        use_bias=False,
        dtype=jnp.dtype(task.compute_dtype),
        kernel_init=nn.with_logical_partitioning(init, ("height", "width", "conv_in", "conv_out")),
        name=name,
    )


def _norm(task: ResNetTask, name: str, zero_scale: bool = False) -> BatchNorm:
    return BatchNorm(
        momentum=task.batch_norm_momentum,
        epsilon=task.batch_norm_epsilon,
        group=task.batch_norm_group,
        zero_scale=zero_scale,
        dtype=jnp.dtype(task.compute_dtype),
        name=name,
    )
