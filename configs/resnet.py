"""ResNet v1.5 on images."""

from typing import Any

from . import base

SHAMPOO = "shampax.optimizers.shampoo:ShampooOptions"
MOMENTUM = "shampax.optimizers.baselines:MomentumOptions"
SHARDING_RULES = (
    ("height", None),  # of a kernel
    ("width", None),
    ("conv_in", "fsdp"),
    ("conv_out", "tensor"),
    ("classes", "tensor"),
)


def sample(config: Any) -> None:
    """A thin network on 2,000 images of Fashion-MNIST."""
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
        batch_norm_momentum=0.9,
    )
    config.optimizer = base.component(SHAMPOO, block_size=128, interval=10, early_intervals=((30, 1),))
    config.duration = "12 epochs"
    config.batch_size = 64
    config.schedule.learning_rate = 3e-3
    config.evaluation.best_metric = "loss"


def sample_sgd(config: Any) -> None:
    """The same model, data and budget under stochastic gradient descent with momentum."""
    sample(config)
    config.optimizer = base.component(MOMENTUM, weight_decay=5e-4)
    config.schedule.learning_rate = 0.05


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


VARIANTS = {"sample": sample, "sample_sgd": sample_sgd}


def get_config(variant: str = "sample") -> Any:
    """One of `VARIANTS`."""
    config = base.get_config()
    VARIANTS[variant](config)
    return config
