import contextlib
import io
import json
import shutil
from unittest import mock

import jax
import numpy as np
import pytest

from shampax.configs import base
from shampax.framework.base.errors import UserError
from shampax.framework.checkpoint import restore, store
from shampax.framework.checkpoint.record import Ranking
from shampax.framework.sharding import global_batch, meshes
from shampax.framework.train import train
from shampax.launch.translate import DATA, TASK, main

pytestmark = pytest.mark.slow  # all tests need a trained model with a tokenizer; beam search has its own fast tests

SIZES = {"encoder_layers": 1, "decoder_layers": 1, "embed_dim": 16, "heads": 2, "head_dim": 8, "mlp_dim": 32}


def make_config():
    config = base.get_config()
    config.task = base.component(TASK, vocab_size=400, beam_size=2, decode_length=12, **SIZES)
    config.data = base.component(DATA, source_length=160, target_length=160, vocab_size=400, max_records=40)
    config.optimizer = base.component("shampax.optimizers.baselines:AdamWOptions")
    config.duration, config.batch_size, config.schedule.learning_rate = "4 steps", 8, 0.01
    config.evaluation.every = config.checkpoint.every = "2 steps"
    config.evaluation.batches = 1
    return config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Train a workdir with checkpoints of steps 2 and 4; return it with its held-out pairs."""
    workdir = tmp_path_factory.mktemp("translate") / "run"
    train(make_config(), workdir, devices=jax.devices()[:2])
    data = restore.component(workdir, "data", [DATA])
    rows, decode = data.examples("heldout", workdir / "data"), data.decoder(workdir / "data")
    pairs = [(decode(rows[i]["source"]), decode(rows[i]["target"][1:])) for i in range(len(rows))]
    return workdir, pairs


def ran(text, *arguments):
    """Run the command; return exit code, lines of stdout and lines of stderr."""
    given = io.TextIOWrapper(io.BytesIO(text if isinstance(text, bytes) else text.encode()))
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), mock.patch("sys.stdin", given):
        code = main([*map(str, arguments)])
    return code, out.getvalue().split("\n")[:-1], err.getvalue().splitlines()


def test_lines_are_translated_as_in_training(run, tmp_path, monkeypatch):
    """Faults: lines are out of order; tokenizer or search differ from training; padding is wrong."""
    workdir, pairs = run
    random, drawn = np.random.default_rng(0), []

    def varied(checkpoint, task, spec, rules, mesh):
        """Return parameters that give different translations. A few steps of training do not."""
        assert checkpoint == workdir / "checkpoints" / "4"
        shapes = jax.eval_shape(lambda: task.init(jax.random.key(0), spec))
        drawn.append(jax.tree.map(lambda x: random.normal(0.0, 1.0, x.shape).astype(np.float32), shapes))
        return drawn[0]

    monkeypatch.setattr(restore, "variables", varied)
    text = "\n".join(source for source, _ in pairs[:20]) + "\n\n" + "\r\n".join(source for source, _ in pairs[20:])
    code, out, err = ran(text, f"--workdir={workdir}", "--use=newest", "--batch_size=20")
    assert code == 0 and len(out) == 41 and out[20] == ""
    task, data = restore.component(workdir, "task", [TASK]), restore.component(workdir, "data", [DATA])
    rows, decode = data.examples("heldout", workdir / "data"), data.decoder(workdir / "data")
    source, segments = (np.stack([rows[i][name] for i in range(40)]) for name in ("source", "source_segments"))
    found = jax.jit(task.translate)(drawn[0], source, segments)
    expected = [" ".join(decode(tokens).splitlines()) for tokens in np.asarray(found.tokens)]
    assert [line for at, line in enumerate(out) if at != 20] == expected
    assert len(set(expected)) > 5
    cut = sorted(f"line {at + 1 + (at >= 20)}" for at in range(40) if not found.finished[at])
    assert sorted(line.split(" of ")[1].split(" is cut after 12 ")[0] for line in err) == cut


def test_the_best_or_newest_checkpoint_is_used(run, tmp_path):
    """Faults: the order of scores is reversed; a damaged checkpoint is used."""
    workdir = shutil.copytree(run[0], tmp_path / "run")
    first = workdir / "checkpoints" / "2"
    store.write_evaluation(first, store.record(first).with_evaluation({"loss": 0.5}, Ranking()))
    assert store.locate(workdir, best=True) == (first, [])
    assert store.locate(workdir) == (workdir / "checkpoints" / "4", [])
    largest = max(first.joinpath("state").rglob("*"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1])
    path, ((damaged, _),) = store.locate(workdir, best=True)
    assert (path, damaged) == (workdir / "checkpoints" / "4", first)


def test_variables_are_restored_onto_another_mesh(run):
    """Faults: parameters are swapped or keep their initial values; their sharding does not follow the rules."""
    workdir = run[0]
    task, data = restore.component(workdir, "task", [TASK]), restore.component(workdir, "data", [DATA])
    defaults = base.get_config()
    checkpoint, found = workdir / "checkpoints" / "4", []
    for sizes, count in (({"data": 1, "fsdp": 2, "tensor": 2}, 4), ({"data": 1, "fsdp": 1, "tensor": 1}, 1)):
        mesh = meshes.make_mesh(sizes, jax.devices()[:count])
        spec = global_batch.spec(data.spec(), 4, mesh)
        found.append(restore.variables(checkpoint, task, spec, defaults.sharding_rules, mesh))
    jax.tree.map(np.testing.assert_array_equal, *map(jax.device_get, found))
    up = found[0]["params"]["encoder"]["mlp"]["up"]["kernel"]
    assert up.sharding.shard_shape(up.shape) == (1, 8, 16)
    assert float(np.abs(found[1]["params"]["encoder_norm"]["scale"] - 1).max()) > 0
    other = type(task)(**{**SIZES, "mlp_dim": 48}, vocab_size=400)
    with pytest.raises(UserError, match=r"mlp/down/kernel as float32\[1,32,16\], the model as float32\[1,48,16\]"):
        restore.variables(checkpoint, other, spec, defaults.sharding_rules, mesh)


def test_a_kernel_of_the_training_machine_need_not_exist_here(run, tmp_path):
    """Fault: a model that was trained by a kernel of a TPU cannot translate on a CPU."""
    trained = shutil.copytree(run[0], tmp_path / "trained")
    content = json.loads((trained / "config.json").read_text())
    content["task"]["attention"] = "splash"
    (trained / "config.json").write_text(json.dumps(content))
    code, out, err = ran("Amen.", f"--workdir={trained}")
    assert (code, len(out)) == (0, 1), err


def test_errors_are_one_line(run, tmp_path):
    """Faults: a traceback; code named by a foreign workdir is imported."""
    workdir = run[0]
    foreign = shutil.copytree(workdir, tmp_path / "foreign")
    content = json.loads((foreign / "config.json").read_text())
    content["task"]["name"] = "this:Zen"
    (foreign / "config.json").write_text(json.dumps(content))
    cases = [
        ("Amen.", [f"--workdir={tmp_path}"], "has no checkpoint"),
        ("Amen.", [f"--workdir={foreign}"], "config.task.name='this:Zen' must be shampax.models.translation"),
        ("Amen.", [f"--workdir={workdir}", "--beam_size=0"], "task.beam_size=0"),
        (b"Amen.\n\xff", [f"--workdir={workdir}"], "line 2 of the input is not UTF-8 at byte 0"),
    ]
    for text, arguments, message in cases:
        code, out, err = ran(text, *arguments)
        assert (code, out, len(err)) == (2, [], 1)
        assert err[0].startswith("error: ") and message in err[0]
    with contextlib.redirect_stderr(io.StringIO()) as err:
        assert main([]) == 2
        assert main([f"--workdir={workdir}", "--config.seed=1"]) == 2
    assert "the following arguments are required: --workdir" in err.getvalue()
    assert "unrecognized arguments: --config.seed=1" in err.getvalue()
