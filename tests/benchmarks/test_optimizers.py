import json
import math
import sys

import jax
import numpy as np
import optax
import pytest

from shampax.benchmarks import contestants, figure, learning, optimizers, standings, trials, tuning
from shampax.benchmarks.contestants import CONTESTANTS, FIRST, with_settings
from shampax.benchmarks.trials import Trial, search
from shampax.framework.base.errors import UserError
from shampax.framework.config.check import load
from shampax.optimizers import ShampooOptions
from shampax.optimizers.plan.patterns import first_match

# Held-out losses at steps 0, 10, ... 40 under the best settings, by optimizer and seed.
CURVES = {
    ("adamw", 0): [9.0, 7.0, 6.0, 5.0, 3.9],
    ("adamw", 1): [9.0, 7.0, 6.0, 5.0, 4.1],
    ("muon", 0): [9.0, 7.0, 5.0, 3.0, 2.6],
    ("muon", 1): [9.0, 7.0, 5.0, 3.0, 2.8],
    ("ours", 0): [9.0, 6.0, 3.0, 2.5, 2.0],
    ("ours", 1): [9.0, 7.0, 5.0, 3.0, 2.2],
}
BEST = {"adamw": 2.5e-3, "muon": 0.048, "ours": 0.04}


def write(folder, trial, losses, stopped=None, steps=40):
    """Write the file of a run with held-out losses at steps 0, 10, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    heldout = [{"step": 10 * i, "loss": loss, "accuracy": 1 / loss} for i, loss in enumerate(losses)]
    content = {"variant": trial.variant, "trial": dict(trial.settings), "seed": trial.seed, "settings": {}}
    content |= {"steps": steps, "losses": [1.0] * steps, "heldout": heldout, "stopped": stopped, "seconds": 1.0}
    (folder / f"{trial.name}.json").write_text(json.dumps(content))


def timed(mean_ms):
    """Return an entry of time.json."""
    counts = {"stablehlo_characters": 123_456, "hlo_instructions": 7_890, "state_bytes": 5_000_000, "steps": 200}
    ratios = {"longest_to_median": 4.0, "slowest_phase_to_median": 2.0, "trace_seconds": 1.0, "compile_seconds": 2.5}
    return counts | ratios | {"median_ms": mean_ms / 2, "mean_ms": mean_ms, "longest_ms": mean_ms * 2}


@pytest.fixture
def folder(tmp_path):
    """Write a workdir with the runs of a task, with times, and with runs of ours that took as long as AdamW's."""
    task = tmp_path / "toy.py:sample, 40 steps"
    for (name, seed), losses in CURVES.items():
        best = Trial.of(name, seed, rate=BEST[name], **FIRST)
        write(task / "learn", best, losses)
        if seed == 0:
            for other in (best.but(rate=BEST[name] / 2), best.but(nesterov=False)):
                write(task / "learn", other, [loss + 1 for loss in losses])
    for seed, losses in enumerate(([9.0, 6.0, 3.0], [9.0, 7.0, 5.0])):
        write(task / "equal", Trial.of("ours", seed, rate=BEST["ours"], **FIRST), losses, steps=20)
    times = {name: timed(mean) for name, mean in (("adamw", 20.0), ("muon", 20.0), ("ours", 40.0))}
    (task / "time.json").write_text(json.dumps({"device": "one abacus", "interval": 20, "optimizers": times}))
    return tmp_path


def table(folder, capsys, *flags):
    """Run the sub-command; return its exit code, the comparison of the task and the Markdown."""
    code = optimizers.main(["table", f"--workdir={folder}", *flags])
    shown = capsys.readouterr()
    return code, next(iter(json.loads(shown.out).values())) if shown.out else {}, shown.err


