import json
import pathlib
import re

import numpy as np
import pytest
from plotly.offline import get_plotlyjs

from shampax.framework.base import paths, workdir
from shampax.framework.reporting import runs
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


def shown(folder):
    """Return what a page shows."""
    text = (folder / "index.html").read_text()
    return json.loads(text.split('id="data">')[1].split("</script>")[0])


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Report three seeds of a fast config and one run of a slow one."""
    root = tmp_path_factory.mktemp("runs")
    paths = [write(root / f"fast-seed{seed}", seed=seed) for seed in range(3)]
    paths.append(write(root / "slow", slope=0.02, rate=0.002, optimizer="AdamW"))
    assert report.main([*map(str, paths), f"--output={root / 'out'}"]) == 0
    return root, paths


def test_the_page_needs_no_other_file(two):
    """Fault: a script, a font or an image is loaded from a network."""
    root, _ = two
    assert [path.name for path in (root / "out").iterdir()] == ["index.html"]
    text = (root / "out" / "index.html").read_text()
    ours = text.replace(get_plotlyjs(), "")
    assert len(ours) < len(text) and not re.search(r"https?:|<link|<img|<iframe|\bsrc=|@import|url\(", ours)


def test_page_shows_states_race_and_differing_knobs(two):
    root, _ = two
    page = shown(root / "out")
    assert [(run["name"], run["state"]) for run in page["runs"]][1] == ("fast-seed1", "complete")
    # The slow run ends at 5.3; the mean of the fast ones, 6.7 - 0.04 step, reaches this at step 35 of 60.
    assert ["fast-seed0 and 2 more", "35 (58%)", "18 (58%)", "3,500 (58%)"] in page["race"]["rows"]
    assert ["slow", "60 (100%)", "30 (100%)", "6,000 (100%)"] in page["race"]["rows"]
    assert ["schedule.learning_rate", "0.001", "0.002"] in page["differences"]
    assert ["clipped steps", "41"] in page["about"][0]["result"]


def test_a_run_without_a_result_is_drawn_with_its_last_measurement(tmp_path, capsys):
    path = write(tmp_path / "cut", finished=False)
    with (path / workdir.METRICS).open("a") as file:
        file.write('{"step": 70, "train/lo')
    assert report.main([str(path)]) == 0
    page, out = shown(path / "report"), capsys.readouterr().out
    assert "cut: running: 60 steps, measured at 20" in out
    assert page["runs"][0]["state"] == "running" and page["runs"][0]["facts"][0]["value"] == "4.1000"
    assert "line 7" in out and any("line 7" in line for line in page["runs"][0]["wrong"])
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


def test_watch_writes_again_until_the_run_has_ended(tmp_path, monkeypatch):
    """Faults: the page stays at its first state; the last page is read again for ever; the command does not end."""
    path, pages = write(tmp_path / "run", finished=False), []

    def sleep(seconds):
        pages.append(shown(path / "report"))
        if len(pages) == 2:
            write(tmp_path / "other")
            (tmp_path / "other" / workdir.RESULT).rename(path / workdir.RESULT)

    monkeypatch.setattr(report.time, "sleep", sleep)
    assert report.main([str(path), "--watch"]) == 0
    pages.append(shown(path / "report"))
    assert [(page["runs"][0]["state"], page["reload"] > 0) for page in pages] == [
        ("running", True),
        ("running", True),
        ("complete", False),
    ]


def test_watching_reads_only_what_is_new(tmp_path):
    """Faults: a page over a long run reads gigabytes every 15 s; lines that a resumed run has dropped stay; a line that
    is being written is lost or counted as damaged for ever."""
    path = write(tmp_path / "run", finished=False)
    metrics, reader = path / workdir.METRICS, runs.Reader(path)
    old = metrics.read_text().splitlines(keepends=True)
    assert reader.read().steps == 60 and reader.bytes_read == metrics.stat().st_size
    later = [old[-1].replace('"step": 60', f'"step": {step}') for step in (70, 80)]
    for text, steps, notes in ((later[0] + later[1][:30], 70, 1), (later[1][30:], 80, 0), ("", 80, 0)):
        with metrics.open("a") as file:
            file.write(text)
        run = reader.read()
        assert (run.steps, len(run.notes), reader.bytes_read) == (steps, notes, len(text))
    np.testing.assert_equal(run.points, runs.read_run(path).points)
    paths.write_text(metrics, "".join([*old[:3], *(3 * later)]))  # as a run that resumes
    np.testing.assert_equal(reader.read().points, runs.read_run(path).points)


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
