import json
import math
import sys

import jax
import numpy as np
import optax
import pytest

from shampax.benchmarks import contestants, figure, learning, optimizers, standings
from shampax.benchmarks.figure import loss_figure
from shampax.benchmarks.grid import Trial
from shampax.framework.base.errors import UserError
from shampax.framework.config.check import load

RATES = {"adamw": (0.1, 0.2, 0.4), "ours": (0.1, 0.2, 0.4)}
GRID = [Trial(name, rate, seed) for seed in (0, 1) for name in RATES for rate in RATES[name]]
FLAGS = ["--optimizers=adamw,ours", "--seeds=0,1", "--rates", "adamw=0.1,0.2,0.4", "ours=0.1,0.2,0.4"]


def curve(trial):
    """Return held-out losses at steps 0, 10, ... 40; at other rates than the best they are higher by 1."""
    curves = {
        ("adamw", 0): [9.0, 7.0, 6.0, 5.0, 3.9],
        ("adamw", 1): [9.0, 7.0, 6.0, 5.0, 4.1],
        ("ours", 0): [9.0, 6.0, 3.0, 2.5, 2.0],
        ("ours", 1): [9.0, 7.0, 5.0, 3.0, 2.2],
    }
    best = {"adamw": 0.2, "ours": 0.4}[trial.variant]
    return [loss + (trial.learning_rate != best) for loss in curves[trial.variant, trial.seed]]


def fake_run(trial):
    """Return a result like that of `learning.train`."""
    heldout = [{"step": 10 * i, "loss": loss} for i, loss in enumerate(curve(trial))]
    return {"steps": 40, "losses": [1.0] * 40, "heldout": heldout, "stopped": None, "seconds": 1.0}


def fake_settings(trial):
    return {"optimizer": {"name": trial.variant, "beta": 0.9}, "learning_rate": trial.learning_rate, "seed": trial.seed}


def timed(mean_ms, **changes):
    """Return an entry of time.json."""
    return {
        "options": {"name": "ours" if mean_ms == 40 else "adamw", "beta": 0.9},
        "trace_seconds": 1.0,
        "compile_seconds": 2.5,
        "stablehlo_characters": 123_456,
        "hlo_instructions": 7_890,
        "state_bytes": 5_000_000,
        "steps": 200,
        "median_ms": mean_ms / 2,
        "mean_ms": mean_ms,
        "longest_ms": mean_ms * 2,
        "slowest_phase_ms": mean_ms,
        "longest_to_median": 4.0,
        "slowest_phase_to_median": 2.0,
    } | changes


@pytest.fixture
def folder(tmp_path):
    """Write a workdir with all runs of the grid and with times: a step of ours takes twice as long as AdamW's."""
    learning.run_grid(GRID, tmp_path / "learn", fake_settings, fake_run)
    times = {"adamw": timed(20.0), "ours": timed(40.0), "ours_periodic": timed(60.0), "kl_shampoo": timed(50.0)}
    content = {"device": "one abacus", "interval": 10, "optimizers": times}
    (tmp_path / "time.json").write_text(json.dumps(content))
    return tmp_path


def table(folder, capsys, *flags):
    """Run the sub-command; return its exit code, JSON and Markdown."""
    code = optimizers.main(["table", f"--workdir={folder}", *FLAGS, *flags])
    shown = capsys.readouterr()
    return code, json.loads(shown.out) if shown.out else None, shown.err


def test_table_has_crossings_best_rates_and_the_leader(folder, capsys):
    """Faults: a share is of the wrong run; shares of steps and of seconds are swapped; seeds are swapped."""
    code, comparison, text = table(folder, capsys)
    assert code == 0
    assert {name: entry["learning_rate"] for name, entry in comparison["best"].items()} == {"adamw": 0.2, "ours": 0.4}
    assert comparison["best"]["adamw"]["by_seed"] == {"0": 3.9, "1": 4.1}
    first, second = [entry for entry in comparison["crossings"] if entry["variant"] == "ours"]
    # Seed 0 falls from 6 at step 10 to 3 at step 20, seed 1 from 5 at 20 to 3 at 30; AdamW ends at 4.0 on average.
    assert (first["seed"], first["target"]) == (0, 4.0)
    assert first["steps"] == pytest.approx(10 + 10 * 2 / 3)
    assert second["steps"] == pytest.approx(25)
    assert second["fraction_of_steps"] == pytest.approx(25 / 40)
    assert second["seconds"] == pytest.approx(25 * 0.040)
    assert second["fraction_of_seconds"] == pytest.approx(25 * 0.040 / (40 * 0.020))
    assert "| ours | AdamW, 4.0000 | 1 | 25 | 62.5% | 1.0 | 125.0% |" in text
    assert "| AdamW | ours, 2.1000 | 0 | not reached |" in text
    # AdamW's 40 steps take as long as 20 of ours, whose seeds are at 3 and 5 then.
    assert comparison["at_equal_steps"]["losses"] == pytest.approx({"ours": 2.1, "adamw": 4.0})
    assert comparison["at_equal_seconds"]["losses"] == pytest.approx({"adamw": 4.0, "ours": 4.0})
    assert "At equal steps, 40 steps, ours is ahead with 2.1000; then AdamW 4.0000." in text
    assert "AdamW has finished its schedule then; the others have not: ours at step 20." in text


