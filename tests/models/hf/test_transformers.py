"""Compare folders with the models of `transformers` and `peft`; needs the packages of `tests/compared.txt`."""

import contextlib
import functools
import io
import itertools
import json

import jax
import numpy as np
import pytest
import safetensors.numpy
from workdirs import history

from shampax.configs import base, lm
from shampax.framework.base.model_folder import read_config
from shampax.framework.checkpoint import restore, store
from shampax.framework.config import components, sets
from shampax.framework.data import feed
from shampax.framework.generation.generator import Generator
from shampax.framework.generation.sampling import Sampling
from shampax.framework.sharding import meshes
from shampax.framework.train import train
from shampax.launch import trained
from shampax.launch.checkpoint import LM, main
from shampax.models.lm import LMTask

SIZES = {
    "vocab_size": 257,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
FAMILIES = {
    "llama": {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 16}},
    "mistral": {"sliding_window": 9},
    "qwen2": {"rope_parameters": YARN, "tie_word_embeddings": True},
    "qwen3": {},
    "olmo2": {},
    "gemma3_text": {"sliding_window": 9, "query_pre_attn_scalar": 16, "num_hidden_layers": 8},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": True},
    "deepseek_v3": {
        "rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.5},
        "rms_norm_eps": 1e-2,  # not that of the latents' norms
        "head_dim": None,
        "num_key_value_heads": 4,
        "q_lora_rank": 12,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 6,
        "first_k_dense_replace": 1,
        "n_routed_experts": 8,
        "n_shared_experts": 2,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "n_group": 4,
        "topk_group": 2,
    },
}


@functools.cache
def torch_model(family):
    """Return a random model, whose norms and biases are random, too."""
    import torch
    import transformers

    fields = {name: value for name, value in (SIZES | FAMILIES[family]).items() if value is not None}
    config = transformers.AutoConfig.for_model(family, **fields)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.ndim == 1:
                # Norms of Gemma are 1 + weight, which float32 holds exactly for these weights.
                tensor += torch.randint(-100, 100, tensor.shape) / 256
            else:
                tensor *= 4
        for name, tensor in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                tensor += torch.randn(tensor.shape)
    return model.eval()


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    """Write a random model of a family in several files."""
    path = tmp_path_factory.mktemp(request.param) / request.param
    torch_model(request.param).save_pretrained(path, max_shard_size="20KB")
    return path


def batch():
    """Return rows of one document each, longer than the windows."""
    tokens = np.random.default_rng(0).integers(0, SIZES["vocab_size"], (8, 33)).astype(np.int32)
    positions = np.tile(np.arange(33, dtype=np.int32), (8, 1))
    return {"tokens": tokens, "segments": np.ones_like(tokens), "positions": positions}


def their_logits(path):
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.tensor(batch()["tokens"][:, :-1], dtype=torch.int64)).logits.numpy()


def our_logits(workdir):
    """Return the logits of the newest checkpoint of a workdir, on 2 x 4 devices."""
    task = restore.component(workdir, "task", [LM])
    config = base.get_config()
    config.mesh.data, config.mesh.fsdp = 2, 4
    mesh, rows = meshes.make_mesh(config.mesh), batch()
    with jax.set_mesh(mesh):
        variables = restore.variables(store.locate(workdir)[0], task, rows, config.sharding_rules, mesh)
        return np.asarray(jax.jit(task.logits)(variables, rows)[0])


def ran(*arguments):
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(list(map(str, arguments))) == 0


def loaded(path):
    """Return all tensors of a folder."""
    return {name: x for file in path.glob("*.safetensors") for name, x in safetensors.numpy.load_file(file).items()}


def config_of(folder, **changes):
    """Return a config that trains the model of a folder on bytes of text."""
    config = lm.get_config("bytes")
    config.task = base.component(LM, **LMTask.knobs_of_folder(read_config(folder)))
    config.init_from, config.batch_size = str(folder), 8
    config.data.sequence_length, config.data.max_records = 32, 4
    config.update_from_flattened_dict(changes)
    return config


@pytest.mark.slow
def test_an_imported_model_has_the_logits_of_transformers_and_is_exported_bitwise(folder, tmp_path):
    """Faults: a tensor is transposed or split wrongly; a knob is not set; the export loses bits or fields."""
    ran("import", folder, f"--workdir={tmp_path / 'w'}")
    want = their_logits(folder)
    assert np.abs(want).max() > 0.3
    np.testing.assert_allclose(our_logits(tmp_path / "w"), want, atol=1e-4)
    ran("export", tmp_path / "w", tmp_path / "out", "--format=hf", "--file_gigabytes=2e-5")
    before, after = loaded(folder), loaded(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value, strict=True)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == folder.name
    np.testing.assert_allclose(their_logits(tmp_path / "out"), want, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["llama", "gemma3_text", "mixtral", "deepseek_v3"], indirect=True)
