import json
import math
import sys

import pytest
from small_lm import train_small
from toy_runs import make_config, two

import shampax.launch
from shampax.framework.checkpoint import restore
from shampax.framework.train import train
from shampax.launch import checkpoint
from shampax.launch.evaluate import main


def ran(capsys, *arguments):
    """Run the command; return exit code, stdout and lines of stderr."""
    code = main([*map(str, arguments)])
    out, err = capsys.readouterr()
    return code, out, err.splitlines()


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory):
    """Train the toy on two devices; return its workdir and result."""
    workdir = tmp_path_factory.mktemp("evaluate") / "run"
    return workdir, train(make_config(microbatches=2), workdir, devices=two())


def test_the_result_is_that_of_training(toy_run, capsys):
    """Faults: another checkpoint, other rows or another mean than in training; the workdir changes."""
    workdir, result = toy_run
    assert restore.config(workdir, ["seed=3"], trusted=True).microbatches == 2  # the run's, not the default
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    flags = f"--workdir={workdir}", "--trust", "--json", "--config.batch_size=16"
    code, out, err = ran(capsys, *flags, "--use=newest")
    assert code == 0, err
    found = json.loads(out)
    assert (found["step"], found["sets"].keys()) == (12, {"heldout"})
    assert found["sets"]["heldout"]["loss"] == pytest.approx(result["heldout_loss"], rel=1e-5)
    assert found["sets"]["heldout"]["examples"] == 20
    code, out, _ = ran(capsys, *flags, f"--workdir={workdir / 'checkpoints' / '10'}", "--config.mesh.fsdp=2")
    assert json.loads(out)["step"] == 10 and json.loads(out)["sets"] != found["sets"]
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*")} == before


def test_sets_by_name_and_by_overrides(toy_run, capsys):
    """Faults: a set of the config is missing; overrides of the data evaluate the run's data."""
    flags = f"--workdir={toy_run[0]}", "--trust", "--json", "--config.batch_size=16"
    small = "--config.evaluation.sets=few.heldout_rows=3,fewer.heldout_rows=2"
    _, out, err = ran(capsys, *flags, small)
    assert {name: values["examples"] for name, values in json.loads(out)["sets"].items()} == {
        "heldout": 20,
        "few": 3,
        "fewer": 2,
    }, err
    _, out, _ = ran(capsys, *flags, small, "--sets=few")
    assert [*json.loads(out)["sets"]] == ["few"]
    _, out, _ = ran(capsys, *flags, "--config.data.heldout_rows=5")
    assert {name: values["examples"] for name, values in json.loads(out)["sets"].items()} == {"given": 5}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "config.task.name='toy:ToyTask' is code from elsewhere. Add --trust"),
        (["--trust", "--sets=none"], "--sets=none: there is no set 'none'. Choose from heldout"),
        (["--trust", "--config.batch_size=9"], "config.batch_size=9: must be divisible by"),
        (["--trust", "--config.data.rows=x"], "rows='x': expected int"),
        (["--trust", "--config.bath_size=8"], "unknown key 'config.bath_size'"),
    ],
)
def test_bad_input_is_one_line(toy_run, capsys, arguments, message):
    """Faults: code that a workdir names is imported unasked; bad input ends in a traceback."""
    code, out, err = ran(capsys, f"--workdir={toy_run[0]}", *arguments)
    assert (code, out, len(err)) == (2, "", 1) and message in err[0]


@pytest.mark.slow
def test_a_language_model_is_evaluated_on_other_text(tmp_path, capsys):
    """Faults: other text gets a tokenizer of its own; perplexity is of another loss; bits count tokens."""
    result = train_small(tmp_path / "run", "task.vocab_size=300", "data.vocab_size=300")
    capsys.readouterr()
    (tmp_path / "other.txt").write_text("\f".join(f"Document {number} has words.\n" * 9 for number in range(20)))
    flags = f"--workdir={tmp_path / 'run'}", "--json", "--use=newest"
    _, out, err = ran(capsys, *flags)
    own = json.loads(out)["sets"]["heldout"]
    assert own["loss"] == pytest.approx(result["heldout_loss"], rel=1e-5), err
    assert own["perplexity"] == pytest.approx(math.exp(own["loss"]))
    tokenizers = [*(tmp_path / "run" / "data").glob("tokenizer-*.json")]
    source = f"--config.data.source=file:{tmp_path / 'other.txt'}"
    _, out, err = ran(capsys, *flags, source, "--config.data.heldout_fraction=0.5")
    other = json.loads(out)["sets"]["given"]
    assert other["loss"] != own["loss"] and 0 < other["bits_per_byte"] < 9, err
    assert [*(tmp_path / "run" / "data").glob("tokenizer-*.json")] == tokenizers


def test_a_folder(tmp_path, capsys):
    """Faults: a folder is evaluated with other weights, or its missing data end in a traceback."""
    workdir, folder = tmp_path / "w", tmp_path / "f"
    train_small(workdir)
    assert checkpoint.main(["export", str(workdir), str(folder), "--format=hf"]) == 0
    given = "--json", "--config.data.source=sample:enwiki", "--config.data.max_records=2", "--config.batch_size=8"
    given = *given, "--config.data.sequence_length=32", "--config.evaluation.batches=8"
    capsys.readouterr()
    found = [json.loads(ran(capsys, f"--workdir={path}", *given)[1]) for path in (workdir, folder)]
    ours, theirs = (each["sets"]["given"] for each in found)
    assert found[1]["step"] is None and theirs["examples"] == ours["examples"] > 0
    assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-5)
    code, _, err = ran(capsys, f"--workdir={folder}")
    assert code == 2 and "needs its tokenizer and --config.data.source=SOURCE" in err[-1]


def test_a_missing_harness_is_one_line(monkeypatch, capsys):
    """Fault: without the extra the verb ends in a traceback."""
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "shampax.launch.harness", raising=False)
    monkeypatch.delattr(shampax.launch, "harness", raising=False)
    code, _, err = ran(capsys, "--workdir=w", "--harness=hellaswag")
    assert code == 2 and err[-1].endswith("--harness needs lm_eval. Run pip install 'shampax[lm-eval]'.")
