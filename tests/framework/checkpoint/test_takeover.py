"""Test runs that start from a checkpoint of another model or optimizer, and their report."""

import dataclasses
import re
import shutil

import jax
import numpy as np
import pytest
import toy
from toy_runs import ADAMW, SHAMPOO, arrays, lines, make_config, two

from shampax.configs import base
from shampax.framework.base.errors import UserError
from shampax.framework.checkpoint import origin, takeover
from shampax.framework.checkpoint.record import Record
from shampax.framework.train import train
from shampax.optimizers import ShampooOptions


@dataclasses.dataclass(frozen=True)
class Changed(toy.ToyTask):
    """The toy model with `hidden` renamed to `middle` and an additional parameter `gain` [M, M]."""

    def init(self, key, batch_spec):
        variables = super().init(key, batch_spec)
        params = variables["params"]
        params["middle"] = params.pop("hidden")
        params["gain"] = {"kernel": jax.numpy.eye(self.hidden)}
        return variables

    def loss(self, variables, batch, *, key, train):
        params = variables["params"]
        inner = params | {"hidden": {"kernel": params["middle"]["kernel"] @ params["gain"]["kernel"]}}
        return super().loss(variables | {"params": inner}, batch, key=key, train=train)

    def logical_axes(self, variables):
        axes = super().logical_axes(variables)
        axes["params"]["middle"] = axes["params"].pop("hidden")
        axes["params"]["gain"] = {"kernel": ("mlp", "mlp2")}
        return axes


