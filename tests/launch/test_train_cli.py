import errno
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from shampax.configs import base, lm
from shampax.framework import train as trainer
from shampax.framework.base.errors import TrainingStopped, UserError
from shampax.framework.config import files, overrides
from shampax.framework.config.check import load, to_json
from shampax.launch import knobs
from shampax.launch.train import baseline, main

SAMPLE = "--config=shampax/configs/lm.py:sample"
SHIPPED = [f"{name}:{each}" for name in files.shipped() for each in files.module_of(name).VARIANTS]


@pytest.fixture
def broken_file(tmp_path):
    path = tmp_path / "broken.py"
    path.write_text(
        "from shampax.configs import base\n"
        "def get_config():\n"
        "    config = base.get_config()\n"
        "    config.batchsize = 3\n"
        "    return config\n"
    )
    return path


def ran(arguments, capsys):
    """Run the command; return exit code, lines of stdout and lines of stderr."""
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out.splitlines(), captured.err.splitlines()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([SAMPLE, "--config.batchsize=3"], "unknown key 'config.batchsize'. Did you mean 'config.batch_size'?"),
        ([SAMPLE, "--config.batch_size", "many"], "config.batch_size='many': expected int."),
        ([SAMPLE, "--config.batch_size="], "config.batch_size='': expected int."),
        ([SAMPLE, "--config.seed=a\nb\tc"], r"config.seed='a\nb\tc': expected int."),
        ([SAMPLE, "--config.a\nb=1"], r"unknown key 'config.a\nb'. --help lists all."),
        ([SAMPLE, "--config.duration=5 epoks"], "unknown unit 'epoks'"),
        (
            [SAMPLE, "--config.optimizer.beta3=1"],
            "unknown key 'config.optimizer.beta3'. Did you mean 'config.optimizer.beta",
        ),
        ([SAMPLE, "--config.task.heads=7"], "task.kv_heads=2: must divide task.heads=7"),
        ([SAMPLE, "--config.task.name=no_such.module:Task"], "No module named 'no_such'"),
        ([SAMPLE, "--config.task.name=shampax.models.lm:LMTsak"], "Did you mean 'LMTask'?"),
        ([SAMPLE, "--config.optimizer.name=adamw"], ", shampax.optimizers.baselines:AdamWOptions, "),
        (
            [SAMPLE, "--config.task.name=shampax.optimizers.baselines:AdamWOptions"],
            "config.task.name=shampax.optimizers.baselines:AdamWOptions: has no method init(key, batch_spec). Add",
        ),
        (
            [SAMPLE, "--config.optimizer.name=shampax.models.lm:LMTask"],
            "LMTask: has no method build(learning_rate, mesh=, axis_names=, param_specs=). Add",
        ),
        ([SAMPLE + "s"], "shampax/configs/lm.py has no variant 'samples'. Did you mean 'sample'?"),
        (["--config=configs/no.py"], "no config file 'configs/no.py'"),
        (["--config=sample"], "no shipped config 'sample'; a file of yours ends in .py. Choose from: bert, "),
        ([], "the following arguments are required: --config. See --help."),
        (["--config="], "--config: the value is missing. Write --config=VALUE"),
        ([SAMPLE, "--config.seed"], "--config.seed: the value is missing. Write --config.seed=VALUE"),
        ([SAMPLE, "--config.seed", "--config.batch_size=3"], "--config.seed: the value is missing"),
        ([SAMPLE, "--verbose"], "unrecognized arguments: --verbose"),
        ([SAMPLE, "--config", "--config.seed=3"], "argument --config: expected one argument"),
        ([SAMPLE, "runs/other"], "unrecognized arguments: runs/other"),
        (
            [SAMPLE, "--config.profile_steps=20:10"],
            "config.profile_steps='20:10': not a range of steps. Write FIRST:STOP, such as 10:20",
        ),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(arguments, message, tmp_path, capsys):
    workdir = tmp_path / "work"
    code, out, err = ran([f"--workdir={workdir}", *arguments], capsys)
    assert code == 2
    assert out == []
    assert len(err) == 1
    assert err[0].startswith("error: ")
    assert message in err[0]
    assert not workdir.exists()


