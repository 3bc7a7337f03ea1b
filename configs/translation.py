"""Translation."""

from typing import Any

from . import base

SHAMPOO = "shampax.optimizers.shampoo:ShampooOptions"
ADAMW = "shampax.optimizers.baselines:AdamWOptions"
EMBEDDING_RATE = ((r"(.*/)?[^/]*embed[^/]*(/.*)?", 4.0), (r".*", 1.0))


def sample(config: Any) -> None:
    """Minutes on a laptop."""
    _select(config, vocab_size=2_048, source="sample:nt", source_length=112, target_length=128, dropout=0.1)
    config.optimizer = base.component(
        SHAMPOO, block_size=128, early_intervals=((30, 1),), beta1=0.8, rate_rules=EMBEDDING_RATE
    )
    config.duration = "400 steps"
    config.batch_size = 24
    config.schedule.learning_rate = 6e-3
    config.simulated_devices = 2


def sample_adam(config: Any) -> None:
    """The same model, data and budget under AdamW."""
    sample(config)
    config.optimizer = base.component(ADAMW, rate_rules=EMBEDDING_RATE)
    config.schedule.learning_rate = 3e-3


VARIANTS = {"sample": sample, "sample_adam": sample_adam}


def get_config(variant: str = "sample") -> Any:
    """One of `VARIANTS`."""
    config = base.get_config()
    VARIANTS[variant](config)
    return config


def _select(config: Any, *, vocab_size: int, source: str, source_length: int, target_length: int, **model: Any) -> None:
    """The task and its data, which share one vocabulary: an override of either size moves both."""
    config.task = base.component("shampax.models.translation:TranslationTask", vocab_size=vocab_size, **model)
    config.data = base.component(
        "shampax.framework.data.pairs:PairData",
        source=source,
        source_length=source_length,
        target_length=target_length,
        vocab_size=config.task.get_ref("vocab_size"),
    )
