"""Decoder-only language models in the shapes of public ones: every option of the architecture, with its source.

llama3_1b, llama3_8b, llama3_70b: Llama 3.2 1B, Llama 3.1 8B and 70B (arXiv 2407.21783, table 3; configs of the models).
qwen3_8b: Qwen 3 8B (arXiv 2505.09388, table 1).
gemma3_4b: Gemma 3 4B, its text model (arXiv 2503.19786, section 2 and table 1).
olmo2_7b: OLMo 2 7B (arXiv 2501.00656, section 2).
mixtral_8x7b: Mixtral 8x7B (arXiv 2401.04088, table 1).
deepseek_v3: DeepSeek-V3 (arXiv 2412.19437, section 4.2), without the module that predicts a further token.

    shampax train --config=families:qwen3_8b --workdir=/mnt/runs/qwen3_8b \
        --config.data.tokenizer=/mnt/tokenizers/qwen3.json --config.data.data_dir=gs://BUCKET/tensorflow_datasets

  They train on C4 in rows of 4,096 tokens. None has been trained yet. `mesh` and `batch_size` are for v5p slices of 16
  (1 B), 64 (4 B), 128 (7 and 8 B), 256 (Mixtral), 512 (70 B) and 2,048 chips, or multiples; `shampax plan` tells what
  fits. Run the command on every host of the slice (docs/clusters.md).

llama3_small, qwen3_small, gemma3_small, olmo2_small, mixtral_small, deepseek_v3_small: the same options in models of
  0.2 to 0.6 M parameters, on the vendored Wikipedia articles, in a few minutes on 2 CPU cores.

    shampax train --config=families:gemma3_small --workdir=runs/gemma3_small
"""

from typing import Any

from . import base, lm

# Options of a family that do not depend on the size.
LLAMA3 = {
    "norm_epsilon": 1e-5,
    "rope_theta": 500_000.0,
    "rope_scaling": "llama3 factor=8 low=1 high=4 original=8192",
    "tied_head": False,
}
QWEN3 = {"qk_norm": "head", "rope_theta": 1e6, "tied_head": False}
GEMMA3 = {
    "norms": "sandwich",
    "qk_norm": "head",
    "activation": "gelu",
    "layer_pattern": (*("local",) * 5, "global"),
    "rope_theta": 1e6,
    "rope_scaling": "linear factor=8",
    "local_rope_theta": 10_000.0,
}
OLMO2 = {"norms": "post", "qk_norm": "all", "rope_theta": 500_000.0, "z_loss": 1e-5, "tied_head": False}
MIXTRAL = {"norm_epsilon": 1e-5, "rope_theta": 1e6, "experts": 8, "experts_per_token": 2, "tied_head": False}
DEEPSEEK_V3 = {
    "router": "sigmoid",
    "router_bias": True,
    "router_scale": 2.5,
    "router_z_loss": 0.0,
    "balance_rate": 1e-3,
    "balance_loss": 1e-4,
    "shared_experts": 1,
    "rope_scaling": "yarn factor=40 original=4096 mscale=1 mscale_all_dim=1",
    "tied_head": False,
}


def llama3_1b(config: Any) -> None:
    """Train the shape of Llama 3.2 1B."""
    own = {"rope_scaling": "llama3 factor=32 low=1 high=4 original=8192", "tied_head": True}
    _full(config, LLAMA3 | own, vocab_size=128_256, layers=16, embed_dim=2_048, heads=32, head_dim=64, mlp_dim=8_192)
    config.mesh.fsdp = 16


def llama3_8b(config: Any) -> None:
    """Train the shape of Llama 3.1 8B."""
    _full(config, LLAMA3, vocab_size=128_256, layers=32, embed_dim=4_096, heads=32, mlp_dim=14_336)


def llama3_70b(config: Any) -> None:
    """Train the shape of Llama 3.1 70B."""
    _full(config, LLAMA3, vocab_size=128_256, layers=80, embed_dim=8_192, heads=64, mlp_dim=28_672)
    config.mesh.fsdp = 512


def qwen3_8b(config: Any) -> None:
    """Train the shape of Qwen 3 8B."""
    _full(config, QWEN3, vocab_size=151_936, layers=36, embed_dim=4_096, heads=32, mlp_dim=12_288)


def gemma3_4b(config: Any) -> None:
    """Train the shape of Gemma 3 4B's text model; five of six layers see 1,024 tokens."""
    own = {"kv_heads": 4, "head_dim": 256, "attention_window": 1_024}
    own |= {"embedding_scale": 2_560**0.5, "attention_scale": 256**-0.5}
    _full(config, GEMMA3 | own, vocab_size=262_208, layers=34, embed_dim=2_560, heads=8, mlp_dim=10_240)
    config.mesh.fsdp = 64


