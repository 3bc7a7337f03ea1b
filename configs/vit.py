"""Vision Transformers for image classification; docs/workloads/vit.md has the results.

sample, sample_adamw: Shampoo, and AdamW as the baseline.

    shampax train --config=vit:sample --workdir=runs/vit

  A network of 138 thousand parameters learns 2,000 vendored images of Fashion-MNIST in minutes on 2 CPU cores. After
  2,000 steps 85.0 % of 500 held-out images are right (mean of three seeds). AdamW's rate was not tuned.

s16_adamw: ViT-S/16 on ImageNet with AdamW, for a v5e slice of 16 chips. Not trained yet.

    shampax train --config=vit:s16_adamw --workdir=/mnt/runs/vit_s16 \
        --config.data.data_dir=gs://BUCKET/tensorflow_datasets

  Model, data and hyperparameters are those of Beyer, Zhai and Kolesnikov (arXiv 2205.01580): batch 1,024, 90 epochs,
  RandAugment (2, 10), mixup 0.2, rate 1e-3 with 10,000 steps of warm-up, gradients clipped to a norm of 1. Their decay
  of 1e-4 a step is 0.1 times the rate. Published: 76.5 % of the validation images right after 90 epochs.

s16: the same with Shampoo and 4 registers; b16: ViT-B/16, for a slice of 64 chips, with an average of the parameters.
  The same command with :s16 or :b16. Not trained yet; rates are ours, and not tuned.

  Run the ImageNet commands in every host of the slice, with a workdir that all hosts share (docs/clusters.md).
"""

from typing import Any

from . import base


def sample(config: Any) -> None:
    """Train a small network in minutes."""
    _select(
        config,
        classes=10,
        source="sample:fashion_mnist",
        image_size=28,
        patch_size=7,
        layers=4,
        embed_dim=64,
        heads=4,
        mlp_dim=128,
        registers=4,
        init_std=0.1,
        mixup=0.2,
        rand_augment=1,
        rand_magnitude=5,
        pixel_mean=(0.286,),
        pixel_std=(0.353,),
    )
    config.optimizer = base.component(base.SHAMPOO, block_size=128)
    config.duration = "2_000 steps"
    config.batch_size = 64
    config.schedule.learning_rate = 1e-2
    config.ema_decay = 0.98


def sample_adamw(config: Any) -> None:
    """Train the sample with AdamW."""
    sample(config)
    config.optimizer = base.component(base.ADAMW, weight_decay=0.1)
    config.schedule.learning_rate = 2e-3


def s16_adamw(config: Any) -> None:
    """Train ViT-S/16 as published."""
    _imagenet(config)
    config.optimizer = base.component(base.ADAMW, weight_decay=0.1, beta2=0.999)
    config.gradient_clip = 1.0
    config.schedule.learning_rate = 1e-3
    config.schedule.warmup = "10_000 steps"


def s16(config: Any) -> None:
    """Train ViT-S/16 with Shampoo."""
    _imagenet(config, registers=4)
    config.optimizer = base.component(base.SHAMPOO, block_size=384, weight_decay=0.1)
    config.schedule.learning_rate = 3e-3
    config.schedule.warmup = "1_000 steps"


def b16(config: Any) -> None:
    """Train ViT-B/16 with Shampoo."""
    _imagenet(config, registers=4, embed_dim=768, heads=12, mlp_dim=3_072)
    config.optimizer = base.component(base.SHAMPOO, block_size=768, weight_decay=0.1)
    config.duration = "300 epochs"
    config.schedule.learning_rate = 2e-3
    config.schedule.warmup = "2_000 steps"
    config.ema_decay = 0.9999


def _imagenet(config: Any, **fields: Any) -> None:
    _select(
        config,
        classes=1_000,
        source="tfds:imagenet2012:5.1.0",
        image_size=224,
        rand_augment=2,
        rand_magnitude=10,
        mixup=0.2,
        compute_dtype="bfloat16",
        **fields,
    )
    config.duration = "90 epochs"
    config.batch_size = 1_024
    config.evaluation.every = "4 epochs"
    config.checkpoint.every = "4 epochs"


def _select(config: Any, **fields: Any) -> None:
    task, data = "shampax.models.vit:ViTTask", "shampax.framework.data.images:ImageData"
    base.select(config, task, data, shared="classes", **fields)
    config.sharding_rules = (*config.sharding_rules, ("classes", "tensor"))


VARIANTS = {"sample": sample, "sample_adamw": sample_adamw, "s16_adamw": s16_adamw, "s16": s16, "b16": b16}
get_config = base.of_variants(VARIANTS)
