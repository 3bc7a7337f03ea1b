import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from toy_runs import arrays, lines, saved
from workdirs import history

from shampax.launch.local import main

CONFIG = pathlib.Path(__file__).parents[1] / "support" / "toys" / "toy_many.py"
# Program of the processes in these tests: each writes its process id and notes to a file.
PROGRAM = """
import os, pathlib, signal, subprocess, sys, time
index = os.environ["JAX_PROCESS_ID"]
notes = pathlib.Path(sys.argv[1]) / index
def note(text):
    with notes.open("a") as file:
        file.write(f"{text}\\n")
note(os.getpid())
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Return a function that writes a program as a module and returns its command line."""
    (tmp_path / "notes").mkdir()
    (tmp_path / "noting").mkdir()
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))

    def make(text):
        (tmp_path / "noting" / "one.py").write_text(PROGRAM + text)
        return ["--", "noting.one", str(tmp_path / "notes")]

    return make


def notes_of(tmp_path, processes):
    """Return the notes of all processes after each has written one: {index: lines}."""
    end = time.monotonic() + 30
    while time.monotonic() < end:
        notes = {path.name: path.read_text().split() for path in (tmp_path / "notes").iterdir()}
        if len(notes) == processes and all(notes.values()):
            return notes
        time.sleep(0.02)
    raise AssertionError(f"{processes} processes have not started")


def launched(*arguments):
    command = [sys.executable, "-m", "shampax.launch.local", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def local(*arguments, timeout=60):
    """Run the launcher; return exit code, stdout and stderr. It forks, so it needs a process without JAX's threads."""
    process = launched(*arguments)
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return process.returncode, out, err


def gone(pids, seconds=15.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        states = [pathlib.Path(f"/proc/{pid}/stat") for pid in pids]
        if all(not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z" for stat in states):
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "error: no command. Write it after --"),
    ],
)
def test_a_command_that_cannot_start_is_one_line(arguments, message, capsys):
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("wrong", ["--processes=0", "--devices=-1", "--devices=x", "--grace_seconds=0"])
def test_invalid_numbers_are_refused(wrong, capsys):
    assert main([wrong, "--", "train"]) == 2
    assert wrong.partition("=")[0] in capsys.readouterr().err


def test_a_failing_process_ends_all_and_its_code_is_returned(module, tmp_path, monkeypatch):
    """Faults: the others run forever, even one that ignores SIGTERM; the code of another process is returned."""
    monkeypatch.delenv("NPROC")
    command = module("""
if index == "1":
    while sum("started" in path.read_text() for path in notes.parent.iterdir()) < 3:
        time.sleep(0.02)
    print("no newline at the end", end="")
    sys.exit(7)
if index == "2":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
print(os.environ["JAX_NUM_CPU_DEVICES"], os.environ["JAX_PLATFORMS"], os.environ["NPROC"], file=sys.stderr)
note("started")
time.sleep(60)
""")
    start = time.monotonic()
    code, out, err = local("--processes=4", "--devices=20", "--grace_seconds=1", *command)
    assert time.monotonic() - start < 30
    assert code == 7
    assert out == "[1] no newline at the end\n"
    assert "[0] 20 cpu 40\n" in err
    assert "local: process 1 has ended with code 7\n" in err
    assert gone([notes[0] for notes in notes_of(tmp_path, 4).values()], 0.1)


def test_the_exit_code_is_that_of_the_first_failure(module):
    """Fault: the launcher returns 75, which only says that another process failed."""
    command = module("""
if index == "1":
    note("failing")
    time.sleep(0.1)
    sys.exit(9)
while not (notes.parent / "1").exists() or "failing" not in (notes.parent / "1").read_text():
    time.sleep(0.01)
sys.exit(75)
""")
    assert local(*command)[0] == 9


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_all_processes_once_and_waits_for_them(number, module, tmp_path):
    """Faults: when the first process has ended, the slower one gets a second signal or is killed."""
    command = module("""
import threading
stop = threading.Event()
def got(number, frame):
    note(number)
    stop.set()
for each in (signal.SIGINT, signal.SIGTERM):
    signal.signal(each, got)
note("ready")
stop.wait(60)
time.sleep(1 + 1.5 * int(index))
note("saved")
sys.exit(128 + int(notes.read_text().split()[2]))
""")
    with launched("--grace_seconds=1", *command) as process:
        while not all("ready" in notes for notes in notes_of(tmp_path, 2).values()):
            time.sleep(0.02)
        process.send_signal(number)
        process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert [notes[1:] for notes in notes_of(tmp_path, 2).values()] == [["ready", str(int(number)), "saved"]] * 2


