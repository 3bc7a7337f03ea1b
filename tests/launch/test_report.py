import base64
import html.parser
import io
import json
import pathlib
import re

import matplotlib.image
import numpy as np
import pytest

from shampax.framework.base import workdir
from shampax.framework.reporting import curves, figures
from shampax.framework.reporting.runs import read_run
from shampax.launch import report

HELDOUT, TRAIN = "heldout/loss", "train/loss"


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
            TRAIN: 6 - slope * step + 0.1 * seed,
        }
        if optimizer == "Shampoo":
            line |= {"optimizer/residual_max": 10.0 ** -(step / 10), "optimizer/failures": 0}
        if step % 20 == 0:
            line |= {HELDOUT: 6.5 - slope * step + 0.2 * seed, "heldout/bits_per_character": 2.0}
        lines.append(json.dumps(line) + "\n")
    (path / workdir.METRICS).write_text("".join(lines))
    if finished:
        result = {
            "steps": steps,
            "seconds": steps * 0.5,
            "tokens": steps * 100,
            "heldout_loss": 6.5 - slope * steps + 0.2 * seed,
            "best_heldout_loss": 6.5 - slope * steps + 0.2 * seed,
            "bits_per_character": 2.0,
            "optimizer": optimizer,
            "skipped_steps": 0,
            "clipped_steps": 41,
            "loss_spikes": 2,
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


def lines_of(axes):
    return {line.get_gid(): line.get_xydata() for line in axes.lines if "|" in (line.get_gid() or "")}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Report three seeds of a fast config and one run of a slow one."""
    root = tmp_path_factory.mktemp("runs")
    paths = [write(root / f"fast-seed{seed}", seed=seed) for seed in range(3)]
    paths.append(write(root / "slow", slope=0.02, rate=0.002, optimizer="AdamW"))
    assert report.main([*map(str, paths), f"--output={root / 'out'}"]) == 0
    return root, paths


def test_loss_figure_draws_the_curves_of_the_workdir(tmp_path):
    run = read_run(write(tmp_path / "run"))
    figure = figures.loss_figure(curves.groups([run]))
    for axes, axis in zip(figure.axes, ("step", "seconds", "tokens"), strict=True):
        drawn = lines_of(axes)
        assert set(drawn) == {f"{HELDOUT}|run", f"{TRAIN}|run"}
        for key in (HELDOUT, TRAIN):
            measured = [(point[axis], point[key]) for point in run.points if key in point]
            np.testing.assert_allclose(drawn[f"{key}|run"], measured)


def test_time_axis_of_a_long_run_is_labelled_in_minutes(tmp_path):
    run = read_run(write(tmp_path / "run", steps=1300))
    axes = figures.loss_figure(curves.groups([run])).axes[1]
    assert "minutes" in axes.get_xlabel()
    np.testing.assert_allclose(lines_of(axes)[f"{TRAIN}|run"][-1, 0], 650 / 60)


def test_seeds_are_drawn_as_their_mean_with_their_range(two):
    _, paths = two
    groups = curves.groups([read_run(path) for path in paths])
    axes = figures.loss_figure(groups).axes[0]
    np.testing.assert_allclose(lines_of(axes)[f"{HELDOUT}|fast (3 runs)"], [(20, 5.9), (40, 5.1), (60, 4.3)])
    (band,) = axes.collections
    corners = band.get_paths()[0].vertices
    assert {round(y, 6) for x, y in corners if x == 60} == {4.1, 4.5}


def test_small_multiples_have_one_panel_per_diagnostic(two):
    _, paths = two
    groups = curves.groups([read_run(path) for path in paths])
    keys = ["optimizer/failures", "optimizer/residual_max"]
    failures, residual = figures.small_multiples(groups, keys, "optimizer/").axes
    assert (failures.get_title(loc="left"), residual.get_title(loc="left")) == ("failures", "residual max")
    assert residual.get_yscale() == "log"
    assert failures.get_yscale() == "linear"
    drawn = lines_of(residual)["optimizer/residual_max|fast (3 runs)"]
    np.testing.assert_allclose(drawn, [(step, 10.0 ** -(step / 10)) for step in range(10, 61, 10)])


def test_page_is_complete_html_with_embedded_images_and_no_external_files(two):
    root, _ = two
    text = (root / "out" / "index.html").read_text()
    page = Page(text)
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    names = ["loss.png", "optimizer.png", "training.png"]
    assert len(images) == len(names)
    for image, name in zip(images, names, strict=True):
        png = base64.b64decode(image["src"].removeprefix("data:image/png;base64,"), validate=True)
        assert png == (root / "out" / name).read_bytes()
        assert matplotlib.image.imread(io.BytesIO(png)).shape[1] > 600
        assert image["alt"]
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.tags}
    assert not re.search(r"https?:|//[a-z]|url\(|@import", re.sub(r"base64,[^\"]*", "", text))


def test_page_shows_results_race_and_differing_knobs(two):
    root, _ = two
    rows = Page((root / "out" / "index.html").read_text()).rows
    results = {row[0]: dict(zip(rows[0], row, strict=True)) for row in rows[1:5]}
    assert list(results) == ["fast-seed0", "fast-seed1", "fast-seed2", "slow"]
    assert results["fast-seed2"] == {
        "run": "fast-seed2",
        "optimizer": "Shampoo",
        "learning rate": "0.001",
        "seed": "2",
        "held-out loss": "4.5000",
        "best held-out loss": "4.5000",
        "bits per character": "2.0000",
        "steps": "60",
        "tokens": "6,000",
        "training time, s": "30",
        "skipped steps": "0",
        "clipped steps": "41",
        "loss spikes": "2",
        "refreshes": "12",
        "devices": "4",
        "parameters": "1,234,567",
        "state": "complete",
    }
    # The slow run ends at 5.3; the mean of the fast ones, 6.7 - 0.04 step, reaches this at step 35 of 60.
    assert ["fast (3 runs)", "35 (58%)", "18 (58%)", "3,500 (58%)"] in rows
    assert ["slow", "60 (100%)", "30 (100%)", "6,000 (100%)"] in rows
    assert ["schedule.learning_rate", "0.001", "0.002"] in rows


def test_names_are_escaped(tmp_path):
    path = write(tmp_path / "<b>&run")
    assert report.main([str(path)]) == 0
    assert "<b>" not in (path / "report" / "index.html").read_text()


def test_unfinished_run_is_drawn_and_noted(tmp_path, capsys):
    path = write(tmp_path / "cut", finished=False)
    with (path / workdir.METRICS).open("a") as file:
        file.write('{"step": 70, "train/lo')
    assert report.main([str(path)]) == 0
    page = Page((path / "report" / "index.html").read_text())
    assert "line 7" in capsys.readouterr().out
    assert "line 7" in page.text
    assert dict(zip(page.rows[0], page.rows[1], strict=True))["state"] == "not ended"


def test_message_names_every_file_written(two, tmp_path, capsys):
    _, paths = two
    output = tmp_path / "deep" / "out"
    assert report.main([str(paths[0]), "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert all(str(path) in printed for path in output.iterdir())


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