def test_a_workdir_with_too_long_a_name_is_one_line(tmp_path, capsys):
    code, _, err = ran([SAMPLE, f"--workdir={tmp_path / ('x' * 300)}"], capsys)
    assert (code, len(err)) == (2, 1)
    assert "File name too long" in err[0]


def test_a_misspelt_key_in_a_file_is_one_line_with_its_place(broken_file, tmp_path, capsys):
    code, out, err = ran([f"--config={broken_file}", f"--workdir={tmp_path / 'work'}"], capsys)
    assert (code, out) == (2, [])
    assert err == [f"error: {broken_file}:4: unknown key 'batchsize'. Did you mean 'batch_size'?"]
    assert not (tmp_path / "work").exists()


def test_a_missing_workdir_is_one_line(capsys):
    assert ran([SAMPLE], capsys)[2] == ["error: the following arguments are required: --workdir. See --help."]


def test_the_command_itself(broken_file, tmp_path):
    command = [sys.executable, "-m", "shampax.launch.train", f"--config={broken_file}", "--workdir=work"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
    assert not (tmp_path / "work").exists()


def test_an_incomplete_process_index_and_count_are_one_line(monkeypatch, capsys):
    monkeypatch.setenv("JAX_PROCESS_ID", "1")
    code, out, [line] = ran([SAMPLE, "--workdir=w"], capsys)
    assert (code, out) == (2, [])
    assert line.startswith("error: JAX_PROCESS_ID set for a run of several processes, but JAX_COORDINATOR_ADDRESS")


RESULT = {"stopped": None, "steps": 3}


@pytest.fixture
def trained(monkeypatch):
    """Replace training, to test only exit codes and messages."""
    calls = []

    def answer(outcome):
        def train(config, workdir):
            calls.append((config, workdir))
            if isinstance(outcome, Exception):
                raise outcome
            return outcome

        monkeypatch.setattr(trainer, "train", train)
        return calls

    return answer


@pytest.mark.parametrize(("stopped", "code"), [(None, 0), ("SIGINT", 130), ("SIGTERM", 143)])
def test_the_exit_code_says_how_training_ended(stopped, code, trained, capsys):
    calls = trained(RESULT | {"stopped": stopped})
    returned, out, err = ran([SAMPLE, "--workdir=w", "--config.batch_size", "8"], capsys)
    assert returned == code
    assert err == []
    [(config, workdir)] = calls
    assert (config.batch_size, workdir) == (8, "w")
    assert "Results: w (" in "\n".join(out)
    assert ("-m shampax report" in "\n".join(out)) == (stopped is None)
    assert ("Rerun the same command to resume" in "\n".join(out)) == (stopped is not None)


def test_training_that_fails(trained, capsys):
    trained(TrainingStopped("20 steps in a row"))
    assert ran([SAMPLE, "--workdir=w"], capsys) == (1, [], ["error: 20 steps in a row"])


def test_user_errors_of_the_trainer(trained, capsys):
    trained(UserError("batch 100 is not\ndivisible"))
    assert ran([SAMPLE, "--workdir=w"], capsys) == (2, [], ["error: batch 100 is not divisible"])


def test_a_full_disk_at_the_start_is_one_line(trained, capsys):
    """Fault: a traceback ends a run that cannot write its config or its lock."""
    trained(OSError(errno.ENOSPC, "No space left on device"))
    code, _, err = ran([SAMPLE, "--workdir=w"], capsys)
    assert (code, len(err)) == (2, 1)
    assert (
        "--workdir=w: cannot be used" in err[0] and "No space left on device" in err[0] and "free some space" in err[0]
    )


WITHOUT_A_HOME = """
import pwd, sys
def unknown(uid):
    raise KeyError(f"getpwuid(): uid not found: {uid}")
pwd.getpwuid = unknown
from shampax.launch import train
sys.exit(train.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_user_without_a_home_trains(tmp_path):
    """Fault: a library asks for the user's home or name, which a number in a container does not have."""
    (tmp_path / "config.py").write_text(
        "import toy_runs\ndef get_config():\n"
        "    return toy_runs.make_config(duration='2 steps', trackers=('tensorboard',))\n"
    )
    variables = {key: value for key, value in os.environ.items() if key not in ("HOME", "USER", "LOGNAME", "LNAME")}
    command = [
        sys.executable,
        "-c",
        WITHOUT_A_HOME,
        f"--config={tmp_path / 'config.py'}",
        f"--workdir={tmp_path / 'w'}",
    ]
    variables["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "warning" not in done.stdout
    assert len(list((tmp_path / "w").glob("events.out.tfevents.*"))) == 1


def test_several_processes_that_do_not_know_their_numbers_are_refused(trained, monkeypatch, capsys):
    """Fault: each machine of a TPU slice trains a model of its own."""
    monkeypatch.setattr("jax.process_count", lambda: 4)
    assert not trained(RESULT)
    code, out, [line] = ran([SAMPLE, "--workdir=w"], capsys)
    assert (code, out) == (2, [])
    assert line.startswith("error: JAX sees 4 processes. Set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and ")


@pytest.mark.parametrize("library", ["numpy", "jaxlib"])
def test_ctrl_c_during_imports_is_one_line(library, tmp_path):
    """Faults: a traceback, a crash, or a library catches the interrupt, and the run continues."""
    command = [sys.executable, "-m", "shampax.launch.train", SAMPLE, f"--workdir={tmp_path / 'work'}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while library not in pathlib.Path(f"/proc/{process.pid}/maps").read_text() and process.poll() is None:
            time.sleep(0.001)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (130, "", "interrupted\n")


@pytest.mark.parametrize(("module", "at_once"), [("launch.plan", True), ("benchmarks.timing", False)])
def test_only_a_verb_exits_at_once_during_imports(module, at_once):
    """Fault: Ctrl-C ends a benchmark, or a user's program, before it has cleaned up."""
    program = f"""
        import signal, sys
        sys.argv[0], sys.orig_argv[:] = "-m", ["python", "-m", "shampax.{module}"]  # as while packages are imported
        import shampax.{module.partition(".")[0]}
        print(signal.getsignal(signal.SIGINT) is not signal.default_int_handler)
        if {at_once}:
            shampax.launch.interruptible()
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.stderr) == (f"{at_once}\n", "")


@pytest.mark.parametrize("arguments", [["--help"], ["--help", SAMPLE], [SAMPLE, "-h", "--config.batch_size=77"]])
def test_help_shows_every_knob_with_its_comment(arguments, capsys):
    code, out, err = ran(arguments, capsys)
    assert (code, err) == (0, [])
    shown = {line[2:].partition("=")[0]: line for line in out if line[2:].startswith("--config.")}
    assert {"--config.schedule.learning_rate", "--config.mesh.fsdp", "--config.task.name"} <= set(shown)
    assert ("--config.optimizer.interval" in shown) == (SAMPLE in arguments)
    assert shown["--config.batch_size"].startswith("* --config.batch_size=77 ") == ("-h" in arguments)
    assert shown["--config.samples.every"].split("  ", 2)[1] == "--config.samples.every='0 steps'"


@pytest.mark.parametrize("columns", [20, 80, 200])
def test_comments_stand_in_one_column_and_no_value_is_cut(columns, monkeypatch):
    """Faults: a value with a line break, or a long key, breaks the table; a value ends in dots."""
    monkeypatch.setenv("COLUMNS", str(columns))
    config = lm.get_config()
    with config.unlocked():
        config.resume_from = "a\nb"
    lines = [line for line in knobs.table(config).splitlines() if line]
    assert any(line.startswith("* --config.resume_from=") and r"a\nb" in line for line in lines)
    for line in lines:
        start = line[:48].rstrip()
        assert not line[48:].startswith(" ") and (not start or start[2:].startswith("--config.") or start == line)


@pytest.mark.parametrize("file", SHIPPED)
def test_every_flag_of_the_help_sets_the_value_that_it_shows(file):
    """Faults: a shell takes a value apart; a value is shown in a form that is refused; a star is at a default."""
    config = load(file)
    shown = list(knobs.knobs(config))
    words = shlex.split(" ".join(knob.flag for knob in shown))
    assert len(words) == len(shown)
    again = base.get_config()
    overrides.apply(again, [word.removeprefix("--config.") for word in words])
    assert to_json(again) == to_json(config)
    assert not any(knob.changed for knob in knobs.knobs(base.get_config()))


def test_help_with_a_word_lists_only_its_knobs(capsys):
    """Faults: all knobs are listed; a word without knobs is an empty page."""
    code, out, err = ran(["--config=lm:sample", "--help", "learning_rate", "peak"], capsys)
    assert (code, out[:1], err) == (0, ["schedule"], [])
    assert out[1].startswith("* --config.schedule.learning_rate=0.012 ") and len(out) == 2
    assert ran(["--help", "qqqq"], capsys)[2] == ["error: --help qqqq: no knob has these words. Try fewer."]


@pytest.mark.parametrize("optimize", ["0", "2"])
def test_help_of_every_verb(optimize):
    """Faults: "None" for a docstring that Python has removed; a traceback when the reader of the output has ended.

    All verbs run in forks of one process, with an output that is closed, and with one that is read.
    """
    program = """
        import importlib, os, pkgutil, sys
        import shampax.launch
        for module in pkgutil.iter_modules(shampax.launch.__path__):
            if module.name == "harness":  # needs an extra
                continue
            verb = importlib.import_module(f"shampax.launch.{module.name}")
            if not hasattr(verb, "main"):
                continue
            for reads in (True, False):
                sys.stdout.flush()
                reader, writer = os.pipe()
                if not reads:
                    os.close(reader)
                if os.fork() == 0:
                    os.dup2(writer, 1)
                    sys.exit(verb.main(["--help"]))
                os.close(writer)
                text = open(reader).read() if reads else ""
                code = os.waitstatus_to_exitcode(os.wait()[1])
                print(module.name, reads, code, "usage: " in text, "None" in text.split("--config.")[0])
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    environ = os.environ | {"PYTHONOPTIMIZE": optimize, "PYTHONUNBUFFERED": ""}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120, check=False)
    assert done.stderr == ""
    lines = [line.split() for line in done.stdout.splitlines()]
    assert {"train", "plan", "local", "report"} <= {name for name, *_ in lines}
    for name, reads, *rest in lines:
        assert rest == (["0", "True", "False"] if reads == "True" else ["141", "False", "False"]), name


def test_every_knob_has_a_comment():
    config = base.get_config()
    declared = knobs.reasons(base.get_config)
    for key, value in config.items():
        inner = [key] if key in declared else [f"{key}.{name}" for name in value]
        assert all(declared[name] for name in inner)


@pytest.mark.parametrize(
    ("spec", "changes", "expected"),
    [
        ("lm:sample", [], "train --config=lm:sample_adamw --workdir=runs/a_sample_adamw"),
        (
            "shampax/configs/lm.py:sample",
            ["optimizer.ridge=1e-3", "schedule.learning_rate=0.1", "resume_from=runs/b", "duration=80 steps", "seed=3"],
            "train --config=lm:sample_adamw '--config.duration=80 steps' --config.seed=3 --workdir=runs/a_sample_adamw",
        ),
        ("lm:sample_adamw", [], ""),
        (
            "lm:bytes",
            ["seed=3"],
            f"sweep --config=lm:bytes --config.seed=3 --config.optimizer.name={base.ADAMW} --workdir=runs/a_adamw "
            "--over schedule.learning_rate=3e-4,1e-3,3e-3,1e-2",
        ),
    ],
)
def test_the_suggested_baseline_has_a_rate_of_its_own_and_starts_from_scratch(spec, changes, expected):
    """Faults: AdamW is suggested at Shampoo's rate; the baseline of a resumed run resumes from Shampoo's checkpoint."""
    assert baseline(spec, changes, load(spec), "runs/a") == expected


def test_baselines_exist_and_have_rates_of_their_own():
    for name in files.shipped():
        for variant, other in getattr(files.module_of(name), "BASELINES", {}).items():
            ours, theirs = files.run(f"{name}:{variant}"), files.run(f"{name}:{other}")
            assert theirs.optimizer.name.startswith("shampax.optimizers.baselines:")
            assert theirs.schedule.learning_rate != ours.schedule.learning_rate
