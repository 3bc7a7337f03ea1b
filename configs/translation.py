"""Translation by an encoder-decoder Transformer; docs/workloads/translation.md has the results.

sample, sample_adam: English to French on verses of the New Testament, and a baseline.

    shampax train --config=translation:sample --workdir=runs/translation
    shampax translate --workdir=runs/translation < sentences.txt

  1.2 M parameters and 300 steps of about 59 verses, on 2 CPU cores that simulate 2 devices. The held-out loss is 2.92
  nats per token and BLEU 11.1 on the held-out chapters (one seed); untranslated English has BLEU 0.2.

base: Transformer-base on WMT'14 English to German, for a v5e slice of 16 chips. Not trained yet.

    shampax train --config=translation:base --workdir=/mnt/runs/base \
        --config.data.data_dir=gs://BUCKET/tensorflow_datasets

  Sizes, dropout, label smoothing, steps, tokens per batch and the rate's schedule are those of Vaswani et al.
  (arXiv 1706.03762). The optimizer is Shampoo with Adam graft.

paper: Transformer-big on WMT'14 English to French, for a v5e slice of 64 chips; the same command with :paper. Not
  trained yet.

  As in Anil et al. (arXiv 2002.09018): sizes of Vaswani et al., batches of 1,536 pairs, statistics summed as in
  AdaGrad, AdaGrad graft, exponent 1/4, blocks of 1,024, roots in float64 on the hosts about every 1,000 steps. Ours:
  rate and warm-up of Vaswani et al., then a constant rate, because an AdaGrad step falls as t^-1/2 by itself; half
  their number of steps, for the paper's "1.95 times fewer". A row holds one pair, so a batch is 1,536 pairs and most of
  it is padding: --config.data.pairs_per_row=0 --config.batch_size=320 packs about as many pairs into a fifth of the
  rows.

  Run base and paper in every host of the slice, with a workdir that all hosts share (docs/clusters.md).
"""

import functools
from typing import Any

from . import base

_select = functools.partial(
    base.select, task="shampax.models.translation:TranslationTask", data="shampax.framework.data.pairs:PairData"
)


def sample(config: Any) -> None:
    """Train a small Transformer in minutes."""
    _select(
        config,
        source="sample:nt",
        source_length=112,  # held-out verses have up to 96 tokens in English and 108 in French
        target_length=128,
        vocab_size=2_048,
        encoder_layers=2,
        decoder_layers=2,
        embed_dim=128,
        heads=4,
        head_dim=32,
        mlp_dim=512,
    )
    config.optimizer = base.component(
        base.SHAMPOO,
        block_size=128,
        early_intervals=((30, 1),),  # a tenth of this short run
        beta1=0.8,  # as in lm.py, a short run gains from a shorter memory
        rate_rules=base.EMBEDDING_RATE,
    )
    config.duration = "300 steps"
    config.batch_size = 24  # rows of about 2.5 pairs
    config.schedule.learning_rate = 1e-2
    config.evaluation.every = "20%"
    config.simulated_devices = 2


def sample_adam(config: Any) -> None:
    """Train the sample with AdamW."""
    sample(config)
    config.optimizer = base.component(base.ADAMW, rate_rules=base.EMBEDDING_RATE)
    config.schedule.learning_rate = 4e-3


def transformer_base(config: Any) -> None:
    """Train the base model of Vaswani et al., table 3, with Shampoo in place of Adam."""
    _select(
        config,
        source="tfds:wmt14_translate/de-en:1.0.0",
        source_length=256,
        target_length=256,
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
    config.optimizer = base.component(base.SHAMPOO, block_size=1_024, interval=20)
    config.duration = "100_000 steps"
    config.batch_size = 96  # rows of 256 slots: 25,000 tokens of each language, less what packing leaves empty
    config.schedule.learning_rate = 7e-4  # 512^-1/2 x 4,000^-1/2
    config.schedule.warmup = "4_000 steps"
    config.schedule.decay = "rsqrt"
    _pace(config)


def paper(config: Any) -> None:
    """Train the big model of Vaswani et al., table 3, with the batch and optimizer of Anil et al."""
    _select(
        config,
        source="tfds:wmt14_translate/fr-en:1.0.0",
        source_length=192,
        target_length=192,
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
    config.optimizer = base.component(
        base.SHAMPOO,
        block_size=1_024,
        **base.WITHOUT_ORTHOGONALIZING | {"beta2": 1.0, "interval": 1_000},
        exponent=None,
        graft="adagrad",
        diagonal="adagrad",
        refresh="host",
        early_intervals=(),  # as in the paper, roots are renewed about every 1,000 steps
    )
    config.duration = "150_000 steps"
    config.batch_size = 1_536
    config.schedule.learning_rate = 0.03  # 1,024^-1/2
    config.schedule.warmup = "4_000 steps"
    config.schedule.decay = "constant"
    _pace(config)


VARIANTS = {"sample": sample, "sample_adam": sample_adam, "base": transformer_base, "paper": paper}
BASELINES = {"sample": "sample_adam"}
get_config = base.of_variants(VARIANTS)


def _pace(config: Any) -> None:
    base.pace(config, evaluate="2_000 steps", save="1_000 steps")
    config.evaluation.judge_every = "10_000 steps"
