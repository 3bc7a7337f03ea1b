"""Fine-tune language models on conversations; docs/finetuning.md is the recipe.

FOLDER: continue a Hugging Face folder, with its tokenizer and its chat template, on conversations in JSON lines.

    shampax train --config=finetune:/models/Llama-3.2-1B --workdir=runs/chat --config.data.source=file:chats.jsonl

  The folder gives all sizes. Rows have 2,048 tokens.

sample: 2 layers of 64, as `lm:bytes`, learn the answers of 1,000 vendored conversations about sums, in seconds on one
  core. It may start from that model:

    shampax train --config=lm:bytes --workdir=runs/bytes
    shampax train --config=finetune:sample --config.init_from=runs/bytes --workdir=runs/sums

sample_lora: the same with adapters of rank 8, which need that model or another one with its sizes.

    shampax train --config=finetune:sample_lora --config.init_from=runs/bytes --workdir=runs/lora
"""

from pathlib import Path
from typing import Any

from ..framework.base.errors import UserError
from ..framework.base.model_folder import read_adapter, read_config
from ..framework.config.components import load_class
from . import base, lm

LM, CHAT = "shampax.models.lm:LMTask", "shampax.framework.data.text.chat:ChatData"
TAKES_FOLDERS = True


def sample(config: Any) -> None:
    """Train a small Transformer on sums."""
    lm.bytes_of_text(config)
    config.data = base.component(CHAT, vocab_size=config.task.get_ref("vocab_size"), sequence_length=256)
    config.optimizer = base.component(base.ADAMW)
    config.schedule.learning_rate = 3e-3
    config.evaluation.batches = -1


def sample_lora(config: Any) -> None:
    """Train adapters of a small Transformer on sums."""
    sample(config)
    config.task.lora_rank = 8
    config.schedule.learning_rate = 1e-2


VARIANTS = {"sample": sample, "sample_lora": sample_lora}


def get_config(variant: str = "sample") -> Any:
    """Return a config of `VARIANTS`, or one that fine-tunes the Hugging Face folder that `variant` names."""
    config = base.get_config()
    if variant in VARIANTS:
        VARIANTS[variant](config)
        return config
    folder = Path(variant).expanduser()
    task: Any = load_class(LM)
    try:
        config.task = base.component(LM, **task.knobs_of_folder(read_config(folder), read_adapter(folder)))
    except ValueError as error:
        raise UserError(f"{folder}: {error}.") from error
    config.task.compute_dtype, config.task.remat, config.task.loss_chunks = "bfloat16", "full", 8
    config.data = base.component(
        CHAT, vocab_size=config.task.get_ref("vocab_size"), tokenizer=str(folder), sequence_length=2_048
    )
    config.init_from = str(folder)
    config.optimizer = base.component(base.ADAMW, beta2=0.95)
    config.duration, config.batch_size = "2 epochs", 32
    config.schedule.learning_rate, config.schedule.warmup = 1e-5, "3%"
    config.gradient_clip = 1.0
    config.evaluation.every = config.checkpoint.every = "10%"
    return config
