"""Test the plan command and its figures for slices that are not attached."""

import json
import subprocess
import sys

import pytest

# Each test starts a process that imports JAX, traces a model and may compile it for TPUs.
pytestmark = pytest.mark.slow

LM = "--config=shampax/configs/lm.py:"


def plan(*arguments):
    """Run the command; return exit code, standard output and standard error."""
    command = [sys.executable, "-m", "shampax.launch.plan", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


def test_a_full_size_config_is_planned_without_accelerator_or_data():
    """Fault: planning needs the planned devices or the data set."""
    code, out, _ = plan(f"{LM}1b", "--devices=256", "--json")
    assert code == 0
    found = json.loads(out)
    assert found["mesh"] == {"data": 16, "fsdp": 16, "tensor": 1} | {
        axis: 1 for axis in found["mesh"] if axis not in ("data", "fsdp", "tensor")
    }
    assert sum(elements for _, elements in found["parameters"].values()) == 1_199_671_296
    assert found["bytes"]["parameters"] == pytest.approx(4 * 1_199_671_296 / 16, rel=0.01)
    assert found["bytes"]["momentum"] == pytest.approx(found["bytes"]["parameters"] / 16, rel=0.5)
    assert (found["compiled"], found["fits"]) == ({}, None)


@pytest.fixture(scope="module")
def small():
    """Plan a small language model for 16 chips."""
    return plan(f"{LM}sample", "--topology=v5e:4x4", "--json", "--config.task.layers=1")


def test_plan_for_a_slice_that_is_not_attached(small):
    """Fault: the compiler's figures are missing, or are for this machine's CPU."""
    code, out, err = small
    assert code == 0, err
    found = json.loads(out)
    assert found["device_kind"] == "TPU v5 lite"
    train = found["compiled"]["train"]
    assert train["arguments"] == pytest.approx(found["state_bytes"], rel=0.1)
    assert found["state_bytes"] < found["peak"] == train["peak"] < found["memory"]
    parts = train["work"]["parts"]
    of_model = sum(part["flops"] for name, part in parts.items() if name != "optimizer")
    assert found["model_flops"] < of_model < 2 * found["model_flops"]
    assert train["work"]["traffic"]["all-to-all"]["count"] >= 2
    assert 0 < sum(part["seconds"] for part in parts.values()) < found["step_seconds"] < 1
    assert 0 < found["mfu_bound"] < found["mfu_bound_whole_square"] < 1


def test_a_plan_that_does_not_fit_ends_with_1():
    """Fault: a compiler error ends in a traceback or in success."""
    sizes = ("vocab_size=4096", "layers=1", "heads=1", "kv_heads=1")
    code, out, err = plan(
        f"{LM}sample_adamw",
        "--topology=v5e:2x2",
        "--config.batch_size=65536",
        *(f"--config.task.{knob}" for knob in sizes),
    )
    assert code == 1, err
    assert "the compiler refuses it" in out
    assert "available HBM" in out
    assert "does not fit" in out
    assert "Traceback" not in err


def test_without_a_compiler_the_rest_is_planned():
    """Fault: a missing compiler ends in an error, although most figures need none."""
    code, out, err = plan(f"{LM}sample", "--gpu=4xh100")
    assert code == 0
    assert "make install EXTRA=plan-gpu" in err and err.count("\n") == 1
    assert "lm.py:sample on 4 x" in out
    assert "unknown whether it fits" in out


REFUSED = [
    ((f"{LM}sample", "--topology=v5e-16"), "--topology=v5e-16: no such TPU slice"),
    ((f"{LM}sample", "--gpu=8xh1000"), "--gpu=8xh1000: no such GPUs"),
    ((f"{LM}sample", "--topolgy=v5e:2x2"), "unrecognized arguments: --topolgy=v5e:2x2"),
    ((f"{LM}samle",), "Did you mean 'sample'"),
    ((f"{LM}sample", "--devices=1000000000"), "1000000000 devices: must be at least 1 and at most 16384"),
    ((f"{LM}sample", "--config.mesh.data=2147483647"), "2147483647 devices: must be at least 1 and at most 16384"),
    ((f"{LM}sample", "--devices=-1"), "-1 devices: must be at least 1"),
    ((f"{LM}sample", "--devices=3"), "batch_size=16: must be divisible by 3 data shards"),
]
# Runs the command with each of several lists of arguments.
EACH = """
import contextlib, io, json, sys
from shampax.launch.plan import main
for arguments in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(arguments)
    print(json.dumps([code, out.getvalue(), err.getvalue()]))
"""


@pytest.fixture(scope="module")
def refused():
    """Run all commands of REFUSED in one process; return exit code, standard output and standard error of each."""
    command = [sys.executable, "-c", EACH, json.dumps([arguments for arguments, _ in REFUSED])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("number", range(len(REFUSED)), ids=[words for _, words in REFUSED])
def test_errors_are_one_line(refused, number):
    """Faults: a traceback; a plan for something that was not requested."""
    (code, out, err), (_, words) = refused[number], REFUSED[number]
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert words in err