def test_table_warns_of_a_best_rate_at_the_edge(folder, capsys):
    """Fault: nothing warns that rates outside the grid may be better."""
    _, comparison, text = table(folder, capsys)
    assert {name: entry["at_edge"] for name, entry in comparison["best"].items()} == {"adamw": False, "ours": True}
    assert "The best learning rate of ours is at the edge of its grid" in text
    assert "The best learning rate of AdamW is" not in text


def test_table_names_missing_runs_and_leaves_out_rates_with_missing_seeds(folder, capsys):
    """Fault: the mean of one lucky seed is compared with means of all seeds."""
    (folder / "learn" / "adamw-lr0.2-seed1.json").unlink()
    _, comparison, text = table(folder, capsys)
    assert comparison["missing"] == ["adamw-lr0.2-seed1"]
    assert "Missing runs: adamw-lr0.2-seed1." in text
    assert comparison["best"]["adamw"]["learning_rate"] != 0.2


def test_only_finalists_get_the_other_seeds(tmp_path, monkeypatch, capsys):
    """Faults: other rates than the finalists get more seeds; a rate with one seed is the best; edges are lost."""
    made = []
    whole = learning.run_grid
    monkeypatch.setattr(learning, "settings_of", lambda _, trial: fake_settings(trial))
    monkeypatch.setattr(learning, "Workload", lambda *_: None)
    monkeypatch.setattr(
        learning,
        "run_grid",
        lambda grid, folder, settings, _: whole(grid, folder, settings, lambda t: made.append(t) or fake_run(t)),
    )
    flags = [f"--workdir={tmp_path}", *FLAGS, "--finalists=1"]
    assert optimizers.main(["learn", *flags]) == 0
    assert made == [*GRID[:6], Trial("adamw", 0.2, 1), Trial("ours", 0.4, 1)]
    capsys.readouterr()
    _, comparison, text = table(tmp_path, capsys, "--finalists=1")
    assert comparison["missing"] == []
    assert {name: (entry["learning_rate"], entry["at_edge"]) for name, entry in comparison["best"].items()} == {
        "adamw": (0.2, False),
        "ours": (0.4, True),
    }
    assert "table --finalists=1`" in text
    (tmp_path / "learn" / "adamw-lr0.2-seed1.json").unlink()
    _, comparison, _ = table(tmp_path, capsys, "--finalists=1")
    assert comparison["missing"] == ["adamw-lr0.2-seed1"]
    assert set(comparison["best"]) == {"ours"}


@pytest.mark.parametrize("loss", [None, 1.0])
def test_table_leaves_out_rates_with_a_diverged_seed(folder, capsys, loss):
    """Faults: a run without a final loss is an error; a run that ended early counts as the best."""
    path = folder / "learn" / "adamw-lr0.2-seed1.json"
    content = json.loads(path.read_text())
    content["heldout"][-1]["loss"] = loss
    path.write_text(json.dumps(content | {"stopped": "the loss was not finite"}))
    _, comparison, text = table(folder, capsys)
    assert comparison["best"]["adamw"]["learning_rate"] != 0.2
    assert "| AdamW | 0.2 | 2 | diverged |" in text


def test_table_without_times_compares_only_steps(folder, capsys):
    """Faults: seconds of an optimizer without times are invented; the table fails without times."""
    (folder / "time.json").unlink()
    code, comparison, text = table(folder, capsys)
    assert code == 0
    assert comparison["at_equal_seconds"] is None
    assert comparison["crossings"][-1]["seconds"] is None
    assert "| ours | AdamW, 4.0000 | 1 | 25 | 62.5% | not measured |  |" in text
    assert "There are not enough runs to compare at equal seconds." in text