def test_a_signal_that_was_ignored_at_the_start_stays_ignored(module):
    """Fault: `nohup ... launch.local` ends when its terminal is closed."""
    command = module("""
os.kill(os.getppid(), signal.SIGHUP)
os.kill(os.getpid(), signal.SIGHUP)
time.sleep(0.3)
""")
    ignoring = (
        "import os, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN); os.execv(sys.executable, sys.argv[1:])"
    )
    launcher = [sys.executable, "-m", "shampax.launch.local", *command]
    done = subprocess.run([sys.executable, "-c", ignoring, *launcher], capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


def test_processes_of_a_run_share_a_secret(module):
    """Fault: another program of the machine can end the run."""
    command = module("print(os.environ['SHAMPAX_SECRET'])")
    secrets = [{line.split()[1] for line in local(*command)[1].splitlines()} for _ in range(2)]
    assert [len(each) for each in secrets] == [1, 1]
    assert secrets[0] != secrets[1]
    assert min(map(len, secrets[0])) >= 32


def test_all_processes_end_when_the_launcher_is_killed(module, tmp_path):
    """Fault: orphans continue to train and keep their workdir locked."""
    with launched(*module("time.sleep(60)")) as process:
        pids = [notes[0] for notes in notes_of(tmp_path, 2).values()]
        process.kill()
        process.communicate(timeout=30)
    assert gone(pids)


def test_children_of_a_process_end_with_it(module, tmp_path):
    command = module("""
note(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]).pid)
""")
    assert local(*command)[0] == 0
    assert gone([notes[1] for notes in notes_of(tmp_path, 2).values()])


SMALL_LM = (
    "task.layers=2",
    "task.embed_dim=16",
    "task.heads=4",
    "task.kv_heads=2",
    "task.head_dim=8",
    "task.mlp_dim=32",
    "task.vocab_size=300",
    "data.sequence_length=16",
    "data.max_records=2",
    "optimizer.block_size=16",
    "optimizer.interval=3",
    "batch_size=16",
    "duration=8 steps",
    "evaluation.every=0 steps",
    "evaluation.batches=1",
    "checkpoint.every=0 steps",
    "log.every=1 steps",
)


@pytest.mark.slow
def test_two_processes_of_two_devices_train_as_one_of_four(tmp_path):
    """Fault: the losses depend on the number of processes, even in the last bit."""
    sample = "shampax/configs/lm.py:sample"
    for processes in (2, 1):
        command = ["train", f"--config={sample}", f"--workdir={tmp_path / str(processes)}"]
        command += [f"--config.{change}" for change in SMALL_LM]
        code, out, err = local(f"--processes={processes}", f"--devices={4 // processes}", "--", *command, timeout=240)
        assert code == 0, err
        assert re.search(r"^\[0\] mesh: .*data 4", out, re.MULTILINE)
    assert len(history(tmp_path / "2", "train/loss")) == 8
    assert history(tmp_path / "2", "train/loss") == history(tmp_path / "1", "train/loss")


@pytest.mark.slow
def test_a_killed_run_resumes_and_ends_as_an_undisturbed_one(tmp_path, monkeypatch):
    """Fault: a kill ends the run or changes its bits."""

    def command(workdir):
        knobs = ["--config.duration=40 steps", "--config.data.row_seconds=0.02"]
        return ["--", "train", f"--config={CONFIG}", f"--workdir={workdir}", *knobs]

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    # One process with both devices has the same bits.
    code, _, err = local("--processes=1", "--devices=2", *command(tmp_path / "whole"), timeout=180)
    assert code == 0, err
    killed = tmp_path / "killed"
    with launched(*command(killed)) as process:
        end = time.monotonic() + 120
        while not (killed / "checkpoints" / "10").exists() and time.monotonic() < end:
            time.sleep(0.02)
        victim, *_ = (
            int(path.parent.name)
            for path in pathlib.Path("/proc").glob("[0-9]*/environ")
            if f"{process.pid}" == path.with_name("stat").read_text().rpartition(")")[2].split()[1]
            and b"JAX_PROCESS_ID=1\0" in path.read_bytes()
        )
        os.kill(victim, signal.SIGKILL)
        _, err = process.communicate(timeout=180)
    assert process.returncode == 137, err
    assert "local: process 1 has ended with code 137, SIGKILL\n" in err
    code, _, err = local(*command(killed), timeout=180)
    assert code == 0, err
    assert saved(killed)[-1] == 40
    assert lines(killed) == lines(tmp_path / "whole")
    jax.tree.map(np.testing.assert_array_equal, arrays(killed, 40), arrays(tmp_path / "whole", 40))
