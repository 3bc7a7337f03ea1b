"""ResNet v1.5 for image classification; docs/workloads/resnet.md says more.

sample, sample_sgd: Shampoo, and stochastic gradient descent with Nesterov momentum as the baseline.

    python -m shampax.launch.train --config=shampax/configs/resnet.py:sample --workdir=runs/resnet

  A thin network of 78 thousand parameters learns 2,000 images of Fashion-MNIST, which lie in the package, and is judged
  on 500 others, on 2 CPU cores. After 640 steps 87.5 % of these are right, under SGD 84.8 % (means of three seeds); a
  linear model has 81.4 %.

resnet50: ResNet-50 on ImageNet under stochastic gradient descent, for a v5e slice of 16 chips.

    python -m shampax.launch.train --config=shampax/configs/resnet.py:resnet50 --workdir=/mnt/runs/resnet50 \
        --config.data.data_dir=gs://BUCKET/tensorflow_datasets

  Batch 1,024 with a peak rate of 0.1 for each 256 images, 5 epochs of warm-up, 90 epochs, momentum 0.9 and decay 1e-4
  are Goyal et al.'s (arXiv 1706.02677); cosine decay and label smoothing of 0.1 are He et al.'s (arXiv 1812.01187).

paper: ResNet-50 on ImageNet under Distributed Shampoo with a batch of 32,768, for a v5e slice of 256 chips.

    python -m shampax.launch.train --config=shampax/configs/resnet.py:paper --workdir=/mnt/runs/resnet_paper \
        --config.data.data_dir=gs://BUCKET/tensorflow_datasets

  Published: 75.9 % of the validation images right after 1,729 steps, median of 50 seeds, on 256 cores of TPU v3. The
  rate, its schedule, both betas, the matrix epsilon (our ridge), the decay and what it spares, block size, first step,
  exponent, graft and momentum are those of the README of google-research/scalable_shampoo. There, kernels are merged
  dimension by dimension up to the block size, [3, 3, 128, 128] to [9, 128, 128], which is `view="tensor"` with
  `merge_dims=128` here. What it leaves to its code, and is chosen here: label smoothing of 0.1 (MLPerf's reference),
  batch statistics of each chip's 128 images, momentum 0.9 of the running statistics, and one set of hyperparameters for
  biases and norms too. Decay there joins the preconditioned gradient; here it joins the gradient.

  Both ImageNet variants need every host of the slice: call `jax.distributed.initialize()` and then
  `shampax.framework.train.train(config, workdir)` in each process.
"""

from typing import Any

from . import base

SHAMPOO = "shampax.optimizers.shampoo:ShampooOptions"
MOMENTUM = "shampax.optimizers.baselines:MomentumOptions"
SHARDING_RULES = (
    ("height", None),  # of kernels, as are the next three
    ("width", None),
    ("conv_in", "fsdp"),
    ("conv_out", "tensor"),
    ("classes", "tensor"),
)


def sample(config: Any) -> None:
    """Minutes on a laptop."""
    _select(
        config,
        classes=10,
        source="sample:fashion_mnist",
        image_size=28,
        stages=(1, 1, 1),
        width=16,
        block="basic",
        stem="small",
        stem_stride=2,
        pixel_mean=(0.286,),
        pixel_std=(0.353,),
    )
    config.optimizer = base.component(SHAMPOO, block_size=128)
    config.duration = "640 steps"
    config.batch_size = 64
    config.schedule.learning_rate = 1e-2


def sample_sgd(config: Any) -> None:
    """The same model, data and budget under stochastic gradient descent with momentum."""
    sample(config)
    config.optimizer = base.component(MOMENTUM, weight_decay=5e-4)
    config.schedule.learning_rate = 0.3


def resnet50(config: Any) -> None:
    """64 images on each of 16 chips."""
    _imagenet(config, images_per_chip=64)
    config.optimizer = base.component(MOMENTUM, weight_decay=1e-4)
    config.duration = "90 epochs"
    config.batch_size = 1_024
    config.mesh.data = 16
    config.schedule.learning_rate = 0.4
    config.schedule.warmup = "5 epochs"


def paper(config: Any) -> None:
    """128 images on each of 256 chips."""
    _imagenet(config, images_per_chip=128)
    config.optimizer = base.component(
        SHAMPOO,
        block_size=128,
        view="tensor",
        merge_dims=128,
        beta1=0.95,
        momentum="heavy_ball",
        nesterov=True,
        beta2=0.85,
        exponent=0.25,  # 1 / exponent_override
        ridge=1.5e-5,
        refresh="periodic",
        interval=1,
        start_step=25,
        graft="sgd",
        weight_decay=1e-4,
        decay="coupled",
    )
    config.duration = "1_729 steps"
    config.batch_size = 32_768
    config.mesh.data = 256
    config.schedule.learning_rate = 13.0
    config.schedule.warmup = "196 steps"
    config.schedule.decay = "quadratic"


VARIANTS = {"sample": sample, "sample_sgd": sample_sgd, "resnet50": resnet50, "paper": paper}


def get_config(variant: str = "sample") -> Any:
    """One of `VARIANTS`."""
    config = base.get_config()
    VARIANTS[variant](config)
    return config


def _imagenet(config: Any, *, images_per_chip: int) -> None:
    """ResNet-50, which normalises the images of each chip by themselves: nothing crosses chips in a forward pass."""
    _select(
        config,
        classes=1_000,
        source="tfds:imagenet2012:5.1.0",
        image_size=224,
        label_smoothing=0.1,
        batch_norm_group=images_per_chip,
        compute_dtype="bfloat16",
    )
    config.evaluation.every = "4 epochs"
    config.checkpoint.every = "4 epochs"


def _select(config: Any, *, classes: int, source: str, image_size: int, **model: Any) -> None:
    """The task and its data, which share one number of classes: an override of either moves both."""
    config.task = base.component("shampax.models.resnet:ResNetTask", classes=classes, **model)
    config.data = base.component(
        "shampax.framework.data.images:ImageData",
        source=source,
        image_size=image_size,
        classes=config.task.get_ref("classes"),
    )
    config.sharding_rules = (*config.sharding_rules, *SHARDING_RULES)