def test_table_names_optimizers_timed_with_other_options(folder, capsys):
    """Faults: an optimizer is changed and trained again, and the old step times are used; a knob that did not exist
    when steps were timed counts as a difference."""
    times = json.loads((folder / "time.json").read_text())
    times["optimizers"]["ours"]["options"]["beta"] = 0.95
    (folder / "time.json").write_text(json.dumps(times))
    _, comparison, text = table(folder, capsys)
    assert comparison["timed_otherwise"] == ["ours"]
    for later, unlike in ((0, False), (16, True)):
        options = {"name": "ours", "beta": 0.9, "knob_that_came_later": later}
        times["optimizers"]["ours"]["options"] = options
        (folder / "time.json").write_text(json.dumps(times))
        assert table(folder, capsys)[1]["timed_otherwise"] == ["ours"] * unlike
    assert "ours was timed with other options than those of its runs" in text


def test_markdown_has_times_and_costs_and_replaces_only_its_section(folder, capsys):
    """Faults: a ratio is inverted; a unit is wrong; other parts of the page, such as older costs, are lost."""
    entry = {name: value for name, value in timed(1.0).items() if name != "mean_ms"}
    costs = {
        "device": "one abacus",
        "block_size": 128,
        "interval": 20,
        "intervals": 2,
        "parameters": 24_600_000,
        "optimizers": {"google": entry | {"mean_ms": [300.0, 500.0]}, "ours": entry | {"mean_ms": [100.0, 100.0]}},
        "eigh": {"stopped": "did not finish within 900 s"},
    }
    (folder / "cost-128.json").write_text(json.dumps(costs))
    results = folder / "results.md"
    sections = [f"{section.begin}\nold\n{section.end}\n" for section in (standings.SECTION, standings.COSTS)]
    results.write_text(f"before\n{sections[0]}between\n{sections[1]}after\n")
    assert table(folder, capsys, f"--markdown={results}")[0] == 0
    text = results.read_text()
    assert text.startswith(f"before\n{standings.SECTION.begin}\nMade by")
    assert f"{standings.SECTION.end}\nbetween\n{standings.COSTS.begin}\nUpdates alone" in text
    assert text.endswith(f"{standings.COSTS.end}\nafter\n")
    assert "| ours, periodic | 30.0 | 60.0 | 120.0 | 4.00 | 2.00 | 3.5 | 7,890 | 123,456 | 5.0 |" in text
    assert "| our KL-Shampoo | 25.0 | 50.0 | 100.0 |" in text
    assert "| Google's Shampoo | 300.0 500.0 | 4.00 | 3.5 | 7,890 | 123,456 | 5.0 |" in text
    assert "24.6 M parameters" in text
    assert "Our Shampoo with the solver eigh: did not finish within 900 s." in text
    (folder / "cost-128.json").unlink()
    assert table(folder, capsys, f"--markdown={results}")[0] == 0
    assert results.read_text() == text


def test_the_figure_has_every_optimizer_at_its_best_rate(folder, capsys, monkeypatch):
    """Faults: curves of another rate are drawn; seconds are invented; no file is written."""
    drawn = []
    monkeypatch.setattr(figure, "loss_figure", lambda *given: drawn.append(given) or loss_figure(*given))
    for axes in (["step", "seconds"], ["step"]):
        picture = folder / "images" / f"{len(axes)}.png"
        assert table(folder, capsys, f"--figure={picture}")[0] == 0
        assert picture.stat().st_size > 10_000
        groups, against = drawn.pop()
        assert against == axes
        ends = {group.label: [run.curve("heldout/loss", "step")[1][-1] for run in group.runs] for group in groups}
        assert ends == {"ours": [2.0, 2.2], "AdamW": [3.9, 4.1]}
        (folder / "time.json").unlink(missing_ok=True)


def test_document_without_markers_is_refused_and_kept(folder, capsys):
    """Fault: content is written outside its section."""
    results = folder / "results.md"
    results.write_text("# Results\n")
    code, _, text = table(folder, capsys, f"--markdown={results}")
    assert code == 2
    assert "Add them" in text
    assert results.read_text() == "# Results\n"


def test_interrupted_grid_trains_only_missing_runs(tmp_path):
    """Faults: finished runs are trained again; an interrupted one counts as finished."""
    made = []

    def run(trial):
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(trial)
        return fake_run(trial)

    with pytest.raises(KeyboardInterrupt):
        learning.run_grid(GRID, tmp_path, fake_settings, run)
    assert len(list(tmp_path.iterdir())) == 3
    again = []
    results = learning.run_grid(GRID, tmp_path, fake_settings, lambda trial: again.append(trial) or fake_run(trial))
    assert made + again == GRID
    assert [result["learning_rate"] for result in results] == [trial.learning_rate for trial in GRID]


