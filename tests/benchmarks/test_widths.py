import json
import math

import pytest

from shampax.benchmarks import widths


def test_the_best_rate_lies_between_those_tried():
    """Faults: the rate is one of the grid, so that all spreads are powers of two; a diverged neighbour gives NaN."""
    parabola = {2.0**k: (k - 0.25) ** 2 for k in range(-2, 3)}
    assert widths.best_rate(parabola) == pytest.approx(2**0.25)
    assert widths.best_rate(parabola | {2.0: math.inf}) == 1.0
    assert widths.best_rate({1.0: 3.0, 2.0: 2.0}) == 2.0


def test_the_table_has_one_row_for_each_width(tmp_path, capsys):
    """Fault: runs with and without the rules, or of different widths, are mixed."""
    document = tmp_path / "page.md"
    document.write_text(f"{widths.SECTION.begin}\n{widths.SECTION.end}\n")
    for width, rules, best in ((64, "off", 0.02), (64, "on", 0.02), (256, "off", 0.005), (256, "on", 0.02)):
        (tmp_path / "runs" / str(width)).mkdir(parents=True, exist_ok=True)
        for rate in (0.0025, 0.005, 0.01, 0.02, 0.04):
            loss = None if rate == 0.04 and rules == "off" else 2 + math.log2(rate / best) ** 2
            content = {"variant": rules, "seed": 0, "trial": {"rate": rate}, "settings": {}, "steps": 1}
            content |= {"heldout": [{"step": 1, "loss": loss}], "stopped": None if loss else "the loss was not finite"}
            (tmp_path / "runs" / str(width) / f"{rules}-{rate}.json").write_text(json.dumps(content))
    assert widths.main(["table", f"--workdir={tmp_path / 'runs'}", f"--markdown={document}"]) == 0
    spreads = {rules: found["spread"] for rules, found in json.loads(capsys.readouterr().out).items()}
    assert spreads == {"off": pytest.approx(4.0), "on": pytest.approx(1.0)}
    rows = document.read_text().splitlines()
    assert "| 256 | 3.000 | **2.000** | 3.000 | 6.000 | diverged | 0.005 |" in rows
    assert "| 256 | 11.000 | 6.000 | 3.000 | **2.000** | 3.000 | 0.02 |" in rows
