import contextlib
import io
import json

import numpy as np
import pytest
import safetensors.numpy
from workdirs import history

from shampax.framework.base.errors import UserError
from shampax.framework.config.check import load
from shampax.launch import checkpoint
from shampax.launch.train import main
from shampax.models.lm import LMTask

CONFIG = {
    "hidden_size": 8,
    "intermediate_size": 24,
    "model_type": "qwen3",
    "head_dim": 4,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 300,
}


def test_a_folder_as_a_variant(tmp_path):
    """Faults: sizes, weights or tokenizer are not the folder's; a folder of an unknown family is trained."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    config = load(f"finetune:{tmp_path}", ["batch_size=8"])
    assert (config.task.embed_dim, config.task.qk_norm, config.data.vocab_size) == (8, "head", 300)
    assert config.init_from == config.data.tokenizer == str(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"model_type": "mamba"}))
    with pytest.raises(UserError, match="model_type='mamba': is not known"):
        load(f"finetune:{tmp_path}")
    with pytest.raises(UserError, match=r"has no config\.json"):
        load("finetune:samples")


def ran(function, *arguments):
    with contextlib.redirect_stdout(io.StringIO()):
        assert function([*map(str, arguments)]) == 0


@pytest.mark.slow
def test_the_recipe_from_bytes_to_an_exported_folder_that_is_tuned_again(tmp_path):
    """Faults: a command of docs/finetuning.md fails; answers are not learned; an exported folder cannot be tuned."""
    few = ["--config.checkpoint.every=0 steps", "--config.evaluation.every=0 steps", "--config.evaluation.batches=1"]
    short = ["--config.duration=3 steps", "--config.data.max_records=2"]
    ran(main, "--config=lm:bytes", f"--workdir={tmp_path / 'bytes'}", *few, *short)
    start = f"--config.init_from={tmp_path / 'bytes'}"
    small = ["--config.batch_size=8", "--config.data.sequence_length=128"]
    sums = ["--config=finetune:sample", f"--workdir={tmp_path / 'sums'}", "--config.duration=30 steps"]
    ran(main, *sums, start, *few, *small)
    losses = history(tmp_path / "sums", "train/loss")
    assert losses[-1] < 0.7 * losses[0]
    ran(checkpoint.main, "export", tmp_path / "sums", tmp_path / "out", "--format=hf")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    tuned = [f"--config=finetune:{tmp_path / 'out'}", f"--workdir={tmp_path / 'again'}"]
    ran(main, *tuned, *few, *small, "--config.duration=2 steps")
    np.testing.assert_allclose(history(tmp_path / "again", "train/loss")[0], losses[-1], atol=0.3)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    task = LMTask(**LMTask.knobs_of_folder(config))
    tensors = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    assert len(tensors) == sum(1 for each in task.folder_tensors(config).values() for _ in each.names())