def test_runs_of_other_settings_are_refused_before_training(tmp_path):
    """Fault: means are over runs from before and after a change of an optimizer."""
    learning.run_grid(GRID[-1:], tmp_path, fake_settings, fake_run)

    def changed(trial):
        return fake_settings(trial) | {"optimizer": {"name": trial.variant, "beta": 0.95}}

    with pytest.raises(UserError, match=r"optimizer\.beta: 0\.9 -> 0\.95"):
        learning.run_grid(GRID, tmp_path, changed, fake_run)
    assert len(list(tmp_path.iterdir())) == 1


def test_every_optimizer_has_the_same_number_of_rates(capsys):
    """Fault: one optimizer is tuned on a finer grid than the others."""
    assert optimizers.main(["table", "--optimizers=adamw,ours", "--rates", "ours=1e-3,2e-3"]) == 2
    assert f"adamw {len(contestants.RATES['adamw'])}, ours 2" in capsys.readouterr().err
    assert len({len(rates) for rates in contestants.RATES.values()}) == 1


def test_a_missing_google_package_is_one_line_with_the_command_to_install_it(tmp_path, monkeypatch, capsys):
    """Fault: a traceback after hours of the other optimizers' training."""
    monkeypatch.setitem(sys.modules, "precondition.distributed_shampoo", None)
    monkeypatch.setattr(learning, "run_grid", lambda *_: pytest.fail("trained the others first"))
    assert optimizers.main(["learn", f"--workdir={tmp_path / 'runs'}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "make install EXTRA=benchmarks" in line
    assert not (tmp_path / "runs").exists()


def test_parameters_are_split_by_layer_with_folded_heads_and_joined_again():
    """Faults: Google's optimizer gets a stack of layers as one tensor; an update is applied to another layer."""
    params = {
        "query": np.arange(2 * 3 * 4 * 5.0).reshape(2, 3, 4, 5),
        "out": np.ones((4, 5, 3)),
        "norm": np.ones((2, 3)),
    }
    names = {"query": ("layers", "embed", "heads", "kv"), "out": ("heads", "kv", "embed"), "norm": ("layers", "norm")}
    seen = []

    def update(updates, state, params):
        seen.append(jax.tree.map(np.shape, params))
        return jax.tree.map(lambda u, p: u + p, updates, params), state

    tx = contestants.as_matrices(optax.GradientTransformation(lambda params: (), update), names)
    updates, _ = tx.update(params, tx.init(params), params)
    assert seen[0] == {"query": [(3, 20)] * 2, "out": [(20, 3)], "norm": [(3,)] * 2}
    assert jax.tree.all(jax.tree.map(lambda u, p: np.array_equal(u, 2 * p), updates, params))


@pytest.fixture(scope="module")
def workload(tmp_path_factory):
    """Return the sample, shrunk to one narrow layer and two steps."""
    changes = [
        *(
            "duration=2 steps",
            "batch_size=2",
            "evaluation.batches=1",
            "data.sequence_length=8",
            "data.max_records=10",
        ),
        *("task.layers=1", "task.embed_dim=16", "task.heads=2", "task.kv_heads=1", "task.head_dim=8"),
        *("task.mlp_dim=24", "task.vocab_size=264", "optimizer.block_size=16", "optimizer.interval=2"),
    ]
    return learning.Workload(load("shampax/configs/lm.py:sample", changes), tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def programs(workload):
    """Return one program for each optimizer; each compiles at its first run."""
    return {name: workload.program(workload.options[name]) for name in ("adamw", "muon", "ours")}


@pytest.mark.parametrize("name", ["adamw", *(pytest.param(name, marks=pytest.mark.slow) for name in ("muon", "ours"))])
def test_all_rates_share_one_program(workload, programs, name):
    """Fault: the rate is a constant of the program, and all rates of the grid give the same run."""
    program = programs[name]
    still, moving = (learning.train(workload, program, Trial(name, rate, 0)) for rate in (0.0, 1e-2))
    assert program.step._cache_size() == 1
    assert len(moving["losses"]) == moving["steps"] == 2
    assert [metrics["step"] for metrics in moving["heldout"]] == [0, 1, 2]
    assert moving["heldout"][0]["loss"] == still["heldout"][0]["loss"] == still["heldout"][2]["loss"]
    assert moving["heldout"][2]["loss"] < still["heldout"][2]["loss"]
    assert moving["stopped"] is None


def test_a_diverging_run_stops(workload, programs):
    """Fault: NaN is written to the file, which makes it invalid JSON, or counts as a loss."""
    result = learning.train(workload, programs["adamw"], Trial("adamw", math.inf, 0))
    assert result["stopped"] == "the loss was not finite"
    assert result["heldout"][-1]["loss"] is None
    json.dumps(result, allow_nan=False)
