"""Decoder-only language models; docs/results.md has the results.

sample, sample_host, sample_adamw: the quick start, the same with roots on the host, and a baseline tuned as well.

    shampax train --config=lm:sample --workdir=runs/quickstart

  A Transformer of 0.7 M parameters learns the vendored Wikipedia articles. Training takes about a minute on 2 CPU
  cores, which simulate 4 devices, so that Shampoo's blocks have several owners. After 200 steps the held-out loss is
  4.72 nats per token (3.22 bits per byte), with AdamW 5.01 (3.42); means of three seeds.

sample_kl_shampoo, sample_soap, sample_muon: the same with other preconditioners on the same blocks.

sample_moe: the same with 4 experts per layer, split over 2 devices; a token uses 2 of them.

    shampax train --config=lm:sample_moe --workdir=runs/moe

bytes: 2 layers of 64 learn the same articles byte by byte, in 15 seconds on one core. It separates optimizers well
  (docs/results.md).

    shampax train --config=lm:bytes --workdir=runs/bytes

1b: 1.2 B parameters, 25 B tokens of C4, for a v5e slice of 256 chips.
8b: 8.0 B parameters, 160 B tokens of C4, for a v5p slice of 128 chips or a multiple.
moe: 13.7 B parameters, of which a token uses 2.0 B, 25 B tokens of C4, for a v5e slice of 256 chips.

    shampax train --config=lm:1b --workdir=/mnt/runs/lm_1b \
        --config.data.data_dir=gs://BUCKET/tensorflow_datasets

long: continue 1b on books, in rows of 65,536 tokens, for a v5e slice of 256 chips.

    shampax train --config=lm:long --workdir=/mnt/runs/lm_long \
        --config.init_from=/mnt/runs/lm_1b --config.data.tokenizer=/mnt/runs/lm_1b/data/tokenizer-HASH.json \
        --config.data.data_dir=gs://BUCKET/tensorflow_datasets

  The four have not been trained yet. Run the command in every host of the slice, with a workdir that all hosts share
  (docs/clusters.md). Training starts when the first window of the data is made; process 0 makes the rest while it
  runs, with `data.workers` processes that tokenise about 0.4 M tokens a second each (docs/data.md).
"""

import functools
from typing import Any

from . import base

select = functools.partial(base.select, task="shampax.models.lm:LMTask", data="shampax.framework.data.text:TextData")


def sample(config: Any) -> None:
    """Train a small Transformer in a minute."""
    select(
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
        base.SHAMPOO,
        block_size=128,
        beta1=0.8,  # a short run gains from a shorter memory, under any optimizer
        rate_rules=base.EMBEDDING_RATE,
    )
    config.duration = "200 steps"
    config.batch_size = 16
    config.schedule.learning_rate = 1.2e-2
    config.evaluation.batches = 16  # 256 of 670 held-out rows; all of them would take longer than training
    config.evaluation.sample = False
    config.simulated_devices = 4


def bytes_of_text(config: Any) -> None:
    """Train a small Transformer on single bytes; a vocabulary of this size has no merges."""
    select(
        config,
        vocab_size=257,  # the 256 bytes and the end of a document
        source="sample:enwiki",
        sequence_length=64,
        layers=2,
        embed_dim=64,
        heads=4,
        kv_heads=2,
        head_dim=16,
        mlp_dim=192,
    )
    config.optimizer = base.component(
        base.SHAMPOO,
        block_size=128,
        beta1=0.8,
    )
    config.duration = "300 steps"
    config.batch_size = 16
    config.schedule.learning_rate = 2e-2
    config.evaluation.batches = 16  # 256 of 3,672 held-out rows


def sample_host(config: Any) -> None:
    """Train the sample with roots computed by LAPACK on the host."""
    sample(config)
    config.optimizer.refresh = "host"
    config.optimizer.delay = 1


def sample_adamw(config: Any) -> None:
    """Train the sample with AdamW."""
    sample(config)
    config.optimizer = base.component(base.ADAMW, rate_rules=base.EMBEDDING_RATE, beta1=0.7)
    config.schedule.learning_rate = 3e-3