@pytest.mark.parametrize(
    ("best", "rates"),
    [
        (1.0, [1.0, 0.5, 2.0]),
        (2.0, [1.0, 0.5, 2.0, 4.0]),
        (0.25, [1.0, 0.5, 2.0, 0.25, 0.125]),
        (64.0, [1.0, 0.5, 2.0, 4.0, 8.0]),
    ],
)
def test_the_search_is_the_same_for_all_and_follows_the_ladder(best, rates):
    """Faults: a best rate at the end of the ladder is kept; the ladder grows without end or to the wrong side; a change
    that is worse is kept; a diverged run wins; other seeds get other settings."""
    made = []

    def loss_of(trial):
        made.append(trial)
        settings = dict(trial.settings)
        if settings["momentum"] == 0.7:
            return math.nan
        loss = abs(math.log2(settings["rate"] / best)) - (settings["momentum"] == 0.9) + (not settings["nesterov"])
        return loss + 5 * (settings["rate"] > 8)

    chosen = search("ours", 1.0, loss_of, [0, 1, 2])
    first = [dict(trial.settings)["rate"] for trial in made if dict(trial.settings).items() >= FIRST.items()]
    assert sorted(first[: len(rates)]) == sorted(rates)
    nearest = min(rates, key=lambda rate: abs(math.log2(rate / best)))
    assert dict(chosen.settings) == {"rate": nearest, "momentum": 0.9, "nesterov": True}
    assert made[-2:] == [chosen.but(1), chosen.but(2)]
    assert len(made) == len(set(made)) == len(rates) + len(trials.CHANGES) + 2


def test_a_task_has_means_shares_and_the_lead(folder, capsys):
    """Faults: a share is of the wrong run; the lead is over the worst; a gap within the seeds' range counts; losses at
    equal seconds are those at equal steps; a setting with one seed is the best."""
    write(folder / "toy.py:sample, 40 steps" / "learn", Trial.of("ours", 1, rate=9.0, **FIRST), [1.0] * 5)
    code, task, text = table(folder, capsys)
    assert code == 0
    assert list(task["optimizers"]) == ["ours", "muon", "adamw"]
    assert {name: entry["settings"]["rate"] for name, entry in task["optimizers"].items()} == BEST
    assert task["optimizers"]["ours"]["by_seed"] == {"0": 2.0, "1": 2.2}
    assert task["optimizers"]["ours"]["tried"] == 3
    # Seed 0 falls from 6 at step 10 to 3 at step 20, seed 1 from 5 at 20 to 3 at 30; AdamW ends at 4.0 on average.
    assert task["optimizers"]["ours"]["shares"] == pytest.approx([(10 + 10 * 2 / 3) / 40, 25 / 40])
    (lead,) = task["leads"]
    assert lead == pytest.approx({"over": "muon", "gap": 0.6, "spread": 0.2})
    equal = {name: (entry["equal_steps"], entry["equal_mean"]) for name, entry in task["optimizers"].items()}
    assert equal == {"muon": (None, None), "adamw": (None, None), "ours": (20, pytest.approx(4.0))}
    assert "Ours is ahead of Muon by 0.6000; seeds differ by up to 0.2000." in text and "within" not in text
    assert "| ours | 2.1000 | 2.0000 | 2.2000 | 0.04 (edge) | 0.8 | yes | - | 3 | 42% 62% | 4.0000 (20 steps) |" in text
    assert "| AdamW | 4.0000 | 3.9000 | 4.1000 | 0.0025 (edge) | 0.8 | yes | - | 3 | - | - |" in text


def test_the_page_says_where_ours_is_behind_or_not_clearly_ahead(folder, capsys):
    """Fault: the page says that ours leads where it does not."""
    learn = folder / "toy.py:sample, 40 steps" / "learn"
    write(learn, Trial.of("muon", 1, rate=BEST["muon"], **FIRST), [9.0, 7.0, 5.0, 3.0, 1.5])
    assert "Ours is behind Muon by 0.0500; seeds differ by up to 1.1000. This is within" in table(folder, capsys)[2]


def test_one_seed_decides_nothing(folder, capsys):
    """Fault: with one seed nothing spreads, so that any gap is a lead."""
    (
        folder / "toy.py:sample, 40 steps" / "learn" / f"{Trial.of('muon', 1, rate=BEST['muon'], **FIRST).name}.json"
    ).unlink()
    assert "Ours is ahead of Muon by 0.5000, with one seed, which does not decide." in table(folder, capsys)[2]


