"""Run the device benchmark on a CPU."""

import json
import os
import subprocess
import sys

import pytest

from shampax.benchmarks import device


@pytest.mark.slow
def test_it_runs_to_its_end_on_a_cpu():
    """Fault: the benchmark fails only where minutes of an accelerator are counted."""
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
    command = [sys.executable, "-m", "shampax.benchmarks.device", "--tiny"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert rows[0]["platform"] == "cpu"
    measured = [row for row in rows if "ms" in row]
    assert {row["section"] for row in measured} == set(device.SECTIONS)
    for row in (row for row in measured if row["section"] == "attention"):
        assert max(value for name, value in row.items() if name.endswith("error")) < 0.02
    assert [row["optimizer"] for row in measured if row["section"] == "optimizers"][:3] == ["adamw", "muon", "shampoo"]
    assert [row["roots"] for row in measured if row["section"] == "host"] == ["none", "device", "host"]


def test_a_section_that_fails_or_lasts_too_long_does_not_stop_the_others(monkeypatch, capsys):
    """Faults: one fault ends the run; a section takes the time of the others."""

    def fails(sizes):
        raise RuntimeError("no such kernel")
        yield

    def rows(sizes):
        yield {"section": "slow", "row": 1}
        yield {"section": "slow", "row": 2}

    monkeypatch.setattr(device, "SECTIONS", {"broken": (fails, 9), "slow": (rows, -1), "last": (rows, 9)})
    assert device.run(device.TINY, ["broken", "slow", "last"]) == 1
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert printed[0] == {"section": "broken", "error": "RuntimeError: no such kernel"}
    assert {"section": "slow", "stopped": "after -1 s"} in printed
    assert sum("row" in row for row in printed) == 3
