import json
import pathlib

import numpy as np
import pytest

from shampax.framework.base.errors import UserError
from shampax.framework.reporting import page
from shampax.framework.reporting.curves import Group
from shampax.framework.reporting.runs import Layers, Run, measured

STEPS = np.arange(10, 61, 10)


def run_of(name, config=None, *, layers=None, result=True, **columns):
    """Return a run of 60 steps with these measurements; `_` in a name stands for `/`."""
    points = []
    for i, step in enumerate(STEPS.tolist()):
        values = {key.replace("__", "/"): float(values[i]) for key, values in columns.items()}
        points.append({"step": step, "seconds": 0.5 * step, "tokens": 100 * step} | values)
    ended = {"steps": 60, "seconds": 30.0, "stopped": None}
    return Run(pathlib.Path(f"/runs/{name}"), measured(points), config or {"id": name}, ended, layers=layers)


def loss(name, slope=0.04, config=None, **columns):
    return run_of(name, config, heldout__loss=6 - slope * STEPS, train__loss=5 - slope * STEPS, **columns)


def panels(runs):
    found = page.contents(runs)
    return {panel["id"]: panel for panel in found["panels"]}, found


def test_a_run_is_drawn_as_measured():
    """Fault: training and held-out losses have panels of their own, or other points than measured."""
    shown, found = panels([loss("run")])
    lines = {line["of"]: line for line in shown["loss"]["lines"]}
    np.testing.assert_allclose(lines["heldout"]["y"], 6 - 0.04 * STEPS)
    np.testing.assert_allclose(lines["train"]["y"], 5 - 0.04 * STEPS)
    grid = found["grids"][lines["train"]["grid"]]
    assert grid == {"step": STEPS.tolist(), "seconds": (STEPS // 2).tolist(), "tokens": (100 * STEPS).tolist()}


def test_seeds_are_one_line_with_their_range():
    runs = [loss(f"seed{seed}", config={"seed": seed, "rate": 1}, extra=STEPS + 3 * seed) for seed in range(3)]
    shown, found = panels(runs)
    (line,) = shown["extra"]["lines"]
    assert (line["y"], line["low"], line["high"]) == ((STEPS + 3).tolist(), STEPS.tolist(), (STEPS + 6).tolist())
    assert found["groups"] == [{"label": "seed0 and 2 more", "runs": 3}] and len(found["runs"]) == 3


def test_what_never_changes_is_folded_into_a_sentence():
    """Faults: healthy runs are a wall of zeros; a count that moves once is hidden."""
    shown, found = panels(
        [loss("run", train__skipped=0 * STEPS, train__real_tokens=1 + 0 * STEPS, train__clipped=STEPS > 50)]
    )
    assert found["folded"] == ["Skipped steps (0)", "Real tokens (1)"]
    assert "clipped" in shown and not {"skipped", "real_tokens"} & set(shown)


def test_the_baseline_is_the_run_without_diagnostics_or_the_one_named():
    runs = [loss("a", optimizer__refreshes=STEPS), loss("b", slope=0.02), loss("c", optimizer__refreshes=STEPS)]
    notes = [card["facts"][0]["note"] for card in page.contents(runs)["runs"]]
    assert notes[0].startswith("1.2000 below b, whose end it reached after 50%") and notes[1] == ""
    notes = [card["facts"][0]["note"] for card in page.contents(runs, pathlib.Path("/runs/c"))["runs"]]
    assert notes[2] == "" and "above c" in notes[1]
    with pytest.raises(UserError, match="--baseline"):
        page.contents(runs, pathlib.Path("/runs/d"))


def test_runs_on_other_data_compare_in_bits_per_byte_or_not_at_all():
    """Fault: "falls to 4.8, where the other ends, after 33 %" between different tokenizers."""
    configs = [{"data": {"source": source}} for source in "xy"]
    runs = [loss(name, config=config) for name, config in zip("ab", configs, strict=True)]
    found = page.contents(runs)
    assert found["race"]["rows"] == [] and "not compared: they differ in data.source" in found["notes"][0]
    assert all(card["facts"][0]["note"] == "" for card in found["runs"])
    runs = [
        loss(n, config=c, heldout__bits_per_byte=9 - s * STEPS)
        for n, c, s in zip("ab", configs, (0.02, 0.04), strict=True)
    ]
    found = page.contents(runs)
    assert (
        found["race"]["told"].startswith("Until the held-out bits per byte fall to 7.8000")
        and "bits per byte" in found["notes"][0]
    )
    assert [card["facts"][0]["label"] for card in found["runs"]] == ["Bits per byte"] * 2


def test_the_race_takes_the_highest_end_as_the_target():
    slow, fast = (
        Group(name, (run_of(name, heldout__loss=62 - slope * STEPS),)) for name, slope in (("slow", 1), ("fast", 2))
    )
    found = page.race([fast, slow])
    assert found["told"] == "Until the held-out loss falls to 2.0000, where slow ends."
    assert found["rows"][1:] == [
        ["fast", "30 (50%)", "15 (50%)", "3,000 (50%)"],
        ["slow", "60 (100%)", "30 (100%)", "6,000 (100%)"],
    ]
    assert page.race([fast])["rows"] == []


def test_knobs_of_another_component_are_not_differences():
    """Fault: against AdamW the table lists thirty options that AdamW does not have."""
    a = {"optimizer": {"name": "S", "ridge": 1, "beta1": 0.9}, "rate": 1}
    b = {"optimizer": {"name": "A", "beta1": 0.7}, "rate": 1}
    rows = page.contents([loss("a", config=a), loss("b", config=b)])["differences"]
    assert [row[0] for row in rows] == ["knob", "optimizer.beta1", "optimizer.name"]


def test_the_config_tells_what_is_not_the_default():
    config = {"batch_size": 32, "duration": "5 steps", "log": {"every": "10 steps"}, "task": {"name": "x"}}
    found = page.contents([loss("run", config=config)])
    knobs = [row[0] for row in found["about"][0]["config"]]
    assert knobs == ["batch_size", "duration *", "log.every", "task.name"]
    assert found["runs"][0]["facts"][0]["note"] == "no baseline in this report"


def test_heat_maps_of_layers_and_else_of_buckets():
    """Faults: a layer has the values of another; maps of zeros; labels repeat what all have in common."""
    values = {
        name: np.arange(4.0).reshape(2, 2) for name in ("condition", "effective_rank", "staleness", "graft_ratio")
    }
    layers = Layers(
        ("layers/key/kernel 0", "layers/up/kernel 1"), np.array([10, 60]), values | {"fallbacks": np.zeros((2, 2))}
    )
    (found,) = page.contents([loss("run", layers=layers)])["layers"]
    assert found["names"] == ["key 0", "up 1"] and found["axes"]["tokens"] == [1000, 6000]
    assert {map["id"]: map["rows"] for map in found["maps"]}["condition"] == [[0, 1], [2, 3]]
    assert {map["id"]: map["rows"] for map in found["maps"]}["fallbacks"] == []
    assert all(map["told"] and map["healthy"] for map in found["maps"])
    keys = {f"optimizer__8x{side}__{name}": STEPS + side for side in (8, 4) for name in ("condition", "staleness")}
    (found,) = page.contents([loss("run", **keys)])["layers"]
    assert found["names"] == ["8x4", "8x8"]
    assert {map["id"]: map["rows"] for map in found["maps"]}["staleness"] == [
        (STEPS + 4).tolist(),
        (STEPS + 8).tolist(),
    ]


def test_all_text_is_one_json_that_cannot_end_the_script():
    """Fault: a name is read as HTML."""
    text = page.page([loss("</script><b>&run")])
    assert "</script><b>" not in text
    data = json.loads(text.split('id="data">')[1].split("</script>")[0])
    assert data["runs"][0]["name"] == "</script><b>&run" or data["title"].endswith("<b>&run")
    assert data["reload"] == 0


def test_images_are_not_called_tokens():
    for name, expected in (("examples", "examples"), ("tokens", "tokens")):
        assert page.contents([loss("run", **{f"throughput__{name}_per_second": STEPS})])["counted"] == expected