def test_a_fine_tuned_model_is_exported(folder, tmp_path):
    """Faults: `init_from` reads other values on a mesh; the export has the values from before training."""
    config = config_of(folder, **{"duration": "2 steps", "mesh.fsdp": 4, "evaluation.batches": 1})
    config.optimizer = base.component(base.ADAMW)
    train(config, tmp_path / "w")
    ran("export", tmp_path / "w", tmp_path / "out", "--format=hf")
    got, before = our_logits(tmp_path / "w"), their_logits(folder)
    assert np.abs(got - before).max() > 0.01
    np.testing.assert_allclose(their_logits(tmp_path / "out"), got, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
def test_greedy_tokens_are_those_of_transformers(family, tmp_path):
    """Faults: a folder is read onto a mesh wrongly; positions of generated tokens are shifted."""
    import torch

    path = base_of(tmp_path, family)
    config = trained.config_of_folder(path)
    config.mesh.data, config.mesh.tensor = 4, 2
    task, mesh = components.build(config.task), meshes.make_mesh(config.mesh)
    prompts = [[1, 2, 3], [*range(40, 60)], [7]]
    with jax.set_mesh(mesh):
        variables = restore.variables(path, task, batch(), config.sharding_rules, mesh)
        found = np.stack([*Generator(task, mesh, Sampling(0)).tokens(variables, prompts, 64)], axis=1)
    for prompt, tokens in zip(prompts, found, strict=True):
        given = torch.tensor([prompt])
        options = {"max_new_tokens": 64, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        theirs = torch_model(family).generate(given, attention_mask=torch.ones_like(given), **options)
        assert theirs[0, len(prompt) :].tolist() == tokens.tolist()


def their_loss(model, rows):
    """Return the mean loss of a batch; a token attends to its own document."""
    import torch

    tokens, segments, positions = (torch.tensor(rows[name]) for name in ("tokens", "segments", "positions"))
    inputs = segments[:, :-1]
    seen = (inputs[:, :, None] == inputs[:, None, :]) & torch.ones(inputs.shape[1], inputs.shape[1]).tril().bool()
    mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[:, None]
    logits = model(tokens[:, :-1].long(), attention_mask=mask, position_ids=positions[:, :-1].long()).logits
    real = (segments[:, 1:] == inputs) & (inputs > 0)
    return torch.nn.functional.cross_entropy(logits[real], tokens[:, 1:].long()[real])


@pytest.mark.slow
def test_ten_steps_of_adamw_have_the_losses_of_pytorch(tmp_path):
    """Faults: gradients differ; documents of a row see each other; AdamW or the targets differ."""
    import torch

    model = torch_model("llama")
    model.save_pretrained(tmp_path / "llama")
    config = config_of(tmp_path / "llama", **{"duration": "10 steps", "log.every": "1 steps", "evaluation.batches": 1})
    everything = ((".*", True),)
    config.optimizer = base.component(base.ADAMW, beta2=0.95, weight_decay=0.1, decay_rules=everything)
    config.schedule.learning_rate, config.schedule.warmup, config.schedule.decay = 3e-3, "0 steps", "constant"
    train(config, tmp_path / "w")
    mesh = meshes.make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        data, cache = components.build(config.data), tmp_path / "w" / "data"
        read = feed.Feed(data, sets.mixture(config), {}, cache, mesh, config).train(0)
        batches = [jax.tree.map(np.asarray, rows) for rows in itertools.islice(read, 10)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    losses = []
    for rows in batches:
        loss = their_loss(model, rows)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    torch_model.cache_clear()
    assert losses[0] - losses[-1] > 0.3
    np.testing.assert_allclose(history(tmp_path / "w", "train/loss"), losses, atol=1e-3)


TARGETS = ["q_proj", "v_proj", "o_proj", "down_proj"]
OURS = ("query", "value", "out", "down")


def logits_with(base, adapter):
    import peft
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        return model(torch.tensor(batch()["tokens"][:, :-1], dtype=torch.int64)).logits.numpy()


def base_of(tmp_path, family):
    torch_model(family).save_pretrained(tmp_path / family)
    return tmp_path / family


@pytest.mark.slow
def test_adapters_are_trained_on_a_mesh_and_exported(tmp_path):
    """Faults: the base of an adapter changes or is another's; an exported adapter, or its sum with the base, has other
    logits in `peft` or `transformers`."""
    folder = base_of(tmp_path, "gemma3_text")
    sizes = {"mesh.fsdp": 2, "mesh.tensor": 2}
    config = config_of(folder, **{"duration": "3 steps", "evaluation.batches": 1, **sizes})
    config.optimizer = base.component(base.ADAMW)
    config.task.lora_rank, config.task.lora_alpha, config.task.lora_targets = 4, 12.0, OURS
    train(config, tmp_path / "w")
    got = our_logits(tmp_path / "w")
    assert np.abs(got - their_logits(folder)).max() > 0.01
    ran("export", tmp_path / "w", tmp_path / "adapter", "--format=peft")
    content = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (content["base_model_name_or_path"], sorted(content["target_modules"])) == (str(folder), sorted(TARGETS))
    np.testing.assert_allclose(logits_with(folder, tmp_path / "adapter"), got, atol=1e-4)
    ran("export", tmp_path / "w", tmp_path / "merged", "--format=hf")
    np.testing.assert_allclose(their_logits(tmp_path / "merged"), got, atol=1e-4)
    ran("import", tmp_path / "adapter", f"--workdir={tmp_path / 'again'}")
    np.testing.assert_allclose(our_logits(tmp_path / "again"), got, atol=1e-6)


@pytest.mark.slow
def test_adapters_of_peft_are_imported(tmp_path):
    """Faults: an adapter is transposed, or scaled by another number."""
    import peft
    import torch

    folder = base_of(tmp_path, "qwen3")
    torch.manual_seed(0)
    options = {"r": 4, "lora_alpha": 6, "use_rslora": True, "init_lora_weights": False, "target_modules": TARGETS}
    model = peft.get_peft_model(torch_model("qwen3"), peft.LoraConfig(task_type="CAUSAL_LM", **options))
    model.save_pretrained(tmp_path / "adapter")
    torch_model.cache_clear()
    content = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    content["base_model_name_or_path"] = "../qwen3"
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(content))
    ran("import", tmp_path / "adapter", f"--workdir={tmp_path / 'w'}")
    want = logits_with(folder, tmp_path / "adapter")
    assert np.abs(want - their_logits(folder)).max() > 0.01
    np.testing.assert_allclose(our_logits(tmp_path / "w"), want, atol=1e-4)
