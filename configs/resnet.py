"""ResNet v1.5 for image classification; docs/workloads/resnet.md has the results.

sample, sample_sgd: Shampoo, and stochastic gradient descent with Nesterov momentum as the baseline.

    shampax train --config=resnet:sample --workdir=runs/resnet

  A network of 78 thousand parameters learns 2,000 vendored images of Fashion-MNIST in two minutes on 2 CPU cores. After
  640 steps 87.5 % of 500 held-out images are right, with SGD 84.8 % (means of three seeds); a linear model reaches
  81.4 %.

resnet50: ResNet-50 on ImageNet with stochastic gradient descent, for a v5e slice of 16 chips. Not trained yet.

    shampax train --config=resnet:resnet50 --workdir=/mnt/runs/resnet50 \
        --config.data.data_dir=gs://BUCKET/tensorflow_datasets

  Batch 1,024, a peak rate of 0.1 per 256 images, 5 epochs of warm-up, 90 epochs, momentum 0.9 and decay 1e-4 are those
  of Goyal et al. (arXiv 1706.02677). Cosine decay and label smoothing of 0.1 are those of He et al.
  (arXiv 1812.01187).

paper: ResNet-50 on ImageNet with Distributed Shampoo, batch 32,768, for a v5e slice of 256 chips; the same command with
  :paper. Not trained yet.

  Published: 75.9 % of the validation images right after 1,729 steps, median of 50 seeds, on 256 cores of TPU v3. The
  README of google-research/scalable_shampoo gives the rate, its schedule, both betas, the matrix epsilon (our ridge),
  decay and its exceptions, block size, first step, exponent, graft and momentum. It merges the dimensions of kernels up
  to the block size, [3, 3, 128, 128] to [9, 128, 128], as `view="tensor"` with `merge_dims=128` does here. It leaves
  open, and here are: label smoothing of 0.1 (MLPerf's reference), batch statistics of each chip's 128 images, momentum
  0.9 of the running statistics, and the same hyperparameters for biases and norms. Its decay joins the preconditioned
  gradient; ours joins the gradient.

  Run the ImageNet commands in every host of the slice, with a workdir that all hosts share (docs/clusters.md).
"""

from typing import Any

from . import base

MOMENTUM = "shampax.optimizers.baselines:MomentumOptions"
SHARDING_RULES = (
    ("height", None),  # of kernels, like the next three
    ("width", None),
    ("conv_in", "fsdp"),
    ("conv_out", "tensor"),
    ("classes", "tensor"),
)


def sample(config: Any) -> None:
    """Train a thin network in two minutes."""
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
    config.optimizer = base.component(base.SHAMPOO, block_size=128, **base.WITHOUT_ORTHOGONALIZING, early_intervals=())
    config.duration = "640 steps"
    config.batch_size = 64
    config.schedule.learning_rate = 1e-2


def sample_sgd(config: Any) -> None:
    """Train the sample with stochastic gradient descent with momentum."""
    sample(config)
    config.optimizer = base.component(MOMENTUM, weight_decay=5e-4)
    config.schedule.learning_rate = 0.3


def resnet50(config: Any) -> None:
    """Train ResNet-50 on 64 images on each of 16 chips."""
    _imagenet(config, images_per_chip=64)
    config.optimizer = base.component(MOMENTUM, weight_decay=1e-4)
    config.duration = "90 epochs"
    config.batch_size = 1_024
    config.mesh.data = 16
    config.schedule.learning_rate = 0.4
    config.schedule.warmup = "5 epochs"


def paper(config: Any) -> None:
    """Train ResNet-50 on 128 images on each of 256 chips."""
    _imagenet(config, images_per_chip=128)
    config.optimizer = base.component(
        base.SHAMPOO,
        block_size=128,
        view="tensor",
        merge_dims=128,
        beta1=0.95,
        momentum="heavy_ball",
        nesterov=True,
        beta2=0.85,
        exponent=0.25,  # 1 / exponent_override
        ridge=1.5e-5,
        phases=1,
        interval=1,
        start_step=25,
        graft="sgd",
        diagonal="sgd",
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
BASELINES = {"sample": "sample_sgd"}
get_config = base.of_variants(VARIANTS)


def _imagenet(config: Any, *, images_per_chip: int) -> None:
    """Select ResNet-50 with batch statistics per chip, so that nothing crosses chips in a forward pass."""
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


def _select(config: Any, **fields: Any) -> None:
    task, data = "shampax.models.resnet:ResNetTask", "shampax.framework.data.images:ImageData"
    base.select(config, task, data, shared="classes", **fields)
    config.sharding_rules = (*config.sharding_rules, *SHARDING_RULES)
