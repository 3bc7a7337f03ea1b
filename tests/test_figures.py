import re
import runpy
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1] / "docs"


def texts(figure):
    return re.findall(r"<text .*?>(.*?)</text>", figure.read_text(), re.DOTALL)


def test_the_figures_are_those_that_the_script_draws(tmp_path):
    """Fault: the script has changed, and the pages still show the old figures."""
    drawn = runpy.run_path(str(DOCS / "figures.py"))["write"](tmp_path)
    names = ("step", "block", "valley", "owners", "rates", "workloads")
    assert [path.name for path in drawn] == [f"{name}.svg" for name in names]
    for path in drawn:
        assert texts(path) == texts(DOCS / "images" / path.name)
        assert len(texts(path)) > 2