def test_diverged_runs_never_win_and_metrics_may_be_others_than_the_loss(folder, capsys):
    """Faults: a run that ended early counts; the best by accuracy is the worst."""
    learn = folder / "toy.py:sample, 40 steps" / "learn"
    write(learn, Trial.of("ours", 0, rate=0.08, **FIRST), [9.0, 0.1], "the loss was not finite")
    _, task, _ = table(folder, capsys)
    assert task["optimizers"]["ours"]["settings"]["rate"] == 0.04 and not task["optimizers"]["ours"]["at_edge"]
    _, task, _ = table(folder, capsys, "--metric=accuracy", "--higher")
    assert list(task["optimizers"]) == ["ours", "muon", "adamw"] and task["leads"][0]["gap"] > 0


def test_markdown_replaces_only_its_sections(folder, capsys):
    """Faults: other parts of the page, such as older costs, are lost; a ratio is inverted; a unit is wrong."""
    google, ours = ({**timed(1.0), "mean_ms": means} for means in ([300.0, 500.0], [100.0, 100.0]))
    costs = {"device": "one abacus", "block_size": 128, "interval": 20, "intervals": 2, "parameters": 24_600_000}
    costs["optimizers"] = {"google": google, "ours": ours}
    (folder / "cost-128.json").write_text(json.dumps(costs))
    results = folder / "results.md"
    sections = [f"{section.begin}\nold\n{section.end}\n" for section in (standings.SECTION, standings.COSTS)]
    results.write_text(f"before\n{sections[0]}between\n{sections[1]}after\n")
    assert table(folder, capsys, f"--markdown={results}", f"--figure={folder / 'images' / 'loss.png'}")[0] == 0
    text = results.read_text()
    assert text.startswith(f"before\n{standings.SECTION.begin}\nMade by")
    assert f"{standings.SECTION.end}\nbetween\n{standings.COSTS.begin}\nUpdates alone" in text
    assert text.endswith(f"{standings.COSTS.end}\nafter\n")
    assert "| ours | 20.0 | 40.0 | 80.0 | 4.00 | 2.00 | 3.5 | 7,890 | 123,456 | 5.0 |" in text
    assert "| Google's Shampoo | 300.0 500.0 | 4.00 | 3.5 | 7,890 | 123,456 | 5.0 |" in text
    assert (folder / "images" / "loss.png").stat().st_size > 10_000
    (folder / "cost-128.json").unlink()
    assert table(folder, capsys, f"--markdown={results}")[0] == 0
    assert results.read_text() == text
    results.write_text("# Results\n")
    assert table(folder, capsys, f"--markdown={results}")[0] == 2
    assert results.read_text() == "# Results\n"


def test_an_empty_workdir_and_a_config_without_shampoo_are_refused(tmp_path, capsys):
    """Fault: a traceback instead of one line."""
    assert table(tmp_path, capsys)[0] == 2
    flags = [f"--workdir={tmp_path}", "--optimizers=adamw", "--config=shampax/configs/lm.py:sample_adamw"]
    assert optimizers.main(["learn", *flags]) == 2
    assert "its optimizer must be Shampoo" in capsys.readouterr().err


