"""Folders as Hugging Face has them, made with NumPy."""

import contextlib
import dataclasses
import io
import json
import re
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
import safetensors.numpy
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from toy_states import saver

from shampax.framework.base.errors import UserError
from shampax.framework.checkpoint import export, imports, origin, store, takeover
from shampax.framework.checkpoint.folders import Folder
from shampax.framework.checkpoint.record import Record
from shampax.framework.sharding import meshes
from shampax.launch.checkpoint import main
from shampax.models.lm import LMTask

CONFIG = {
    "hidden_size": 8,
    "intermediate_size": 24,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "vocab_size": 20,
}
MIXTRAL = CONFIG | {"model_type": "mixtral", "num_local_experts": 3, "num_experts_per_tok": 2}
DEEPSEEK = {name: value for name, value in CONFIG.items() if name != "num_key_value_heads"} | {
    "model_type": "deepseek_v3",
    "first_k_dense_replace": 1,
    "kv_lora_rank": 3,
    "moe_intermediate_size": 5,
    "n_group": 1,
    "n_routed_experts": 3,
    "num_experts_per_tok": 2,
    "q_lora_rank": None,
    "qk_nope_head_dim": 2,
    "qk_rope_head_dim": 2,
    "topk_group": 1,
    "v_head_dim": 3,
}
QUERY, UP = "model.layers.{}.self_attn.q_proj.weight", "params/layers/mlp/up/kernel"


def task_of(config):
    return LMTask(**LMTask.knobs_of_folder(config))


def random_tensors(dtype, config):
    rng, task = np.random.default_rng(0), task_of(config)
    parts = (task.folder_tensors(config), dtype), (task.folder_state(config), np.float32)
    return {
        name: rng.standard_normal(each.shape).astype(kind)
        for part, kind in parts
        for each in part.values()
        for _, name in each.names()
    }


