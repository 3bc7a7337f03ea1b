import json

import pytest

from shampax.benchmarks import host_schedule

TINY = ["--block_size=16", "--matrices=2", "--interval=6", "--delay=1", "--steps=6", "--turns=1", "--wait=0.02"]


@pytest.mark.slow
def test_every_way_is_measured_and_the_timeline_is_drawn(tmp_path, capsys):
    """Faults: a way is not run; times belong to another loop; table or figure do not show the result."""
    page, figure = tmp_path / "page.md", tmp_path / "images" / "timeline.png"
    page.write_text("before\n<!-- host_schedule begin -->\nold\n<!-- host_schedule end -->\nafter\n")
    assert host_schedule.main([*TINY, f"--markdown={page}", f"--figure={figure}"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["blocks"] == 8
    ways = {way["way"]: way for way in result["ways"]}
    assert list(ways) == [
        "no roots",
        *(f"host, interval {k}, delay 1" for k in (6, 3, 2)),
        *(f"in the step, interval 6, {solver}" for solver in ("newton", "eigh")),
    ]
    for name, way in ways.items():
        assert way["step_ms"] >= 20
        assert ("stall_share" in way) == ("busy" in way) == name.startswith("host")
        assert 0 < way.get("busy", 0.5) <= 1
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert text.count("| host, ") == 3 and "8 blocks of 16 x 16" in text
    assert figure.stat().st_size > 10_000


def test_the_timeline_shows_each_thread_in_its_row():
    """Faults: solves are drawn in the row of the main thread; steps are missing."""
    loop = host_schedule.Loop(host_schedule.Way(host_schedule.HOST, 4, 1), {"w": (32, 32)}, 16, 0.01)
    try:
        loop.run(12)
    finally:
        loop.service.close()
    figure = host_schedule.timeline(loop, steps=4)
    (panel,) = figure.axes
    rows = [label.get_text() for label in panel.get_yticklabels()]
    assert rows[:3] == ["device (emulated)", "main thread", "reader: copies"] and rows[3].startswith("solver ")
    steps = [bar for bar in panel.patches if round(bar.get_y() + bar.get_height() / 2) == 0]
    assert len(steps) == 4 and all(9 < bar.get_width() < 100 for bar in steps)
    assert len(panel.patches) > 12


def test_a_missing_page_is_refused_before_measuring(tmp_path, capsys):
    """Fault: a traceback after minutes of measuring."""
    assert host_schedule.main([*TINY, f"--markdown={tmp_path / 'none.md'}"]) == 2
    assert "does not exist" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        host_schedule.main(["--turns=many"])