def test_a_missing_google_package_is_one_line_with_the_command_to_install_it(tmp_path, monkeypatch, capsys):
    """Fault: a traceback after hours of the other optimizers' training."""
    monkeypatch.setitem(sys.modules, "precondition.distributed_shampoo", None)
    monkeypatch.setattr(learning, "run", lambda *_: pytest.fail("trained the others first"))
    assert optimizers.main(["learn", f"--workdir={tmp_path / 'runs'}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "make install EXTRA=benchmarks" in line
    assert not (tmp_path / "runs").exists()


def test_settings_reach_the_options_of_every_contestant():
    """Faults: a momentum is left at its default; the contestants differ in more than their rule; ours is another's."""
    ours = ShampooOptions(block_size=128, weight_decay=0.4, rate_rules=((".*", 3.0),))
    settings = {"rate": 1.0, "momentum": 0.7, "nesterov": False}
    made = {name: with_settings(each.options(ours), settings) for name, each in CONTESTANTS.items()}
    for options in made.values():
        assert options.beta1 == 0.7 and not options.nesterov and options.beta2 == 0.95
    assert made["muon"].beta == 0.7 and made["muon"].weight_decay == 0.1
    assert made["adamw"].weight_decay == made["soap"].weight_decay == 0.4
    for name in ("adamw", "google", "muon_adam", "shampoo", "soap", "kl_shampoo", "ours"):
        assert made[name].rate_rules == ours.rate_rules
    changed = {
        name: with_settings(each, settings | {"embeddings": 2.0, "schedule": "linear"}) for name, each in made.items()
    }
    for options in changed.values():
        assert [first_match(options.rate_rules, path) for path in ("embedding", "layers/mlp/up/kernel")] == [2.0, 1.0]
    assert all(
        with_settings(each, settings | {"embeddings": 3.0}) == each
        for each in made.values()
        if each.rate_rules == ours.rate_rules
    )
    kinds = {made[name].treatments[-1][1] for name in ("soap", "kl_shampoo", "shampoo")}
    assert kinds == {"soap", "kl_shampoo", "shampoo"} and made["google"].treatments == ours.treatments
    assert [made[name].orthogonalize for name in ("ours", "muon_adam", "shampoo", "soap")] == [3, 5, 0, 0]


def test_variants_of_a_config_compete_with_their_own_optimizer(tmp_path, monkeypatch, capsys):
    """Faults: a task's own baseline is trained with another optimizer or rate; a change that its optimizer does not
    have is trained, the same run twice."""
    made = []

    def run(workload, trial, *_):
        made.append((trial, workload.options(trial)))
        return {"stopped": None, "heldout": [{"loss": abs(dict(trial.settings)["rate"] - 0.06)}]}

    monkeypatch.setattr(learning, "run", run)
    flags = [f"--workdir={tmp_path}", "--config=shampax/configs/dlrm.py:sample", "--seeds=0"]
    assert optimizers.main(["learn", *flags, "--optimizers=sample_adagrad"]) == 0
    assert {dict(trial.settings)["rate"] for trial, _ in made} == {0.03, 0.06, 0.12}
    assert {type(options).__name__ for _, options in made} == {"AdaGradOptions"} and len(made) == 6
    assert dict(made[-1][0].settings)["schedule"] == "linear"
    assert optimizers.main(["learn", *flags, "--optimizers=no_such"]) == 2
    assert "no_such" in capsys.readouterr().err


def test_equal_seconds_are_as_many_steps_as_fit(workload, programs, tmp_path, monkeypatch, capsys):
    """Faults: the slower optimizer gets the most steps; its rate decays over the steps of the longer run; the settings
    are not the best ones."""
    flags = [f"--workdir={tmp_path}", "--config=shampax/configs/lm.py:bytes", "--set", *SMALL, "duration=40 steps"]
    task = tmp_path / "lm.py:bytes, 40 steps"
    for name, rate in (("ours", 0.1), ("ours", 0.2), ("adamw", 0.3)):
        write(task / "learn", Trial.of(name, rate=rate, **FIRST), [3.0, rate])
    (task / "time.json").write_text(json.dumps({"optimizers": {"ours": timed(40.0), "adamw": timed(30.0)}}))
    made = []
    monkeypatch.setattr(learning, "run", lambda *run: made.append((run[1], run[0].total_steps, run[2].name)))
    assert optimizers.main(["equal", *flags]) == 0
    assert json.loads(capsys.readouterr().out) == {"steps": {"ours": 30, "adamw": 40}}
    expected = {"ours": (0.1, 30), "adamw": (0.3, 40)}
    assert made == [(Trial.of(name, rate=rate, **FIRST), steps, "equal") for name, (rate, steps) in expected.items()]
    (task / "time.json").unlink()
    assert optimizers.main(["equal", *flags]) == 2
    assert "Run the sub-command time first" in capsys.readouterr().err


def test_the_decay_of_a_trial_replaces_that_of_the_config(workload, monkeypatch):
    """Fault: a trial with another decay repeats the run of the config's."""
    decays = []
    monkeypatch.setattr(workload, "_schedule", lambda decay: decays.append(decay))
    for settings in ({}, {"schedule": "linear"}):
        trial = Trial.of("adamw", rate=1.0, **FIRST | settings)
        workload.program(*workload.chosen(trial))
        assert learning.settings_of(workload, trial)["decay"] == decays[-1]
    assert decays == ["cosine", "linear"]


def test_parameters_are_split_by_layer_with_folded_heads_and_joined_again():
    """Faults: Google's optimizer gets a stack of layers as one tensor; an update is applied to another layer; an
    embedding is preconditioned."""
    params = {
        "query": np.arange(2 * 3 * 4 * 5.0).reshape(2, 3, 4, 5),
        "out": np.ones((4, 5, 3)),
        "norm": np.ones((2, 3)),
        "embedding": np.ones((7, 3)),
    }
    names = {"query": ("layers", "embed", "heads", "kv"), "out": ("heads", "kv", "embed"), "norm": ("layers", "norm")}
    names["embedding"] = ("vocab", "embed")
    seen = []

    def update(updates, state, params=None):
        seen.append(jax.tree.map(np.shape, params))
        return jax.tree.map(lambda u, p: u + p, updates, params), state

    tx = optax.GradientTransformation(lambda params: (), update)
    tx = contestants.as_matrices(tx, names, ShampooOptions.treatments)
    updates, _ = tx.update(params, tx.init(params), params)
    assert seen[0] == {"query": [(3, 20)] * 2, "out": [(20, 3)], "norm": [(3,)] * 2, "embedding": [(21,)]}
    assert jax.tree.all(jax.tree.map(lambda u, p: np.array_equal(u, 2 * p), updates, params))


SMALL = [
    *("duration=2 steps", "batch_size=2", "evaluation.batches=1", "data.sequence_length=8", "data.max_records=10"),
    *("task.layers=1", "task.embed_dim=16", "task.heads=2", "task.kv_heads=1", "task.head_dim=8"),
    *("task.mlp_dim=24", "optimizer.block_size=16", "optimizer.interval=2", "optimizer.early_intervals=()"),
]


@pytest.fixture(scope="module")
def workload(tmp_path_factory):
    """Return the byte model, shrunk to one narrow layer and two steps."""
    return learning.Workload(load("shampax/configs/lm.py:bytes", SMALL), tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def programs(workload):
    """Return one program for each optimizer; each compiles at its first run."""
    return {name: workload.program(workload.options(Trial.of(name, **FIRST))) for name in ("adamw", "muon", "ours")}


@pytest.mark.parametrize("name", ["adamw", *(pytest.param(name, marks=pytest.mark.slow) for name in ("muon", "ours"))])
def test_all_rates_share_one_program(workload, programs, name):
    """Fault: the rate is a constant of the program, and all rates of the ladder give the same run."""
    program = programs[name]
    still, moving = (learning.train(workload, program, Trial.of(name, rate=rate)) for rate in (0.0, 1e-2))
    assert program.step._cache_size() == 1
    assert len(moving["losses"]) == moving["steps"] == 2
    assert [metrics["step"] for metrics in moving["heldout"]] == [0, 1, 2]
    assert moving["heldout"][0]["loss"] == still["heldout"][0]["loss"] == still["heldout"][2]["loss"]
    assert moving["heldout"][2]["loss"] < still["heldout"][2]["loss"]
    assert moving["stopped"] is None


def test_a_diverging_run_stops(workload, programs):
    """Fault: NaN is written to the file, which makes it invalid JSON, or counts as a loss."""
    result = learning.train(workload, programs["adamw"], Trial.of("adamw", rate=math.inf))
    assert result["stopped"] == "the loss was not finite"
    assert result["heldout"][-1]["loss"] is None
    json.dumps(result, allow_nan=False)


def test_finished_runs_are_kept_and_those_of_other_settings_refused(workload, programs, tmp_path, monkeypatch):
    """Faults: a finished run is trained again; a mean is over runs from before and after a change of an optimizer."""
    monkeypatch.setattr(learning.Workload, "program", lambda *_: programs["adamw"])
    trial = Trial.of("adamw", rate=0.1, **FIRST)
    made = learning.run(workload, trial, tmp_path, {})
    monkeypatch.setattr(learning, "train", lambda *_: pytest.fail("trained again"))
    assert learning.run(workload, trial, tmp_path, {}) == made
    monkeypatch.setattr(contestants, "BETA2", 0.9)
    with pytest.raises(UserError, match=r"optimizer\.beta2: 0\.95 -> 0\.9"):
        learning.run(workload, trial, tmp_path, {})
    (outcome,) = learning.read(tmp_path)
    assert outcome.trial == trial and outcome.complete and outcome.result["loss"] == made["heldout"][-1]["loss"]


def test_model_state_and_augmentation_are_those_of_the_trainer(tmp_path):
    """Faults: batch statistics stay at their start; training images are not augmented."""
    changes = ["duration=2 steps", "batch_size=4", "evaluation.batches=1", "task.stages=(1,)", "task.width=4"]
    workload = learning.Workload(load("shampax/configs/resnet.py:sample", changes), tmp_path)
    program = workload.program(workload.options(Trial.of("adamw", **FIRST)))
    start = jax.device_get(program.start(0)[0])
    batches = workload.batches(0)
    variables, state = program.start(0)
    variables, _, _ = program.step(variables, state, batches[0], np.float32(0), np.uint32(0), np.uint32(0))
    same = jax.tree.map(lambda a, b: bool(np.array_equal(a, b)), start, jax.device_get(variables))
    assert all(jax.tree.leaves(same["params"])) and not any(jax.tree.leaves(same["batch_stats"]))
    assert not np.array_equal(
        batches[0]["image"],
        learning.pipeline.Batches(workload._source, seed=0, global_batch_size=4, rows=range(4))[0]["image"],
    )


def test_tuning_changes_one_setting_at_a_time_and_ranks_by_effect(tmp_path, capsys):
    """Faults: a change equals the config; a value is reported for another option; the order is not that of effects."""
    ours = ShampooOptions()
    base = Trial.of(tuning.BASE, rate=0.02, momentum=0.8, nesterov=True)
    own = vars(ours) | dict(base.settings)
    made = tuning.trials(base, own, ["rate", *tuning.CHANGES])
    assert len({trial.name for trial in made}) == len(made)
    options = [with_settings(ours, dict(trial.settings)) for trial in made]
    assert len(set(options)) == len(options) - len(tuning.RATE_FACTORS)
    folder = tmp_path / "toy.py:sample, 40 steps"
    for trial in tuning.trials(base, own, ["rate", "ridge"]):
        settings = dict(trial.settings)
        write(folder, trial, [2.0 + 0.1 * (settings.get("ridge", 1e-4) > 1e-4) + (settings["rate"] != 0.02)])
        path = folder / f"{trial.name}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"settings": {"optimizer": {"ridge": 1e-4}}}))
    assert tuning.main(["table", f"--workdir={tmp_path}"]) == 0
    shown = capsys.readouterr()
    rows = json.loads(shown.out)["toy.py:sample, 40 steps"]
    assert [row["option"] for row in rows] == ["rate", "ridge"]
    assert "| `ridge` | 1e-06: 2.0000, 1e-05: 2.0000, **0.0001: 2.0000**, 0.001: 2.1000, 0.01: 2.1000 |" in shown.err
    page, picture = tmp_path / "tuning.md", tmp_path / "images" / "tuning.png"
    page.write_text("<!-- tuning begin -->\n<!-- tuning end -->\n")
    flags = [f"--workdir={tmp_path}", f"--markdown={page}", f"--figure={picture}"]
    assert tuning.main(["table", *flags]) == 0
    assert "(images/tuning.png)" in page.read_text() and picture.exists()
    panels = figure.tuning_figure(tuning.compare(learning.read(folder))).axes
    assert [panel.get_title() for panel in panels] == ["rate", "ridge"]
