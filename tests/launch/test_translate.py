import contextlib
import io
import json
import shutil

import jax
import numpy as np
import pytest
import sacrebleu

from shampax.configs import base
from shampax.framework import integrity, partitioning, restore
from shampax.framework.errors import UserError
from shampax.framework.train import train
from shampax.launch.translate import DATA, TASK, main

SIZES = {"encoder_layers": 1, "decoder_layers": 1, "embed_dim": 16, "heads": 2, "head_dim": 8, "mlp_dim": 32}


def make_config():
    config = base.get_config()
    config.task = base.component(TASK, vocab_size=400, beam_size=2, decode_length=12, **SIZES)
    config.data = base.component(DATA, source_length=160, target_length=160, vocab_size=400, max_pairs=40)
    config.optimizer = base.component("shampax.optimizers.baselines:AdamWOptions")
    config.duration, config.batch_size, config.schedule.learning_rate = "40 steps", 8, 0.02
    config.evaluation.every = config.checkpoint.every = "20 steps"
    return config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A workdir with checkpoints of steps 20 and 40, its result, and the source sentences of its held-out pairs."""
    workdir = tmp_path_factory.mktemp("translate") / "run"
    result = train(make_config(), workdir, devices=jax.devices()[:2])
    data = restore.component(workdir, "data", [DATA])
    rows, decode = data.examples("heldout", workdir / "data"), data.decoder(workdir / "data")
    pairs = [(decode(rows[i]["source"]), decode(rows[i]["target"][1:])) for i in range(len(rows))]
    return workdir, result, pairs


def ran(tmp_path, text, *arguments):
    """Exit code, lines of stdout and lines of stderr."""
    file = tmp_path / "input.txt"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([*map(str, arguments), f"--input={file}"])
    return code, out.getvalue().split("\n")[:-1], err.getvalue().splitlines()


def test_what_is_translated_has_the_bleu_of_the_result(run, tmp_path):
    """Fault: lines out of order, another checkpoint, tokenizer or search than in training, or wrong padding."""
    workdir, result, pairs = run
    text = "\n".join(source for source, _ in pairs[:20]) + "\n\n" + "\r\n".join(source for source, _ in pairs[20:])
    code, out, err = ran(tmp_path, text, f"--workdir={workdir}", "--use=newest", "--batch_size=20")
    assert code == 0 and len(out) == 41 and out[20] == ""
    assert all("is cut after 12 tokens" in line for line in err)
    translations = [line for at, line in enumerate(out) if at != 20]
    bleu = sacrebleu.corpus_bleu(translations, [[target for _, target in pairs]])
    assert len(set(translations)) > 1 and bleu.score > 0
    assert bleu.score == pytest.approx(result["bleu"], abs=1e-9)


def test_the_best_or_the_newest_checkpoint_is_taken(run, tmp_path):
    """Fault: the order of scores reversed, or a damaged checkpoint translated with."""
    workdir = shutil.copytree(run[0], tmp_path / "run")
    first = workdir / "checkpoints" / "20"
    record = json.loads((first / "record" / "metadata").read_text())
    record["last"]["values"]["loss"] = 0.5
    (first / "record" / "metadata").write_text(json.dumps(record))
    integrity.seal(first)
    assert restore.choose(workdir, "best") == (first, [])
    assert restore.choose(workdir, "newest") == (workdir / "checkpoints" / "40", [])
    largest = max(first.joinpath("state").rglob("*"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1])
    path, ((damaged, _),) = restore.choose(workdir, "best")
    assert (path, damaged) == (workdir / "checkpoints" / "40", first)
    code, out, err = ran(tmp_path, "Amen.", f"--checkpoint={first}")
    assert (code, out, len(err)) == (2, [], 1)
    assert "is damaged" in err[0]


def test_variables_are_restored_onto_another_mesh(run):
    """Fault: parameters exchanged or left as they were initialised, or laid out otherwise than the rules say."""
    workdir = run[0]
    task, data = restore.component(workdir, "task", [TASK]), restore.component(workdir, "data", [DATA])
    defaults = base.get_config()
    checkpoint, found = workdir / "checkpoints" / "40", []
    for sizes, count in (({"data": 1, "fsdp": 2, "tensor": 2}, 4), ({"data": 1, "fsdp": 1, "tensor": 1}, 1)):
        mesh = partitioning.make_mesh(sizes, jax.devices()[:count])
        found.append(restore.variables(checkpoint, task, data.spec(), defaults.sharding_rules, mesh))
    jax.tree.map(np.testing.assert_array_equal, *map(jax.device_get, found))
    up = found[0]["params"]["encoder"]["mlp"]["up"]["kernel"]
    assert up.sharding.shard_shape(up.shape) == (1, 8, 16)
    assert float(np.abs(found[1]["params"]["encoder_norm"]["scale"] - 1).max()) > 0
    other = type(task)(**{**SIZES, "mlp_dim": 48}, vocab_size=400)
    with pytest.raises(UserError, match=r"mlp/down/kernel as float32\[1,32,16\], the model as float32\[1,48,16\]"):
        restore.variables(checkpoint, other, data.spec(), defaults.sharding_rules, mesh)


def test_what_cannot_work_is_one_line(run, tmp_path):
    """Fault: a traceback, or code imported that a workdir from elsewhere names."""
    workdir = run[0]
    foreign = shutil.copytree(workdir, tmp_path / "foreign")
    content = json.loads((foreign / "config.json").read_text())
    content["task"]["name"] = "this:Zen"
    (foreign / "config.json").write_text(json.dumps(content))
    cases = [
        ("Amen.", [f"--workdir={tmp_path}"], "holds no finished checkpoint"),
        ("Amen.", [f"--workdir={foreign}"], "has config.task.name 'this:Zen'; needed is shampax.models.translation"),
        ("Amen.", [f"--workdir={workdir}", "--beam_size=0"], "task.beam_size is 0"),
        (b"Amen.\n\xff", [f"--workdir={workdir}"], "line 2 of the input is not UTF-8 at byte 0"),
    ]
    for text, arguments, message in cases:
        code, out, err = ran(tmp_path, text, *arguments)
        assert (code, out, len(err)) == (2, [], 1)
        assert err[0].startswith("error: ") and message in err[0]
    with contextlib.redirect_stderr(io.StringIO()) as err:
        assert main([f"--workdir={workdir}", f"--input={tmp_path}/none.txt"]) == 2
    assert "none.txt cannot be read" in err.getvalue()
    with contextlib.redirect_stderr(io.StringIO()), pytest.raises(SystemExit):
        main(["--input=none.txt"])
