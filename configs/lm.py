"""Decoder-only language models.

sample, sample_host, sample_adamw: the quick start, the same with roots on the host, and a baseline as well tuned.

    python -m shampax.launch.train --config=shampax/configs/lm.py:sample --workdir=runs/quickstart

  A Transformer of 0.7 M parameters learns the vendored Wikipedia articles on 2 CPU cores, which simulate 4 devices so
  that the preconditioner's blocks have owners to be shared among: about a minute of training. The held-out loss after
  200 steps is 4.77 nats per token, 3.27 bits per character; AdamW's 5.01 and 3.43 (means of three seeds,
  docs/results.md).

sample_kl_shampoo, sample_soap, sample_muon: the same with other preconditioners on the same blocks.

sample_moe: the same with a mixture of 4 experts in each layer, of which a token uses 2, divided over 2 of the devices.

    python -m shampax.launch.train --config=shampax/configs/lm.py:sample_moe --workdir=runs/moe

1b: 1.2 B parameters, 25 B tokens of C4, for a v5e slice of 256 chips.

    python -m shampax.launch.train --config=shampax/configs/lm.py:1b --workdir=/mnt/runs/lm_1b \
        --config.data.data_dir=gs://BUCKET/tensorflow_datasets

8b: 8.0 B parameters, 160 B tokens of C4, for a v5p slice of 128 chips or a multiple of that.

    python -m shampax.launch.train --config=shampax/configs/lm.py:8b --workdir=/mnt/runs/lm_8b \
        --config.data.data_dir=gs://BUCKET/tensorflow_datasets

moe: 13.7 B parameters, of which a token uses 2.0 B, 25 B tokens of C4, for a v5e slice of 256 chips.

    python -m shampax.launch.train --config=shampax/configs/lm.py:moe --workdir=/mnt/runs/lm_moe \
        --config.data.data_dir=gs://BUCKET/tensorflow_datasets

long: 1b trained on with books, in rows of 65,536 tokens, for a v5e slice of 256 chips.

    python -m shampax.launch.train --config=shampax/configs/lm.py:long --workdir=/mnt/runs/lm_long \
        --config.init_from=/mnt/runs/lm_1b --config.data.tokenizer=/mnt/runs/lm_1b/data/tokenizer-HASH.json \
        --config.data.data_dir=gs://BUCKET/tensorflow_datasets

  These four run in a process on every host of the slice, with a workdir on a file system that all hosts share
  (docs/clusters.md). Process 0 tokenises and packs the text once, at about 0.4 M tokens a second; `data.max_documents`
  bounds it.
"""

from typing import Any

from . import base

SHAMPOO = "shampax.optimizers.shampoo:ShampooOptions"
ADAMW = "shampax.optimizers.baselines:AdamWOptions"
# The embedding of a small vocabulary gains from a higher rate, under AdamW as under Shampoo (docs/results.md).
EMBEDDING_RATE = ((r"(.*/)?[^/]*embed[^/]*(/.*)?", 4.0), (r".*", 1.0))


def sample(config: Any) -> None:
    """Minutes on a laptop."""
    _select(
        config,
        vocab_size=1_024,
        source="sample:enwiki",
        sequence_length=128,
        layers=3,
        embed_dim=128,
        heads=4,
        kv_heads=2,
        head_dim=32,
        mlp_dim=384,
    )
    config.optimizer = base.component(
        SHAMPOO,
        block_size=128,
        early_intervals=((20, 1),),  # a tenth of so short a run; long runs can do without
        beta1=0.8,  # so short a run gains from a shorter memory, under any optimizer (docs/results.md)
        rate_rules=EMBEDDING_RATE,
    )
    config.duration = "200 steps"
    config.batch_size = 16
    config.schedule.learning_rate = 6e-3
    config.evaluation.batches = 16  # the first 256 of 670 held-out rows: all of them would take longer than training
    config.simulated_devices = 4


def sample_host(config: Any) -> None:
    """The same with roots by LAPACK on the host, which the devices here are."""
    sample(config)
    config.optimizer.refresh = "host"
    config.optimizer.delay = 1
    config.optimizer.early_intervals = ((20, 2),)  # no shorter than the delay allows


def sample_adamw(config: Any) -> None:
    """The same model, data and budget under AdamW."""
    sample(config)
    config.optimizer = base.component(ADAMW, rate_rules=EMBEDDING_RATE, beta1=0.7)
    config.schedule.learning_rate = 3e-3


def sample_kl_shampoo(config: Any) -> None:
    """The same under KL-Shampoo."""
    _of_the_family(config, "kl_shampoo")


def sample_soap(config: Any) -> None:
    """The same under SOAP."""
    _of_the_family(config, "soap")


def sample_muon(config: Any) -> None:
    """The same under Muon, on whole matrices."""
    _of_the_family(config, "muon block_size=1024")


