import html.parser
import json
import pathlib

import pytest

from shampax.framework.base import workdir
from shampax.launch import report


def write(path, *, seed=0, rate=0.001, slope=0.04, optimizer="Shampoo", finished=True, steps=60):
    """Write a run whose loss falls by `slope` per step; metrics every 10 steps, held-out metrics every 20."""
    path.mkdir(parents=True)
    config = {"seed": seed, "schedule": {"learning_rate": rate}, "optimizer": {"name": optimizer}}
    (path / workdir.CONFIG).write_text(json.dumps(config))
    lines = []
    for step in range(10, steps + 1, 10):
        line = {
            "step": step,
            "seconds": step * 0.5,
            "tokens": step * 100,
            "train/loss": 6 - slope * step + 0.1 * seed,
        }
        if optimizer == "Shampoo":
            line |= {"optimizer/residual_max": 10.0 ** -(step / 10), "optimizer/failures": 0}
        if step % 20 == 0:
            line |= {"heldout/loss": 6.5 - slope * step + 0.2 * seed, "heldout/bits_per_byte": 2.0}
        lines.append(json.dumps(line) + "\n")
    (path / workdir.METRICS).write_text("".join(lines))
    if finished:
        result = {
            "steps": steps,
            "seconds": steps * 0.5,
            "tokens": steps * 100,
            "heldout_loss": 6.5 - slope * steps + 0.2 * seed,
            "best_heldout_loss": 6.5 - slope * steps + 0.2 * seed,
            "bits_per_byte": 2.0,
            "optimizer": optimizer,
            "skipped_steps": 0,
            "clipped_steps": 41,
            "refreshes": 12,
            "devices": 4,
            "parameters": 1234567,
            "stopped": None,
        }
        (path / workdir.RESULT).write_text(json.dumps(result))
    return path


class Page(html.parser.HTMLParser):
    """Collect a page's tags, rows and text, and check that tags are closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text, self.rows = [], [], "", []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in {"meta", "img"}:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.open and self.open[-1] in {"td", "th"}:
            self.rows[-1].append(data)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Report three seeds of a fast config and one run of a slow one."""
    root = tmp_path_factory.mktemp("runs")
    paths = [write(root / f"fast-seed{seed}", seed=seed) for seed in range(3)]
    paths.append(write(root / "slow", slope=0.02, rate=0.002, optimizer="AdamW"))
    assert report.main([*map(str, paths), f"--output={root / 'out'}"]) == 0
    return root, paths


def test_the_page_needs_no_other_file_and_starts_with_the_states_of_the_runs(two):
    """Fault: a script or an image is loaded from a network."""
    root, _ = two
    assert [path.name for path in (root / "out").iterdir()] == ["index.html"]
    page = Page((root / "out" / "index.html").read_text())
    assert not {"link", "iframe", "img"} & {tag for tag, _ in page.tags}
    assert not any({"src", "href"} & attributes.keys() for _, attributes in page.tags)
    paragraphs = [number for number, (tag, _) in enumerate(page.tags) if tag == "p"]
    assert paragraphs[0] < [tag for tag, _ in page.tags].index("h2")
    assert "fast-seed1: complete after 60 steps" in page.text
    assert page.text.count("Plotly.newPlot(") >= 3 + 2 + 1  # losses, diagnostics, bits per byte


def test_page_shows_results_race_and_differing_knobs(two):
    root, _ = two
    rows = Page((root / "out" / "index.html").read_text()).rows
    results = {row[0]: dict(zip(rows[0], row, strict=True)) for row in rows[1:5]}
    assert list(results) == ["fast-seed0", "fast-seed1", "fast-seed2", "slow"]
    assert results["fast-seed2"] == {
        "run": "fast-seed2",
        "learning rate": "0.001",
        "seed": "2",
        "steps": "60",
        "seconds": "30.0000",
        "tokens": "6,000",
        "heldout loss": "4.5000",
        "best heldout loss": "4.5000",
        "bits per byte": "2.0000",
        "optimizer": "Shampoo",
        "skipped steps": "0",
        "clipped steps": "41",
        "refreshes": "12",
        "devices": "4",
        "parameters": "1,234,567",
    }
    # The slow run ends at 5.3; the mean of the fast ones, 6.7 - 0.04 step, reaches this at step 35 of 60.
    assert ["fast-seed0 and 2 more", "35 (58%)", "18 (58%)", "3,500 (58%)"] in rows
    assert ["slow", "60 (100%)", "30 (100%)", "6,000 (100%)"] in rows
    assert ["schedule.learning_rate", "0.001", "0.002"] in rows


def test_names_are_escaped(tmp_path):
    """Fault: a name is read as HTML, by the browser or by plotly."""
    path = write(tmp_path / "<b>&run")
    assert report.main([str(path)]) == 0
    content = (path / "report" / "index.html").read_text()
    assert "<b>&run" not in content and r"\u003cb\u003e\u0026run" not in content
    assert "&lt;b&gt;&amp;run" in content


def test_a_run_without_a_result_is_drawn_with_its_last_measurement(tmp_path, capsys):
    path = write(tmp_path / "cut", finished=False)
    with (path / workdir.METRICS).open("a") as file:
        file.write('{"step": 70, "train/lo')
    assert report.main([str(path)]) == 0
    page, out = Page((path / "report" / "index.html").read_text()), capsys.readouterr().out
    for text in (out, page.text):
        assert "cut: running or killed; last measurement after 60 steps, at 20" in text
        assert "line 7" in text
    assert dict(zip(page.rows[0], page.rows[1], strict=True))["heldout loss"] == "4.1000"
    assert "cut/report/index.html" in out


def test_a_stopped_run_says_why(tmp_path, capsys):
    path = write(tmp_path / "early")
    result = json.loads((path / workdir.RESULT).read_text())
    (path / workdir.RESULT).write_text(json.dumps(result | {"stopped": "SIGTERM"}))
    assert report.main([str(path)]) == 0
    assert "early: stopped after 60 steps: SIGTERM" in capsys.readouterr().out


def test_the_folder_of_an_earlier_report_is_not_a_run(tmp_path):
    """Fault: `report runs/*` works once."""
    paths = [write(tmp_path / name) for name in ("a", "b")]
    for _ in "12":
        assert report.main([*map(str, paths)]) == 0
        paths = sorted(tmp_path.iterdir())
    assert [path.name for path in paths] == ["a", "b", "report"]


def test_default_output_is_in_the_workdir_or_the_common_folder(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    assert report.default_output([a]).resolve() == tmp_path / "a" / "report"
    assert report.default_output([a, b]).resolve() == tmp_path / "report"
    with pytest.raises(report.UserError, match="--output"):
        report.default_output([pathlib.Path("/x/a"), pathlib.Path("/y/b")])


@pytest.mark.parametrize("kind", ["absent", "empty", "output"])
def test_bad_input_is_one_line_and_writes_nothing(tmp_path, capsys, kind):
    arguments = [str(tmp_path / "run")]
    if kind == "empty":
        (tmp_path / "run").mkdir()
    if kind == "output":
        write(tmp_path / "run")
        (tmp_path / "file").write_text("")
        arguments.append(f"--output={tmp_path / 'file'}")
    before = sorted(tmp_path.rglob("*"))
    assert report.main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