def write(path, values=None, config=CONFIG, dtype=np.float32):
    """Write a folder with two files."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    values = random_tensors(dtype, config) if values is None else values
    for number in range(2):
        safetensors.numpy.save_file(dict([*values.items()][number::2]), path / f"model-{number}.safetensors")
    return path


def loaded(path):
    return {name: x for file in path.glob("*.safetensors") for name, x in safetensors.numpy.load_file(file).items()}


def specs(folder, fsdp, only=""):
    """Return ShapeDtypeStructs of the parameters, with the last axis over `fsdp` devices where it divides."""
    mesh = meshes.make_mesh({"data": -1, "fsdp": fsdp})
    found = {}
    for name, array in folder.arrays().items():
        divides = array.shape[-1] % fsdp == 0
        names = P(*(None,) * (len(array.shape) - 1), "fsdp") if divides else P()
        found[name] = jax.ShapeDtypeStruct(array.shape, np.float32, sharding=NamedSharding(mesh, names))
    return {name: like for name, like in found.items() if only in name}


def ran(*arguments):
    """Run the command; return its exit code and stderr."""
    err = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
        return main(list(map(str, arguments))), err.getvalue()


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_a_parameter_on_a_mesh(tmp_path, dtype):
    """Faults: a shard has values of another place or layer; bits of a dtype are misread."""
    values = random_tensors(dtype, CONFIG)
    folder = Folder.open(write(tmp_path / "f", values), task_of(CONFIG))
    for only, name, view in [
        ("query", QUERY, lambda x: x.reshape(4, 2, 8).transpose(2, 0, 1)),
        ("mlp/down", "model.layers.{}.mlp.down_proj.weight", lambda x: x.T),
    ]:
        [read] = folder.read(specs(folder, 2, only)).values()
        assert read.addressable_shards[0].data.shape[-1] == read.shape[-1] // 2
        want = [view(values[name.format(layer)].astype(np.float32)) for layer in range(3)]
        np.testing.assert_array_equal(read, np.stack(want))


@pytest.mark.parametrize(
    ("dtype", "config"),
    [("float32", MIXTRAL), ("float16", MIXTRAL), ("bfloat16", DEEPSEEK)],
    ids=["float32", "float16", "bfloat16"],
)
def test_a_folder_that_is_imported_and_exported_is_the_same(tmp_path, dtype, config):
    """Faults: a layer or an expert is written to another's place; biases of routers are lost, or rounded like weights;
    the tokenizer or its ids are left behind."""
    config = config | {"eos_token_id": 7}
    values = random_tensors(jnp.dtype(dtype), config)
    write(tmp_path / "f", values, config)
    (tmp_path / "f" / "tokenizer.json").write_text("{}")
    (tmp_path / "f" / "chat_template.jinja").write_text("{{ messages }}")
    assert ran("import", tmp_path / "f", f"--workdir={tmp_path / 'w'}") == (0, "")
    flags = ["--format=hf", f"--dtype={dtype}", "--file_gigabytes=2e-6"]
    assert ran("export", tmp_path / "w", tmp_path / "out", *flags) == (0, "")
    written = loaded(tmp_path / "out")
    assert written.keys() == values.keys()
    for name, value in values.items():
        np.testing.assert_array_equal(written[name], value, strict=True)
    content = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (content["eos_token_id"], content["torch_dtype"]) == (7, dtype)
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in values.values())
    assert all(
        name in safetensors.numpy.load_file(tmp_path / "out" / file) for name, file in index["weight_map"].items()
    )
    assert len({*index["weight_map"].values()}) > 2
    code, told = ran("export", tmp_path / "w", tmp_path / "out", "--format=hf")
    assert code == 2 and "exists" in told


def test_memory_is_bounded_by_a_tensor_and_by_a_saved_shard(tmp_path):
    """Faults: reading holds a parameter of all layers; writing holds more than one shard of it."""
    config = CONFIG | {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6}
    task = task_of(config)
    folder = Folder.open(write(tmp_path / "f", config=config), task)
    largest, wanted = max(each.array.bytes for each in folder.stored.values()), specs(folder, 8)
    params = folder.read(wanted)  # compiled
    tracemalloc.start()
    jax.block_until_ready(folder.read(wanted))
    # JAX lets go of a piece a little later.
    assert tracemalloc.get_traced_memory()[1] < 2.5 * largest
    tracemalloc.stop()
    checkpoints = saver(tmp_path / "w")
    nested = imports.nested({name.removeprefix("params/"): x for name, x in params.items()})
    manifest = takeover.describe(optax.identity(), "", nested, {"fsdp": 8})
    checkpoints.save({"params": nested}, Record(), manifest)
    checkpoints.confirm()
    checkpoints.close()
    [path] = store.checkpoints(tmp_path / "w")
    tracemalloc.start()
    content = task.folder_config()
    export.export_folder(path, tmp_path / "out", task.folder_tensors(content), {}, "bfloat16", 10**9, state={})
    shard = max(x.addressable_shards[0].data.nbytes for x in params.values())
    assert tracemalloc.get_traced_memory()[1] < 1.3 * shard + 2e5
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda values: values.pop(QUERY.format(1)), "lacks model.layers.1.self_attn.q_proj.weight"),
        (lambda values: values.update(x=np.zeros(2)), "x has the type F64"),
        (lambda values: values.update(x=np.zeros(2, np.float32)), "has x, which the model does not have"),
        (lambda values: values.update({QUERY.format(1): np.zeros((8, 2), np.float32)}), "as float32[8,2], but"),
    ],
)
def test_a_folder_of_another_model_is_refused_before_anything_is_read(tmp_path, monkeypatch, change, told):
    """Fault: parameters keep their initial values, or tensors are ignored, without an error."""
    values = random_tensors(np.float32, CONFIG)
    change(values)
    write(tmp_path / "f", values)
    monkeypatch.setattr(np, "memmap", None)
    code, err = ran("import", tmp_path / "f", f"--workdir={tmp_path / 'w'}")
    assert code == 2 and told in err and err.count("\n") == 1
    assert not (tmp_path / "w").exists()


def test_what_a_folder_may_have_beside_its_parameters(tmp_path):
    """Faults: a published folder with a copy of its tied head, or with a module that predicts a further token, is
    refused; a layer of the model is taken for such a module."""
    values = random_tensors(np.float32, DEEPSEEK) | {"model.layers.3.eh_proj.weight": np.zeros(2, np.float32)}
    assert Folder.open(write(tmp_path / "d", values, DEEPSEEK), task_of(DEEPSEEK))
    shorter = DEEPSEEK | {"num_hidden_layers": 2}
    with pytest.raises(UserError, match=r"has model.layers.3.eh_proj.weight, which the model does not have"):
        Folder.open(write(tmp_path / "s", values, shorter), task_of(shorter))
    config = CONFIG | {"tie_word_embeddings": True}
    values = random_tensors(np.float32, config) | {"lm_head.weight": np.zeros((20, 8), np.float32)}
    assert Folder.open(write(tmp_path / "f", values, config), task_of(config)).tensors.keys() >= {"params/embedding"}


def test_init_from_takes_a_folder_of_the_same_model_only(tmp_path):
    """Faults: a folder is taken for a workdir; a model with another rotation starts from it."""
    write(tmp_path / "f")
    found = origin.find(tmp_path / "w", resume_from="", init_from=str(tmp_path / "f"))
    assert found == origin.Origin("init", tmp_path / "f")
    with pytest.raises(UserError, match="has no checkpoint"):
        origin.find(tmp_path / "w", resume_from=str(tmp_path / "f"), init_from="")
    other = LMTask(**LMTask.knobs_of_folder(CONFIG) | {"rope_theta": 5e5})
    with pytest.raises(UserError, match=re.escape("task.rope_theta=10000.0 (now 500000.0)")):
        Folder.open(tmp_path / "f", other)


def write_adapter(path, **fields):
    """Write an adapter of PEFT beside the folder `f`; return its tensors."""
    path.mkdir()
    content = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["o_proj", "q_proj"], "bias": "none"}
    content |= {"base_model_name_or_path": "../f", "lora_dropout": 0.1, "layers_to_transform": None} | fields
    (path / "adapter_config.json").write_text(json.dumps(content))
    shapes = {f"{layer}.lora_A.weight": (2, 8) for layer in ("q_proj", "o_proj")}
    shapes |= {name.replace("_A", "_B"): shape[::-1] for name, shape in shapes.items()}
    rng, prefix = np.random.default_rng(1), "base_model.model.model.layers.{}.self_attn."
    names = {f"{prefix.format(layer)}{name}": shape for name, shape in shapes.items() for layer in range(3)}
    values = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in names.items()}
    safetensors.numpy.save_file(values, path / "adapter_model.safetensors")
    return values


def test_an_adapter_that_is_imported_and_exported_is_the_same(tmp_path):
    """Faults: A and B change places; a factor is of another layer; what is merged is not the sum."""
    base, values = random_tensors(np.float32, CONFIG), write_adapter(tmp_path / "a")
    write(tmp_path / "f", base)
    assert ran("import", tmp_path / "a", f"--workdir={tmp_path / 'w'}") == (0, "")
    assert ran("export", tmp_path / "w", tmp_path / "out", "--format=peft", "--base=b") == (0, "")
    content = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert content["base_model_name_or_path"] == "b"
    written = loaded(tmp_path / "out")
    assert written.keys() == values.keys()
    for name, value in values.items():
        np.testing.assert_array_equal(written[name], value)
    assert ran("export", tmp_path / "w", tmp_path / "merged", "--format=hf") == (0, "")
    for name, value in loaded(tmp_path / "merged").items():
        a, b = (f"base_model.model.{name.removesuffix('weight')}lora_{x}.weight" for x in "AB")
        added = 3 * values[b] @ values[a] if a in values else 0
        np.testing.assert_allclose(value, base[name] + added, atol=1e-5)


def test_an_adapter_of_other_knobs_is_refused(tmp_path):
    """Faults: a run starts from an adapter of another scale; a field that no knob expresses is ignored."""
    write(tmp_path / "f")
    write_adapter(tmp_path / "a")
    options = {"lora_rank": 2, "lora_targets": ("query", "out")}
    task = LMTask(**LMTask.knobs_of_folder(CONFIG) | options, lora_alpha=6.0)
    assert len(Folder.open(tmp_path / "a", task).arrays()) == 16
    with pytest.raises(UserError, match=r"its adapter needs task\.lora_rank=2, task\.lora_alpha=6\.0"):
        Folder.open(tmp_path / "a", dataclasses.replace(task, lora_alpha=5.0))
    for number, (fields, why) in enumerate(
        [
            ({"use_dora": True}, "use_dora=True: is not known here"),
            ({"bias": "all"}, "bias='all': must be one of ('none',)"),
            ({"target_modules": "all-linear"}, "target_modules='all-linear': must be a list of q_proj, k_proj"),
            ({"base_model_name_or_path": "meta/x"}, "'meta/x': must be a folder with a model"),
        ]
    ):
        write_adapter(tmp_path / str(number), **fields)
        code, err = ran("import", tmp_path / str(number), f"--workdir={tmp_path / 'w'}")
        assert code == 2 and why in err and err.count("\n") == 1
    assert ran("import", tmp_path / "f", f"--workdir={tmp_path / 'w'}") == (0, "")
    code, err = ran("export", tmp_path / "w", tmp_path / "out", "--format=peft")
    assert code == 2 and "has no adapters" in err


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, (1 << 40).to_bytes(8, "little") + b"{}"])
def test_a_damaged_file_is_one_line(tmp_path, content):
    """Fault: a damaged header ends in a traceback or takes all memory."""
    write(tmp_path / "f")
    (tmp_path / "f" / "model-1.safetensors").write_bytes(content)
    code, err = ran("import", tmp_path / "f", f"--workdir={tmp_path / 'w'}")
    assert code == 2 and "model-1.safetensors: cannot be read" in err and err.count("\n") == 1


def test_a_task_from_scratch_is_exported_with_its_tokenizer(tmp_path):
    """Fault: an exported folder has no end of a document."""
    (tmp_path / "tokenizer-1.json").write_text(
        json.dumps({"added_tokens": [{"id": 0, "content": "<|endoftext|>", "special": True}]})
    )
    words = export.tokenizer_of(tmp_path / "tokenizer-1.json")
    assert words.fields == {"bos_token_id": 0, "eos_token_id": 0}
    assert json.loads(words.files["tokenizer_config.json"])["eos_token"] == "<|endoftext|>"
    assert export.tokenizer_of(tmp_path / "no") == ({}, {})


def test_values_that_a_type_does_not_hold_are_refused(tmp_path):
    """Fault: a weight becomes infinite in float16."""
    values = random_tensors(np.float32, CONFIG)
    values[QUERY.format(2)][3, 1] = 1e5
    write(tmp_path / "f", values)
    assert ran("import", tmp_path / "f", f"--workdir={tmp_path / 'w'}")[0] == 0
    code, err = ran("export", tmp_path / "w", tmp_path / "out", "--format=hf", "--dtype=float16")
    assert code == 2 and "overflow" in err
    assert {path.name for path in tmp_path.iterdir()} == {"f", "w"}
