"""Translation by an encoder-decoder Transformer; docs/workloads/translation.md has what was measured.

sample, sample_adam: English to French on verses of the New Testament, and a baseline.

    python -m shampax.launch.train --config=shampax/configs/translation.py:sample --workdir=runs/translation

  1.2 M parameters, 300 steps of about 59 verses on 2 CPU cores that simulate 2 devices. After them the held-out loss is
  2.92 nats per token and BLEU 11.1 on the chapters held out (one seed); English left as it is has 0.2. Then

    python -m shampax.launch.translate --workdir=runs/translation < sentences.txt

base: Transformer-base on WMT'14 English to German, for a v5e slice of 16 chips.

    python -m shampax.launch.train --config=shampax/configs/translation.py:base --workdir=/mnt/runs/base \
        --config.data.data_dir=gs://BUCKET/tensorflow_datasets

  Sizes, dropout, label smoothing, steps, tokens in a batch and the rate's schedule are those of Vaswani et al.
  (arXiv 1706.03762), the optimizer is Shampoo with Adam graft.

paper: Transformer-big on WMT'14 English to French, for a v5e slice of 64 chips; the same command with :paper.

  As in Anil et al. (arXiv 2002.09018): sizes of Vaswani et al., batches of 1,536 pairs, statistics summed as AdaGrad's,
  AdaGrad graft, each side to the power -1/4, blocks of 1,024, roots in float64 on the hosts about every 1,000 steps.
  Not from there: rate and warm-up are those of Vaswani et al., constant after it because an AdaGrad step falls by
  t^-1/2 of its own; the number of steps is half of theirs, for the paper's "1.95 times fewer". A row holds one pair, so
  that a batch is 1,536 of them, and most of it is padding: --config.data.pairs_per_row=0 --config.batch_size=320 packs
  about as many pairs into a fifth of the rows.

  Both need every host of the slice: the same command in each, with a workdir on a file system that all share.
"""

from typing import Any

from . import base as knobs

SHAMPOO = "shampax.optimizers.shampoo:ShampooOptions"
ADAMW = "shampax.optimizers.baselines:AdamWOptions"
# The embedding of a small vocabulary gains from a higher rate, as in lm.py.
EMBEDDING_RATE = ((r"(.*/)?[^/]*embed[^/]*(/.*)?", 4.0), (r".*", 1.0))


def sample(config: Any) -> None:
    """Minutes on a laptop."""
    _select(
        config,
        source="sample:nt",
        lengths=(112, 128),  # held-out verses have up to 96 and 108 tokens
        vocab_size=2_048,
        encoder_layers=2,
        decoder_layers=2,
        embed_dim=128,
        heads=4,
        head_dim=32,
        mlp_dim=512,
    )
    config.optimizer = knobs.component(
        SHAMPOO,
        block_size=128,
        early_intervals=((30, 1),),  # a tenth of so short a run
        beta1=0.8,  # as in lm.py, so short a run gains from a shorter memory
        rate_rules=EMBEDDING_RATE,
    )
    config.duration = "300 steps"
    config.batch_size = 24  # rows of about 2.5 pairs
    config.schedule.learning_rate = 6e-3
    config.evaluation.every = "20%"
    config.simulated_devices = 2


def sample_adam(config: Any) -> None:
    """The same model, data and budget under AdamW."""
    sample(config)
    config.optimizer = knobs.component(ADAMW, rate_rules=EMBEDDING_RATE)
    config.schedule.learning_rate = 4e-3


def base(config: Any) -> None:
    """Vaswani et al., table 3: base; Shampoo in place of Adam."""
    _select(
        config,
        source="tfds:wmt14_translate/de-en:1.0.0",
        lengths=(256, 256),
        target_key="de",
        vocab_size=32_768,
        encoder_layers=6,
        decoder_layers=6,
        embed_dim=512,
        heads=8,
        head_dim=64,
        mlp_dim=2_048,
        decode_length=256,
        compute_dtype="bfloat16",
    )
    config.optimizer = knobs.component(SHAMPOO, block_size=1_024, interval=20)
    config.duration = "100_000 steps"
    config.batch_size = 96  # rows of 256 slots: 25,000 tokens of each language, less what packing leaves empty
    config.schedule.learning_rate = 7e-4  # 512^-1/2 x 4,000^-1/2
    config.schedule.warmup = "4_000 steps"
    config.schedule.decay = "rsqrt"
    _pace(config)


def paper(config: Any) -> None:
    """Vaswani et al., table 3: big; Anil et al. for the batch and the optimizer."""
    _select(
        config,
        source="tfds:wmt14_translate/fr-en:1.0.0",
        lengths=(192, 192),
        pairs_per_row=1,
        vocab_size=32_768,
        encoder_layers=6,
        decoder_layers=6,
        embed_dim=1_024,
        heads=16,
        head_dim=64,
        mlp_dim=4_096,
        decode_length=192,
        compute_dtype="bfloat16",
    )
    config.optimizer = knobs.component(
        SHAMPOO,
        block_size=1_024,
        beta2=1.0,
        exponent=None,
        graft="adagrad",
        refresh="host",
        interval=1_000,
    )
    config.duration = "150_000 steps"
    config.batch_size = 1_536
    config.schedule.learning_rate = 0.03  # 1,024^-1/2
    config.schedule.warmup = "4_000 steps"
    config.schedule.decay = "constant"
    _pace(config)


VARIANTS = {"sample": sample, "sample_adam": sample_adam, "base": base, "paper": paper}


def get_config(variant: str = "sample") -> Any:
    """One of `VARIANTS`."""
    config = knobs.get_config()
    VARIANTS[variant](config)
    return config


def _select(
    config: Any,
    *,
    source: str,
    lengths: tuple[int, int],
    vocab_size: int,
    target_key: str = "fr",
    pairs_per_row: int = 0,
    **model: Any,
) -> None:
    """The task and its data, which share one vocabulary: an override of either size moves both."""
    config.task = knobs.component("shampax.models.translation:TranslationTask", vocab_size=vocab_size, **model)
    config.data = knobs.component(
        "shampax.framework.data.pairs:PairData",
        source=source,
        source_length=lengths[0],
        target_length=lengths[1],
        pairs_per_row=pairs_per_row,
        target_key=target_key,
        vocab_size=config.task.get_ref("vocab_size"),
    )


def _pace(config: Any) -> None:
    """Pauses fit for runs of days."""
    config.log.every = "50 steps"
    config.evaluation.every = "2_000 steps"
    config.evaluation.judge_every = "10_000 steps"
    config.checkpoint.every = "1_000 steps"