def sample_kl_shampoo(config: Any) -> None:
    """Train the sample with KL-Shampoo."""
    _with_treatment(config, "kl_shampoo")


def sample_soap(config: Any) -> None:
    """Train the sample with SOAP."""
    _with_treatment(config, "soap")


def sample_muon(config: Any) -> None:
    """Train the sample with Muon on whole matrices."""
    _with_treatment(config, "muon block_size=1024")


def sample_moe(config: Any) -> None:
    """Train the sample with experts; a token uses as many weights as in `sample`, of twice as many."""
    sample(config)
    config.task.experts = 4
    config.task.experts_per_token = 2
    config.task.mlp_dim = 192
    config.mesh.expert = 2


def large_run(config: Any, *, block_size: int, learning_rate: float, warmup: str) -> None:
    """Set the optimizer and its schedule, intervals for days, and data that are prepared while training runs."""
    config.optimizer = base.component(
        base.SHAMPOO,
        block_size=block_size,
        interval=50,
        weight_decay=0.1,
        roots_dtype="bfloat16",  # as good as float32 on the samples (docs/results/memory.md)
    )
    config.data.shard_size = 10_000  # documents of C4: 4.7 M tokens, 12 seconds of a core
    config.data.shuffle_window = 32  # 150 M tokens
    config.data.workers = 32
    config.schedule.learning_rate = learning_rate
    config.schedule.warmup = warmup
    config.schedule.final_fraction = 0.1
    config.gradient_clip = 1.0
    base.pace(config, evaluate="1_000 steps", save="1_000 steps", batches=32)


def one_billion(config: Any) -> None:
    """Train 1b; the 16 chips of a row of a v5e slice share one copy of the parameters."""
    select(
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
        remat="best",
        z_loss=1e-4,
    )
    config.duration = "25e9 tokens"
    config.batch_size = 512
    config.mesh.fsdp = 16
    large_run(config, block_size=1_024, learning_rate=1e-3, warmup="1_000 steps")


def eight_billion(config: Any) -> None:
    """Train the shape of Llama 3 8B (arXiv 2407.21783, table 3) with a vocabulary learned from the data."""
    select(
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
        remat="qkv context attention_out gate",  # the products of `up` are computed again: they do not fit
        loss_chunks=8,  # the logits of a whole batch would take 17 GB per chip
        z_loss=1e-4,
    )
    config.duration = "160e9 tokens"
    config.batch_size = 1_024
    config.mesh.fsdp = 128  # with a tensor axis, collectives of activations take half of the step
    large_run(config, block_size=2_048, learning_rate=3e-4, warmup="2_000 steps")


def mixture(config: Any) -> None:
    """Train 1b with 16 experts in place of each MLP, one per chip of each group of 16."""
    one_billion(config)
    config.task.experts = 16
    config.task.experts_per_token = 2
    config.mesh.expert = 16


def long(config: Any) -> None:
    """Continue 1b on rows of 65,536 tokens, each split over 16 chips; a batch has as many tokens as in 1b."""
    one_billion(config)
    config.data.source = "tfds:pg19:0.1.1"
    config.data.text_key = "book_text"
    config.data.shard_size = 50  # books are long: about 20 MB of rows
    config.data.sequence_length = 65_536
    config.task.rope_theta = 500_000.0  # as in Llama 3 (arXiv 2407.21783, section 3.2)
    config.task.attention_block = 128  # where no kernel fits
    config.duration = "2.5e9 tokens"
    config.batch_size = 16
    config.mesh.sequence = 16
    # Chips that share a row also share the parameters.
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
    "bytes": bytes_of_text,
    "1b": one_billion,
    "8b": eight_billion,
    "moe": mixture,
    "long": long,
}
BASELINES = dict.fromkeys(("sample", "sample_host", "sample_kl_shampoo", "sample_soap", "sample_muon"), "sample_adamw")
get_config = base.of_variants(VARIANTS)


def _with_treatment(config: Any, treatment: str) -> None:
    """Set `sample` with another preconditioner on everything but embeddings."""
    sample(config)
    config.optimizer.treatments = tuple(
        (pattern, treatment if text == "shampoo" else text) for pattern, text in config.optimizer.treatments
    )