def shampoo(**changes):
    return base.component(SHAMPOO, block_size=8, interval=3, early_intervals=(), **changes)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Train 12 steps with Shampoo."""
    workdir = tmp_path_factory.mktemp("takeover") / "run"
    train(make_config(optimizer=shampoo()), workdir, devices=two())
    return workdir


def resumed(run, workdir, **changes):
    """Resume for 2 steps; return the content of `restored.txt`."""
    train(make_config(duration="14 steps", resume_from=str(run), **changes), workdir, devices=two())
    return (workdir / "restored.txt").read_text()


def test_another_block_size_keeps_elementwise_state(run, tmp_path, capsys):
    report = resumed(run, tmp_path / "new", optimizer=base.component(SHAMPOO, block_size=16, interval=3))
    assert "taken over with all their state: 1 of 3 parameters" in report  # the embedding, which is diagonal
    expected = (
        "hidden/kernel: parameter, momentum, second moment taken over; statistics, roots initialised "
        "(blocks of 8x8 there, 16x16 here)"
    )
    assert expected in report and expected in capsys.readouterr().out
    assert [line["step"] for line in lines(tmp_path / "new") if "train/loss" in line] == [13, 14]


def test_another_model_restores_known_parameters_and_lists_the_others(run, tmp_path):
    table = (("vocab", None), ("embed", None), ("mlp", None), ("mlp2", None))
    config = make_config(
        optimizer=shampoo(),
        duration="13 steps",
        resume_from=str(run),
        renamed=(("hidden", "middle"),),
        sharding_rules=table,
    )
    config.unlock()
    config.task = base.component(f"{__name__}:Changed")
    config.lock()
    train(config, tmp_path / "new", devices=two())
    report = (tmp_path / "new" / "restored.txt").read_text()
    assert "taken over with all their state: 3 of 4 parameters" in report
    assert "gain/kernel: parameter, momentum, second moment, statistics, roots initialised" in report
    assert "dropped" not in report
    config.renamed = ()
    train(config, tmp_path / "unnamed", devices=two())
    report = (tmp_path / "unnamed" / "restored.txt").read_text()
    assert "middle/kernel: parameter, momentum, second moment, statistics, roots initialised (not saved)" in report
    assert "hidden/kernel: dropped (not in this model)" in report


def test_another_optimizer_starts_with_new_state_at_the_runs_learning_rate(run, tmp_path):
    """Fault: the warm-up restarts in the middle of a run, or at the next resume."""
    report = resumed(run, tmp_path / "new", optimizer=base.component(ADAMW))
    assert f"the optimizer's state is initialised: saved by {SHAMPOO}, now {ADAMW}" in report
    assert "taken over with all their state: 3 of 3" in report
    config = make_config(
        optimizer=base.component(ADAMW),
        **{"duration": "16 steps", "checkpoint.every": "2 steps", "log.every": "1 steps"},
    )
    config.resume_from = str(run)
    train(config, tmp_path / "whole", devices=two())
    shutil.rmtree(tmp_path / "whole" / "checkpoints" / "16")
    (tmp_path / "whole" / "result.json").unlink()
    rates = {line["step"]: line["train/learning_rate"] for line in lines(tmp_path / "whole") if "train/loss" in line}
    before = arrays(tmp_path / "whole", 14)
    train(config, tmp_path / "whole", devices=two())
    after = arrays(tmp_path / "whole", 16)
    again = {line["step"]: line["train/learning_rate"] for line in lines(tmp_path / "whole") if "train/loss" in line}
    assert rates == again
    # AdamW moves a parameter by about the learning rate, which is near the end of its decay here.
    steps = jax.tree.map(lambda x, y: np.abs(x - y).max(), before["params"], after["params"])
    assert 0 < max(jax.tree.leaves(steps)) < 2 * (rates[15] + rates[16])


def test_init_from_lists_every_restored_variable(run, tmp_path):
    config = make_config(init_from=str(run), duration="1 steps", **{"schedule.warmup": "0 steps"})
    train(config, tmp_path / "new", devices=two())
    report = (tmp_path / "new" / "restored.txt").read_text()
    assert "taken over with all their state: 3 of 3" in report
    assert "initialised" not in report


def test_a_checkpoint_without_any_parameter_of_the_model_is_refused(run, tmp_path):
    config = make_config(resume_from=str(run), renamed=(("embed", "a"), ("hidden", "b"), ("out", "c")))
    with pytest.raises(
        UserError, match=r"has no parameter of this model: it has a/kernel, .*, the model has embed/kernel, "
    ):
        train(config, tmp_path / "new", devices=two())
    assert not (tmp_path / "new" / "config.json").exists()


def test_a_finished_run_resumes_with_a_longer_duration(run, tmp_path, capsys):
    """Fault: a finished run counts as complete although its duration was raised."""
    again = shutil.copytree(run, tmp_path / "again")
    changed = {"duration": "14 steps", "may_change": (*base.MAY_CHANGE, "duration")}
    assert train(make_config(optimizer=shampoo(), **changed), again, devices=two())["steps"] == 14
    assert re.search(r"resuming from .*/12", capsys.readouterr().out)
    assert "complete after 14 steps" not in capsys.readouterr().out
    train(make_config(optimizer=shampoo(), **changed), again, devices=two())
    assert "complete after 14 steps" in capsys.readouterr().out


def test_skipped_steps_do_not_count_for_the_schedule_of_another_optimizer(run):
    """Fault: after skipped steps the run resumes with the learning rate of another step."""
    start = origin.Origin("resume", run / "checkpoints" / "12")
    record = Record(step=12, skipped=2, optimizer_began=5)
    assert takeover.optimizer_began(start, record, "another") == 10
    assert takeover.optimizer_began(start, record, SHAMPOO) == 5


def test_a_run_keeps_its_phases_on_another_mesh(run):
    """Fault: after a resume on another number of devices, roots are refreshed in other steps."""
    start = origin.Origin("resume", run / "checkpoints" / "12")
    options = ShampooOptions(block_size=8, interval=9, early_intervals=())
    assert takeover.continuing(start, options, SHAMPOO).phases == 3  # as many as the interval that the run began with
    chosen = dataclasses.replace(options, phases=1)
    assert takeover.continuing(start, chosen, SHAMPOO) == chosen
    on_host = dataclasses.replace(options, refresh="host", delay=1)
    assert takeover.continuing(start, on_host, SHAMPOO) == on_host
    assert takeover.continuing(start, options, "another") == options
    assert takeover.continuing(dataclasses.replace(start, kind="init"), options, SHAMPOO) == options


@dataclasses.dataclass(frozen=True)
class Marked(toy.ToyData):
    """The toy data with a fingerprint."""

    mark: str = ""

    def fingerprint(self, cache):
        return self.mark


def test_other_training_data_are_refused_or_reported(tmp_path, capsys):
    """Fault: the data changed, and the run continues without a warning."""

    def config(mark, **changes):
        changed = make_config(**{"duration": "1 steps", "schedule.warmup": "0 steps"} | changes)
        changed.unlock()
        changed.data = base.component(f"{__name__}:Marked", mark=mark)
        return changed.lock()

    train(config("old"), tmp_path / "run", devices=two())
    longer = {"duration": "2 steps", "may_change": (*base.MAY_CHANGE, "duration", "data.mark")}
    with pytest.raises(UserError, match=r"training data have changed \(fingerprint old when .*/1 was saved, new now\)"):
        train(config("new", **longer), tmp_path / "run", devices=two())
    allowed = longer | {"may_change": (*longer["may_change"], "data")}
    train(config("new", **allowed), tmp_path / "run", devices=two())
    assert "warning: the training data have changed since the checkpoint (fingerprint old" in capsys.readouterr().out
    train(config("newer", duration="3 steps", resume_from=str(tmp_path / "run")), tmp_path / "next", devices=two())
    assert "(fingerprint new when" in capsys.readouterr().out