def sample_moe(config: Any) -> None:
    """A token uses as many weights as in `sample`, of twice as many."""
    sample(config)
    config.task.experts = 4
    config.task.experts_per_token = 2
    config.task.mlp_dim = 192
    config.mesh.expert = 2


def one_billion(config: Any) -> None:
    """Each copy of the parameters is shared by 16 chips, one row of a v5e slice."""
    _select(
        config,
        vocab_size=32_768,
        source="tfds:c4/en:3.1.0",
        sequence_length=2_048,
        layers=24,
        embed_dim=2_048,
        heads=16,
        kv_heads=8,
        head_dim=128,
        mlp_dim=5_632,
        compute_dtype="bfloat16",
        remat="full",
        z_loss=1e-4,
    )
    config.optimizer = base.component(SHAMPOO, block_size=1_024, interval=50, weight_decay=0.1)
    config.duration = "25e9 tokens"
    config.batch_size = 512
    config.mesh.fsdp = 16
    config.schedule.learning_rate = 1e-3
    config.schedule.warmup = "1_000 steps"
    config.schedule.final_fraction = 0.1
    config.gradient_clip = 1.0
    _pace(config)


def eight_billion(config: Any) -> None:
    """Llama 3 8B's shape (arXiv 2407.21783, table 3) with a vocabulary trained on the data."""
    _select(
        config,
        vocab_size=128_256,
        source="tfds:c4/en:3.1.0",
        sequence_length=4_096,
        layers=32,
        embed_dim=4_096,
        heads=32,
        kv_heads=8,
        head_dim=128,
        mlp_dim=14_336,
        rope_theta=500_000.0,
        tied_head=False,
        compute_dtype="bfloat16",
        remat="full",
        z_loss=1e-4,
    )
    config.optimizer = base.component(SHAMPOO, block_size=2_048, interval=50, weight_decay=0.1)
    config.duration = "160e9 tokens"
    config.batch_size = 1_024
    config.microbatches = 4  # the logits of a whole batch would take 17 GB of each chip
    config.mesh.fsdp = 32
    config.mesh.tensor = 4
    config.schedule.learning_rate = 3e-4
    config.schedule.warmup = "2_000 steps"
    config.schedule.final_fraction = 0.1
    config.gradient_clip = 1.0
    _pace(config)


def mixture(config: Any) -> None:
    """1b with 16 experts in place of each MLP, one to a chip of each group of 16."""
    one_billion(config)
    config.task.experts = 16
    config.task.experts_per_token = 2
    config.task.expert_group = 512  # the products that send tokens grow with it: 8 % of the experts' own
    config.mesh.expert = 16


def long(config: Any) -> None:
    """1b on rows of 65,536 tokens, each row shared by 16 chips; a batch has as many tokens as 1b's."""
    one_billion(config)
    config.data.source = "tfds:pg19:0.1.1"
    config.data.text_key = "book_text"
    config.data.shard_size = 500  # books are long: about 200 MB of rows
    config.data.sequence_length = 65_536
    config.task.rope_theta = 500_000.0  # Llama 3's (arXiv 2407.21783, section 3.2)
    config.task.attention_block = 512
    config.duration = "2.5e9 tokens"
    config.batch_size = 16
    config.mesh.sequence = 16
    # Chips that share a row share the parameters too, as those do that have different rows.
    config.sharding_rules = (("embed", ("fsdp", "sequence")), *config.sharding_rules)
    config.schedule.learning_rate = 1e-4
    config.schedule.warmup = "100 steps"


VARIANTS = {
    "sample": sample,
    "sample_host": sample_host,
    "sample_adamw": sample_adamw,
    "sample_kl_shampoo": sample_kl_shampoo,
    "sample_soap": sample_soap,
    "sample_muon": sample_muon,
    "sample_moe": sample_moe,
    "1b": one_billion,
    "8b": eight_billion,
    "moe": mixture,
    "long": long,
}


def get_config(variant: str = "sample") -> Any:
    """One of `VARIANTS`."""
    config = base.get_config()
    VARIANTS[variant](config)
    return config


def _select(config: Any, *, vocab_size: int, source: str, sequence_length: int, **model: Any) -> None:
    """The task and its data, which share one vocabulary: an override of either size moves both."""
    config.task = base.component("shampax.models.lm:LMTask", vocab_size=vocab_size, **model)
    config.data = base.component(
        "shampax.framework.data.text:TextData",
        source=source,
        sequence_length=sequence_length,
        vocab_size=config.task.get_ref("vocab_size"),
    )


def _of_the_family(config: Any, treatment: str) -> None:
    """`sample` with another preconditioner on everything but embeddings."""
    sample(config)
    config.optimizer.treatments = tuple(
        (pattern, treatment if text == "shampoo" else text) for pattern, text in config.optimizer.treatments
    )


def _pace(config: Any) -> None:
    """Pauses fit for runs of days."""
    config.log.every = "50 steps"
    config.evaluation.every = "1_000 steps"
    config.evaluation.batches = 32
    config.checkpoint.every = "1_000 steps"
