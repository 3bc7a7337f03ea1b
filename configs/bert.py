"""BERT: predict masked tokens and whether two texts follow each other; docs/workloads/bert.md has the results.

sample, sample_adamw, sample_lamb: 2 layers on the vendored Wikipedia articles; 5 minutes on 2 CPU cores.

    shampax train --config=bert:sample --workdir=runs/bert

base: BERT-base, 110 M parameters, for a v5e slice of 16 chips. Not trained yet.

    shampax train --config=bert:base --workdir=/mnt/runs/bert_base \
        --config.data.data_dir=gs://BUCKET/tensorflow_datasets

  Model, batch (256 rows), 1,000,000 steps, warm-up, rate, decay and dropout are those of Devlin et al.
  (arXiv 1810.04805, section A.2). All rows have 128 tokens; theirs have 512 in the last tenth.

paper, paper_512: BERT-large, 335 M parameters, in two phases, for a v5e slice of 256 chips. Not trained yet. The same
  command, with :paper and the workdir /mnt/runs/bert_128; then with :paper_512, a new workdir, and
  --config.resume_from=/mnt/runs/bert_128, which restores parameters, optimizer state and step.

  Batches of 65,536 rows of 128 tokens, then of 32,768 rows of 512, 8,599 steps in all, are those of You et al.
  (arXiv 1904.00962). The step at which the second phase begins and warms up again (`schedule.begin`), and warm-ups of
  2,000 and 200 steps, are those of NVIDIA's DeepLearningExamples. The position table has 512 entries from the start.
  The rate is BERT's 1e-4 for 256 rows times the square root of the batch's growth, and not tuned: the graft
  "adam_normalized" keeps Adam's rates (docs/workloads/bert.md).

base, paper and paper_512 read `wikipedia/20230601.en:1.0.0` and hold out its last hundredth of articles. The
BooksCorpus, on which the published models were also trained, is not distributed. Run the command in every host of the
slice, with a workdir that all hosts share (docs/clusters.md).
"""

import functools
from typing import Any

from . import base

LAMB = "shampax.optimizers.baselines:LambOptions"
# Words of a small vocabulary gain from a higher rate; positions gain from a lower one.
EMBEDDING_RATES = ((r".*/words", 3.0), (r".*/positions", 0.5), (r".*", 1.0))
PUBLISHED_DECAY = ((r"(.*/)?[^/]*(bias|scale|norm)[^/]*(/.*)?", False), (r".*", True))  # embeddings decay too
FIRST_PHASE, BOTH_PHASES = 7_038, 8_599  # steps
LARGE = {"layers": 24, "embed_dim": 1_024, "heads": 16, "mlp_dim": 4_096}

_select = functools.partial(
    base.select, task="shampax.models.bert:BertTask", data="shampax.framework.data.masked:MaskedTextData"
)


def sample(config: Any) -> None:
    """Train a small encoder in minutes."""
    _select(
        config,
        vocab_size=500,
        source="sample:enwiki",
        sequence_length=32,
        predictions=5,
        max_length=32,
        layers=2,
        embed_dim=128,
        heads=2,  # the 64 dimensions of a head can tell 32 positions apart
        mlp_dim=256,
        dropout=0.03,  # without it the few articles are memorised; 0.1 needs a longer run
        next_weight=0.1,  # at 1, predictions of masked tokens stay at their frequencies for twice as long
        init_std=0.1,
        position_init="sinusoidal",
    )
    config.optimizer = base.component(
        base.SHAMPOO,
        block_size=128,
        early_intervals=((20, 1),),
        beta1=0.8,
        weight_decay=0.3,
        rate_rules=EMBEDDING_RATES,
    )
    config.duration = "1_000 steps"
    config.batch_size = 96
    config.schedule.learning_rate = 8e-3
    config.schedule.warmup = "50 steps"
    config.simulated_devices = 2


def sample_adamw(config: Any) -> None:
    """Train the sample with AdamW."""
    sample(config)
    config.optimizer = base.component(base.ADAMW, weight_decay=0.3, rate_rules=EMBEDDING_RATES)
    config.schedule.learning_rate = 3e-3


def sample_lamb(config: Any) -> None:
    """Train the sample with LAMB."""
    sample(config)
    config.optimizer = base.component(LAMB)
    config.schedule.learning_rate = 1e-2


def bert_base(config: Any) -> None:
    """Train BERT-base; every chip has all parameters and 16 rows."""
    _select(config, sequence_length=128, predictions=20, **_published())
    config.optimizer = _shampoo(block_size=768)
    config.duration = "1_000_000 steps"
    config.batch_size = 256
    config.schedule.learning_rate = 1e-4
    config.schedule.warmup = "10_000 steps"
    config.schedule.decay = "linear"
    base.pace(config, evaluate="10_000 steps", save="10_000 steps", batches=32)


def paper(config: Any) -> None:
    """Train BERT-large, first phase; the 16 chips of a row of the slice share the parameters.

    Blocks of 512 give four times as many blocks as blocks of 1,024 to divide among 256 chips, and half the bytes of
    statistics and roots per chip.
    """
    _select(config, sequence_length=128, predictions=20, remat="full", **_published(**LARGE))
    config.optimizer = _shampoo(block_size=512)
    config.duration = f"{FIRST_PHASE} steps"
    config.batch_size = 65_536
    config.microbatches = 4
    config.mesh.fsdp = 16
    config.schedule.learning_rate = 1.6e-3
    config.schedule.warmup = "2_000 steps"
    config.schedule.decay = "linear"
    base.pace(config, evaluate="500 steps", save="500 steps", batches=32)


def paper_512(config: Any) -> None:
    """Resume the first phase with rows of 512 tokens."""
    paper(config)
    config.data.sequence_length = 512
    config.data.predictions = 77
    config.duration = f"{BOTH_PHASES} steps"
    config.batch_size = 32_768
    config.microbatches = 8
    config.schedule.begin = f"{FIRST_PHASE} steps"
    config.schedule.learning_rate = 1.1e-3
    config.schedule.warmup = "200 steps"
    config.resume_from = "/mnt/runs/bert_128"


VARIANTS = {
    "sample": sample,
    "sample_adamw": sample_adamw,
    "sample_lamb": sample_lamb,
    "base": bert_base,
    "paper": paper,
    "paper_512": paper_512,
}
BASELINES = {"sample": "sample_adamw"}
get_config = base.of_variants(VARIANTS)


def _published(**model: Any) -> dict[str, Any]:
    """Return what both published sizes share; the task's defaults are BERT-base."""
    return {"vocab_size": 30_522, "source": "tfds:wikipedia/20230601.en:1.0.0", "compute_dtype": "bfloat16", **model}


def _shampoo(*, block_size: int) -> Any:
    """Return Shampoo with the betas and weight decay of Devlin et al."""
    return base.component(
        base.SHAMPOO,
        block_size=block_size,
        **base.WITHOUT_ORTHOGONALIZING | {"beta2": 0.999},
        graft="adam_normalized",
        diagonal="adam_normalized",
        weight_decay=0.01,
        decay_rules=PUBLISHED_DECAY,
    )