def olmo2_7b(config: Any) -> None:
    """Train the shape of OLMo 2 7B."""
    own = {"kv_heads": 32}
    _full(config, OLMO2 | own, vocab_size=100_352, layers=32, embed_dim=4_096, heads=32, mlp_dim=11_008)


def mixtral_8x7b(config: Any) -> None:
    """Train the shape of Mixtral 8x7B; a token uses 2 of 8 experts."""
    _full(config, MIXTRAL, vocab_size=32_000, layers=32, embed_dim=4_096, heads=32, mlp_dim=14_336)
    config.mesh.expert = 8
    config.mesh.fsdp = 32


def deepseek_v3(config: Any) -> None:
    """Train the shape of DeepSeek-V3; a token uses 8 of 256 experts, of 4 of 8 groups, and a shared one."""
    own = {"kv_heads": 128, "latent_dim": 512, "query_latent_dim": 1_536, "rope_dim": 64}
    own |= {"dense_layers": 3, "experts": 256, "experts_per_token": 8, "expert_dim": 2_048}
    own |= {"router_groups": 8, "groups_per_token": 4, "remat": "latents context attention_out gate"}
    _full(config, DEEPSEEK_V3 | own, vocab_size=129_280, layers=61, embed_dim=7_168, heads=128, mlp_dim=18_432)
    config.mesh.expert = 64
    config.mesh.fsdp = 32


def llama3_small(config: Any) -> None:
    """Train a small Llama 3 on the Wikipedia sample."""
    _small(config, LLAMA3)


def qwen3_small(config: Any) -> None:
    """Train a small Qwen 3 on the Wikipedia sample."""
    _small(config, QWEN3)


def gemma3_small(config: Any) -> None:
    """Train a small Gemma 3 on the Wikipedia sample; two of three layers see 32 tokens."""
    own = {"layer_pattern": ("local", "local", "global"), "attention_window": 32}
    _small(config, GEMMA3 | own, embedding_scale=8.0, attention_scale=0.25)


def olmo2_small(config: Any) -> None:
    """Train a small OLMo 2 on the Wikipedia sample."""
    _small(config, OLMO2, kv_heads=4)


def mixtral_small(config: Any) -> None:
    """Train a small Mixtral on the Wikipedia sample; a token uses 2 of 8 experts."""
    _small(config, MIXTRAL, mlp_dim=96)


def deepseek_v3_small(config: Any) -> None:
    """Train a small DeepSeek-V3 on the Wikipedia sample; a token uses 2 of 8 experts, of 2 of 4 groups, and another."""
    own = {"kv_heads": 4, "latent_dim": 32, "query_latent_dim": 48, "rope_dim": 8}
    own |= {"dense_layers": 1, "experts": 8, "experts_per_token": 2, "expert_dim": 64}
    _small(config, DEEPSEEK_V3 | own, router_groups=4, groups_per_token=2)


VARIANTS = {
    change.__name__: change
    for change in (
        *(llama3_1b, llama3_8b, llama3_70b, qwen3_8b, gemma3_4b, olmo2_7b, mixtral_8x7b, deepseek_v3),
        *(llama3_small, qwen3_small, gemma3_small, olmo2_small, mixtral_small, deepseek_v3_small),
    )
}
get_config = base.of_variants(VARIANTS, default="llama3_small")


def _full(config: Any, options: dict[str, Any], **sizes: Any) -> None:
    """Set a model of published size, trained on C4."""
    common = {"kv_heads": 8, "head_dim": 128, "z_loss": 1e-4, "compute_dtype": "bfloat16"}
    # Keep what elementwise operations need, but for the largest; logits of a whole batch would take 17 GB per chip.
    common |= {"remat": "qkv context attention_out gate", "loss_chunks": 8}
    lm.select(config, source="tfds:c4/en:3.1.0", sequence_length=4_096, **(common | options | sizes))
    config.duration = "160e9 tokens"
    config.batch_size = 1_024
    config.mesh.fsdp = 128
    lm.large_run(config, block_size=2_048, learning_rate=3e-4, warmup="2_000 steps")


def _small(config: Any, options: dict[str, Any], **sizes: Any) -> None:
    """Set a small model with the options of a family, trained as `lm:sample`."""
    lm.sample(config)
    shape = {"layers": 3, "embed_dim": 64, "heads": 4, "kv_heads": 2, "head_dim": 16, "mlp_dim": 192}
    config.task.update(shape | options | sizes)
    config.optimizer.block_size = 64
