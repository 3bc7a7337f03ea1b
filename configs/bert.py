"""draft"""

from typing import Any

from . import base

SHAMPOO = "shampax.optimizers.shampoo:ShampooOptions"
ADAMW = "shampax.optimizers.baselines:AdamWOptions"
EMBEDDING_RATE = ((r"(.*/)?[^/]*embed[^/]*(/.*)?", 4.0), (r".*", 1.0))


def sample(config: Any) -> None:
    """Minutes on a laptop."""
    _select(
        config,
        vocab_size=1_000,
        source="sample:enwiki",
        sequence_length=64,
        predictions=10,
        max_length=64,
        layers=2,
        embed_dim=128,
        heads=4,
        mlp_dim=512,
        dropout=0.0,
        init_std=0.05,
    )
    config.optimizer = base.component(
        SHAMPOO, block_size=128, early_intervals=((20, 1),), rate_rules=EMBEDDING_RATE, beta1=0.9
    )
    config.duration = "400 steps"
    config.batch_size = 64
    config.schedule.learning_rate = 3e-3
    config.evaluation.batches = 8
    config.simulated_devices = 2


def sample_adamw(config: Any) -> None:
    sample(config)
    config.optimizer = base.component(ADAMW, rate_rules=EMBEDDING_RATE)
    config.schedule.learning_rate = 3e-3


VARIANTS = {"sample": sample, "sample_adamw": sample_adamw}


def get_config(variant: str = "sample") -> Any:
    """One of `VARIANTS`."""
    config = base.get_config()
    VARIANTS[variant](config)
    return config


def _select(config: Any, *, vocab_size: int, source: str, sequence_length: int, predictions: int, **model: Any) -> None:
    config.task = base.component("shampax.models.bert:BertTask", vocab_size=vocab_size, **model)
    config.data = base.component(
        "shampax.framework.data.masked:MaskedTextData",
        source=source,
        sequence_length=sequence_length,
        predictions=predictions,
        vocab_size=config.task.get_ref("vocab_size"),
    )
