"""Test the table of MFU bounds without compiling."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

from shampax.benchmarks import bounds
from shampax.configs import lm
from shampax.framework.base.errors import UserError

ROW = {
    "devices": "v5e:16x16",
    "optimizer": "AdamWOptions",
    "milliseconds": 205.8,
    "network_milliseconds": 40.1,
    "bytes_between_slices": 12.3e6,
    "mfu_bound": 0.66,
    "mfu_bound_whole_square": 0.711,
    "peak_share": 0.372,
}


def test_the_table_has_a_line_for_each_program():
    """Fault: a figure stands under another heading; a program that does not fit is left out."""
    refused = {"devices": "v5p:4x4x8", "optimizer": "AdamWOptions", "error": "Ran out of memory"}
    lines = bounds.table({"1b_adamw": ROW, "8b": refused}).splitlines()
    assert lines[2] == "| 1b_adamw | v5e:16x16 | AdamW | 206 | 40 | 12 | 66% | 71% | 37% |"
    assert "does not fit: Ran out of memory" in lines[3]
    assert len({line.count("|") for line in lines}) == 1


def test_only_the_chosen_rows_of_a_page_are_replaced(tmp_path, monkeypatch):
    """Faults: the text around the table, or a row that is not compiled again, is lost."""
    page, section = tmp_path / "page.md", bounds.SECTION
    kept = "| moe | v5e:16x16 | AdamW | 398 | 63 | 0 | 58% | 60% | 64% |"
    page.write_text(f"before\n{section.begin}\n| 1b_adamw | old |\n{kept}\n{section.end}\nafter\n")
    monkeypatch.setattr(bounds, "bound", lambda case: ROW)
    monkeypatch.setattr(bounds.targets, "missing", lambda *names: "")
    monkeypatch.setattr(bounds.targets, "compile_fast", lambda: None)
    bounds.run(argparse.Namespace(only="1b_adamw", markdown=page))
    text = page.read_text()
    assert text.startswith(f"before\n{section.begin}\n| program |")
    assert text.endswith(f"37% |\n{kept}\n{section.end}\nafter\n")
    assert "old" not in text
    with pytest.raises(UserError, match="unknown 2b"):
        bounds.run(argparse.Namespace(only="2b", markdown=None))


def test_every_case_is_a_shipped_config():
    """Fault: a variant is renamed, and minutes later the last case fails."""
    assert {case.variant for case in bounds.CASES.values()} <= set(lm.VARIANTS)
    for case in bounds.CASES.values():
        lm.get_config(case.variant).update_from_flattened_dict(dict(case.changes))


@pytest.mark.slow
def test_the_bound_of_1b_is_that_of_the_best_known_program():
    """Faults: attention or remat of the shipped config, or the way it is judged, gets worse."""
    command = [sys.executable, "-m", "shampax.benchmarks.bounds", "--only=1b_adamw"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(bounds.__file__).parents[2])
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)["1b_adamw"]
    assert row["milliseconds"] == pytest.approx(205, rel=0.03)
    assert row["network_milliseconds"] == pytest.approx(40, rel=0.03)
    assert row["mfu_bound_whole_square"] >= 0.69
    assert row["peak_share"] < 0.9
