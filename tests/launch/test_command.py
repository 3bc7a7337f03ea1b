import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from shampax.framework.config import files
from shampax.framework.config.check import load, to_json
from shampax.launch import completion, main

ROOT = Path(main.__file__).resolve().parents[1]


def ran(arguments, capsys):
    """Run the command; return its exit code and the lines of both outputs."""
    code = main.main(arguments)
    shown = capsys.readouterr()
    return code, shown.out.splitlines(), shown.err.splitlines()


def test_every_verb_is_listed_and_is_a_module(capsys):
    """Faults: a verb that does not exist is listed; a module of the folder with `main` is no verb."""
    modules = {path.stem for path in (ROOT / "launch").glob("*.py") if "\ndef main(" in path.read_text()} - {"main"}
    assert modules == {*main.VERBS}
    for arguments in ([], ["--help"], ["-h"]):
        code, out, err = ran(arguments, capsys)
        assert (code, err) == (0, [])
        assert {*main.VERBS} <= {line.split()[0] for line in out if line.startswith("  ")}


@pytest.mark.parametrize(("word", "hint"), [("trian", "Did you mean 'train'?"), ("qqq", "It must be one of train, ")])
def test_an_unknown_verb_is_one_line(word, hint, capsys):
    """Fault: a traceback of an import."""
    code, out, [line] = ran([word, "--help"], capsys)
    assert (code, out) == (2, []) and line.startswith(f"error: unknown verb '{word}'. {hint}")


def test_flags_and_exit_codes_are_those_of_the_verb(capsys):
    """Faults: the verb gets the word that names it; its exit code is lost; its help names another command."""
    code, _, [line] = ran(["train", "--config=lm:sample"], capsys)
    assert (code, line) == (2, "error: the following arguments are required: --workdir. See --help.")
    code, out, _ = ran(["plan", "--help"], capsys)
    assert code == 0 and out[0].startswith("usage: shampax plan ")


@pytest.mark.slow
def test_the_module_and_ctrl_c_during_imports(tmp_path):
    """Faults: `python -m shampax` is no command; Ctrl-C during the imports of a verb is a traceback."""
    command = [sys.executable, "-m", "shampax", "train", "--config=lm:sample", f"--workdir={tmp_path / 'work'}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while "jaxlib" not in Path(f"/proc/{process.pid}/maps").read_text() and process.poll() is None:
            pass
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (130, "", "interrupted\n")


def test_a_short_name_is_the_shipped_config():
    """Faults: another file; the variant is lost; a name that is no config is looked for as a file."""
    assert to_json(load("lm:sample_moe")) == to_json(load("shampax/configs/lm.py:sample_moe"))
    assert to_json(load("dlrm")) == to_json(load("shampax/configs/dlrm.py"))
    assert files.shipped() == sorted(
        path.stem for path in (ROOT / "configs").glob("*.py") if path.stem[0] != "_" and path.stem != "base"
    )


def test_models_lists_every_variant_and_filters(capsys):
    """Faults: a variant without a line; an abstract class is offered; a filter shows lines without its words."""
    code, out, err = ran(["models"], capsys)
    assert (code, err) == (0, [])
    told = dict(line.split(maxsplit=1) for line in out if line.startswith("  "))
    assert {f"{name}:{each}" for name in files.shipped() for each in files.module_of(name).VARIANTS} <= set(told)
    assert "shampax.optimizers.shampoo:ShampooOptions" in told and not any("Preparable" in name for name in told)
    _, out, _ = ran(["models", "dlrm", "flights"], capsys)
    assert len(out) > 1 and all("flights" in line for line in out if line.startswith("  "))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("shampax tr", ["train", "translate"]),
        ("shampax train --config=lm:by", ["bytes"]),
        ("shampax train --config=dl", ["dlrm:criteo_kaggle", "dlrm:paper", "dlrm:sample", "dlrm:sample_adagrad"]),
        ("shampax train --config=lm:bytes --config.task.kv", ["--config.task.kv_heads="]),
        ("shampax train --config.mesh.fs", ["--config.mesh.fsdp="]),
        ("shampax train --config=no:such --config.mesh.fs", ["--config.mesh.fsdp="]),
        ("shampax train --config.seed=", []),
        ("shampax checkpoint li", []),
    ],
)
def test_completions(line, expected):
    """Faults: a shell that breaks words at "=" and ":" repeats what is there; a wrong config ends completion."""
    assert completion.candidates(line) == expected


def test_bash_completes(tmp_path):
    """Faults: the script that `completion` prints does not work in bash; the cursor's place is ignored."""
    (tmp_path / "shampax").write_text(f'#!/bin/sh\nexec {sys.executable} -m shampax "$@"\n')
    (tmp_path / "shampax").chmod(0o755)
    program = """
        source <(shampax completion)
        COMP_LINE='shampax mod --config' COMP_POINT=11 shampax completion --line
        complete -p shampax
    """
    environ = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        ["bash", "-c", textwrap.dedent(program)], env=environ, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [
        "models",
        "complete -o default -o nospace -C 'shampax completion --line' shampax",
    ]
