import contextlib
import io
import json
import re
import shlex
import shutil
from pathlib import Path
from unittest import mock

import pytest
from small_lm import train_small

from shampax.framework.checkpoint import store
from shampax.launch.generate import main
from shampax.launch.main import main as any_verb


def ran(text, *arguments, main=main):
    """Run the command; return exit code, stdout and stderr."""
    given = io.TextIOWrapper(io.BytesIO(text if isinstance(text, bytes) else text.encode()))
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), mock.patch("sys.stdin", given):
        code = main([*map(str, arguments)])
    return code, out.getvalue(), err.getvalue()


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ("", [], "--prompt --prompts is required"),
        ("", ["--prompt=A", "--prompts=-"], "not allowed with argument"),
        ("", ["--prompt=A", "--max_tokens=0"], "--max_tokens=0: must be at least 1"),
        ("", ["--prompt=A", "--top_p=0"], "--top_p=0.0: must be above 0"),
        ("", ["--prompt=A", "--temperature=-1"], "--temperature=-1.0: must be 0 to 100"),
        ("", ["--prompt=A", "--stop="], "--stop=: the text is missing"),
        ("", ["--prompt=A", "--mesh=expert=2"], "'expert=2' is not one of data=N"),
        ("", ["--prompt=A"], "is not a directory"),
        ("", ["--prompts=/no/such/file"], "--prompts=/no/such/file: cannot be read (No such file"),
        ("\n\n", ["--prompts=-"], "--prompts=-: has no prompt"),
        ("A\n{'prompt': 1}\n", ["--prompts=-"], "line 2 of standard input: not JSON"),
        ('{"text": "A"}\n', ["--prompts=-"], 'line 1 of standard input: has no text "prompt"'),
        (b"A\n\xff", ["--prompts=-"], "line 2 of standard input is not UTF-8 at byte 0"),
        (b"\xff", ["--prompt=-"], "the prompt is not UTF-8 at byte 0"),
    ],
)
def test_bad_input_is_one_line(text, arguments, message):
    """Fault: bad input ends in a traceback, or after a model has been read."""
    code, out, err = ran(text, "--workdir=/no/such/workdir", *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ") and message in err


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    path = tmp_path_factory.mktemp("generate") / "run"
    train_small(path)
    return path


@pytest.mark.slow
def test_a_prompt_is_continued(workdir):
    """Faults: the stream and the line of a file differ; a neighbour or --mesh changes a text; a stop text is shown; the
    objects of a file lose their values or their order."""
    code, streamed, err = ran("", f"--workdir={workdir}", "--prompt=The é", "--max_tokens=40")
    assert code == 0 and streamed.endswith("\n")
    assert "prefill 7 tokens" in err and "decode 39 tokens" in err
    lines = 'An article\n\n{"prompt": "The é", "id": 7}\n' + "B\n" * 3
    code, out, err = ran(lines, f"--workdir={workdir}", "--prompts=-", "--max_tokens=40", "--mesh=data=4,tensor=2")
    found = [json.loads(line) for line in out.splitlines()]
    assert [each["prompt"] for each in found] == ["An article", "The é", "B", "B", "B"]
    assert found[1]["id"] == 7 and found[1]["text"] == streamed[:-1]
    assert found[1]["finish"] in ("length", "end") and found[1]["tokens"] <= 40
    assert found[2] == found[4] and found[0]["text"] != found[1]["text"]
    stop = found[1]["text"][5:7]
    _, cut, _ = ran("The é", f"--workdir={workdir}", "--prompt=-", "--max_tokens=40", f"--stop={stop}")
    assert cut[:-1] == found[1]["text"][: found[1]["text"].index(stop)]


@pytest.mark.slow
def test_a_checkpoint_is_continued_without_writing_into_its_workdir(workdir, tmp_path):
    """Faults: one checkpoint cannot be named; a run in progress is disturbed; a foreign workdir's code is imported."""
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    first, *_, last = store.checkpoints(workdir)
    for path in (first, last):
        code, out, err = ran("", f"--workdir={path}", "--prompt=A", "--temperature=0", "--max_tokens=2")
        assert code == 0 and out, err
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*")} == before
    foreign = tmp_path / "foreign"
    shutil.copytree(workdir, foreign)
    content = json.loads((foreign / "config.json").read_text())
    del content["task"]["rope_theta"]  # as if this knob had been declared after the run
    (foreign / "config.json").write_text(json.dumps(content))
    assert ran("", f"--workdir={foreign}", "--prompt=A", "--temperature=0", "--max_tokens=2")[:2] == (0, out)
    content["task"]["name"] = "this:Zen"
    (foreign / "config.json").write_text(json.dumps(content))
    code, out, err = ran("", f"--workdir={foreign}", "--prompt=A")
    assert (code, out) == (2, "") and "config.task.name='this:Zen' must be shampax.models.lm" in err


@pytest.mark.slow
def test_the_commands_of_the_page(workdir, tmp_path, monkeypatch):
    """Fault: a command of docs/generate.md is refused, or a file that it reads is not made before."""
    page = (Path(__file__).parents[2] / "docs" / "generate.md").read_text()
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "other.txt").write_text("\f".join(f"Document {number}.\n" * 9 for number in range(9)))
    shutil.copytree(workdir, tmp_path / "runs" / "quickstart")
    monkeypatch.chdir(tmp_path)
    commands = [line.strip() for line in page.splitlines() if line.startswith("    ")]
    # Others need a downloaded model or lm-evaluation-harness.
    commands = [command for command in commands if not re.search(r"/models/|--harness|lm-eval|^[a-z_]+:", command)]
    assert len(commands) > 7
    for command in commands:
        made = re.fullmatch(r"printf (?P<text>'.*') > (?P<file>\S+)", command)
        if made:
            Path(made["file"]).write_text(made["text"][1:-1].replace("\\n", "\n").replace("\\\n", "\\n"))
            continue
        _, _, verb = command.rpartition("| ")
        words = shlex.split(verb.partition(" > ")[0])
        if words[1] != "train":  # of the quick start, which takes longer
            code, out, err = ran("The city of", *words[1:], main=any_verb)
            assert code == 0 and out, (command, err)
