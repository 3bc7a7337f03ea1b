"""Overrides that shrink the shipped configs, so that they compile and train in seconds.

Blocks have few shapes: programs with few buckets compile in half the time.
"""

# All matrices except a router have blocks of one size.
LM = (
    "task.layers=2",
    "task.embed_dim=16",
    "task.heads=4",
    "task.kv_heads=2",
    "task.head_dim=8",
    "task.mlp_dim=32",
    "task.vocab_size=300",
    "data.source=sample:enwiki",
    "data.sequence_length=16",
    "data.max_records=2",
    "data.workers=1",
    "schedule.warmup=1 steps",
    "batch_size=16",
    "evaluation.batches=1",
    "checkpoint.every=0 steps",
    "log.every=1 steps",
)
# One stage, with blocks of its width.
RESNET = (
    "task.stages=(2,)",
    "task.width=8",
    "batch_size=16",
    "schedule.warmup=1 steps",
    "evaluation.batches=2",
    "checkpoint.every=0 steps",
    "checkpoint.keep_best=0",
    "log.every=1 steps",
)
VIT = (
    "task.layers=2",
    "task.embed_dim=16",
    "task.heads=2",
    "task.mlp_dim=16",
    "batch_size=16",
    "schedule.warmup=1 steps",
    "evaluation.batches=2",
    "checkpoint.every=0 steps",
    "checkpoint.keep_best=0",
    "log.every=1 steps",
)
# All kernels have one shape and, with one head, biases are vectors.
BERT = (
    "task.layers=1",
    "task.embed_dim=16",
    "task.heads=1",
    "task.mlp_dim=16",
    "task.max_length=32",
    "task.vocab_size=200",
    "task.remat=none",
    "data.source=sample:enwiki",
    "data.sequence_length=16",
    "data.predictions=2",
    "data.max_records=2",
    "schedule.warmup=1 steps",
    "duration=4 steps",
    "batch_size=8",
    "microbatches=1",
    "mesh.fsdp=1",
    "evaluation.every=0 steps",
    "evaluation.batches=1",
    "checkpoint.every=2 steps",
    "checkpoint.keep_best=0",
    "log.every=1 steps",
)
TRANSLATION = (
    "task.encoder_layers=1",
    "task.decoder_layers=1",
    "task.embed_dim=16",
    "task.heads=2",
    "task.head_dim=8",
    "task.mlp_dim=32",
    "task.vocab_size=400",
    "task.beam_size=2",
    "task.decode_length=12",
    "task.compute_dtype=float32",
    "data.source_length=160",
    "data.target_length=160",
    "data.max_records=40",
    "schedule.warmup=1 steps",
    "batch_size=8",
    "checkpoint.every=3 steps",
    "checkpoint.keep_best=0",
    "log.every=1 steps",
)
# All layers have one width, and so have blocks.
DLRM = (
    "task.embed_dim=4",
    "task.bottom=(4,)",
    "task.top=(4,)",
    "schedule.warmup=1 steps",
    "batch_size=16",
    "evaluation.batches=2",
    "checkpoint.every=3 steps",
    "checkpoint.keep_best=0",
    "log.every=1 steps",
)
DLRM_ROWS = f"task.rows={(20,) * 26}"
