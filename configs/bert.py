"""BERT: masked tokens and next sentences.

sample, sample_adamw, sample_lamb: a small encoder on the vendored Wikipedia articles, on 2 CPU cores; the baselines
have the same model, data and budget.

    python -m shampax.launch.train --config=shampax/configs/bert.py:sample --workdir=runs/bert

  What to expect is in docs/workloads/bert.md.

base: BERT-base, 110 M parameters, for a v5e slice of 16 chips.

    python -m shampax.launch.train --config=shampax/configs/bert.py:base --workdir=/mnt/runs/bert_base \
        --config.data.data_dir=gs://BUCKET/tensorflow_datasets

  Rows of 128 tokens throughout; model, batch (256 rows), 1,000,000 steps, warm-up, rate, decay and dropout of Devlin et
  al. (arXiv 1810.04805, section A.2), who go over to rows of 512 for the last tenth.

paper, paper_512: BERT-large, 335 M parameters, in two phases, for a v5e slice of 256 chips.

    python -m shampax.launch.train --config=shampax/configs/bert.py:paper --workdir=/mnt/runs/bert_128 \
        --config.data.data_dir=gs://BUCKET/tensorflow_datasets
    python -m shampax.launch.train --config=shampax/configs/bert.py:paper_512 --workdir=/mnt/runs/bert_512 \
        --config.data.data_dir=gs://BUCKET/tensorflow_datasets --config.resume_from=/mnt/runs/bert_128

  Batches of 65,536 rows of 128 tokens, then of 32,768 rows of 512, 8,599 steps together, are You et al.'s
  (arXiv 1904.00962); where the second phase begins, and warm-ups of 2,000 and 200 steps, are those of NVIDIA's
  DeepLearningExamples. The phases are one run in two workdirs: `resume_from` takes over the parameters, the optimizer's
  state and the number of the step, and nothing is started afresh, for the table of positions has 512 entries from the
  start and the loss and its gradient have the same scale. The second phase warms up once more (`schedule.begin`).

  The graft is "adam_normalized", over each layer's matrix. Anil et al. (arXiv 2002.09018) graft LAMB's length, which is
  that of the weights; no graft of ours looks at weights. What the normalised form shares with LAMB is that a layer's
  update does not depend on the scale of its gradients, step by step; a rate is therefore Adam's and not LAMB's. It is
  BERT's 1e-4 for 256 rows, times the square root of the batch's growth, and untried at this size.

base, paper and paper_512 read `wikipedia/20230601.en:1.0.0`, with its last hundredth of articles held out; the
BooksCorpus, which the published models also saw, is not distributed. Every host of a slice must run: call
`jax.distributed.initialize()` and then `shampax.framework.train.train(config, workdir)` in each process, with a workdir
on a file system that all hosts share.
"""

from typing import Any

from . import base

SHAMPOO = "shampax.optimizers.shampoo:ShampooOptions"
ADAMW = "shampax.optimizers.baselines:AdamWOptions"
LAMB = "shampax.optimizers.baselines:LambOptions"
# Words of a small vocabulary gain from a higher rate; positions that move fast are not learnt from.
EMBEDDING_RATES = ((r".*/words", 3.0), (r".*/positions", 0.5), (r".*", 1.0))
PUBLISHED_DECAY = ((r"(.*/)?[^/]*(bias|scale|norm)[^/]*(/.*)?", False), (r".*", True))  # embeddings decay too
FIRST_PHASE, BOTH_PHASES = 7_038, 8_599  # steps
LARGE = {"layers": 24, "embed_dim": 1_024, "heads": 16, "mlp_dim": 4_096}


def sample(config: Any) -> None:
    """Minutes on a laptop."""
    _select(
        config,
        vocab_size=500,
        source="sample:enwiki",
        sequence_length=32,
        predictions=5,
        max_length=32,
        layers=2,
        embed_dim=128,
        heads=2,  # a head's 64 dimensions can tell 32 slots apart
        mlp_dim=256,
        dropout=0.03,  # the articles are few, and learnt by heart without; 0.1 takes longer than there is
        next_weight=0.1,  # at 1, masked tokens stay at their frequencies for twice as long
        init_std=0.1,
        position_init="sinusoidal",
    )
    config.optimizer = base.component(
        SHAMPOO, block_size=128, early_intervals=((20, 1),), weight_decay=0.3, rate_rules=EMBEDDING_RATES
    )
    config.duration = "1_000 steps"
    config.batch_size = 96
    config.schedule.learning_rate = 4e-3
    config.schedule.warmup = "50 steps"
    config.simulated_devices = 2


def sample_adamw(config: Any) -> None:
    """The same model, data and budget under AdamW."""
    sample(config)
    config.optimizer = base.component(ADAMW, weight_decay=0.3, rate_rules=EMBEDDING_RATES)
    config.schedule.learning_rate = 3e-3


def sample_lamb(config: Any) -> None:
    """The same under LAMB."""
    sample(config)
    config.optimizer = base.component(LAMB)
    config.schedule.learning_rate = 1e-2


def bert_base(config: Any) -> None:
    """Rows of 128 tokens; every chip has all parameters and 16 rows."""
    _select(config, sequence_length=128, predictions=20, **_published())
    config.optimizer = _shampoo(block_size=768)
    config.duration = "1_000_000 steps"
    config.batch_size = 256
    config.schedule.learning_rate = 1e-4
    config.schedule.warmup = "10_000 steps"
    config.schedule.decay = "linear"
    _pace(config, every="10_000 steps")


def paper(config: Any) -> None:
    """The first phase; the parameters are shared by the 16 chips of a row of the slice.

    A width of 1,024 in blocks of 512: there are four times as many to share among 256 chips, and what a chip holds of
    statistics and roots is half of what it would hold of whole ones.
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
    _pace(config, every="500 steps")


def paper_512(config: Any) -> None:
    """The second phase, which goes on from where `resume_from` ends."""
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


def get_config(variant: str = "sample") -> Any:
    """One of `VARIANTS`."""
    config = base.get_config()
    VARIANTS[variant](config)
    return config


def _published(**model: Any) -> dict[str, Any]:
    """What both published sizes have: vocabulary, source, and the task's defaults otherwise."""
    return {"vocab_size": 30_522, "source": "tfds:wikipedia/20230601.en:1.0.0", "compute_dtype": "bfloat16", **model}


def _shampoo(*, block_size: int) -> Any:
    """Betas, weight decay and what decays as in Devlin et al."""
    return base.component(
        SHAMPOO,
        block_size=block_size,
        beta2=0.999,
        graft="adam_normalized",
        weight_decay=0.01,
        decay_rules=PUBLISHED_DECAY,
    )


def _select(config: Any, *, vocab_size: int, source: str, sequence_length: int, predictions: int, **model: Any) -> None:
    """The task and its data, which share one vocabulary: an override of either size moves both."""
    config.task = base.component("shampax.models.bert:BertTask", vocab_size=vocab_size, **model)
    config.data = base.component(
        "shampax.framework.data.masked:MaskedTextData",
        source=source,
        sequence_length=sequence_length,
        predictions=predictions,
        vocab_size=config.task.get_ref("vocab_size"),
    )


def _pace(config: Any, *, every: str) -> None:
    """Pauses fit for runs of hours or days."""
    config.log.every = "50 steps"
    config.evaluation.every = every
    config.evaluation.batches = 32
    config.checkpoint.every = every
