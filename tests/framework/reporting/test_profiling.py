from types import SimpleNamespace

import jax
import pytest
from toy_runs import make_config

from shampax.framework.base.errors import UserError
from shampax.framework.reporting import profiling
from shampax.framework.reporting.watchdog import Watchdog
from shampax.framework.train import train


def steps_of(workdir):
    """Return the step numbers in a profile, read as TensorBoard does."""
    (path,) = workdir.glob("plugins/profile/*/*.xplane.pb")
    events = [
        event
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes
        for line in plane.lines
        for event in line.events
    ]
    return sorted(dict(event.stats)["step_num"] for event in events if event.name == "train")


@pytest.mark.parametrize("text", ["20:10", "5:5", "0:3", "10", "a:b", "-1:4", "1:2:3", "10 : 20"])
def test_invalid_ranges_of_steps_are_refused_before_anything_is_written(text, tmp_path):
    with pytest.raises(UserError, match="Write FIRST:STOP, such as 10:20"):
        train(make_config(profile_steps=text), tmp_path / "run")
    assert not any(tmp_path.iterdir())


def test_a_range_beyond_the_run_is_refused_with_both_numbers(tmp_path):
    with pytest.raises(UserError, match=r"needs 13 steps, but config.duration is 12 steps. The largest STOP is 13"):
        train(make_config(profile_steps="10:14"), tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()


def test_requested_steps_are_profiled_also_in_a_resumed_run(tmp_path):
    """Faults: steps are off by one; devices are still at the step before; the run waits for past steps."""
    devices = jax.devices()[:2]
    first = make_config(profile_steps="3:6", duration="6 steps", may_change=("duration", "profile_steps"))
    train(first, tmp_path / "run", devices=devices)
    assert steps_of(tmp_path / "run") == [3, 4, 5]
    (tmp_path / "run" / "plugins").rename(tmp_path / "first")
    more = make_config(profile_steps="5:9", may_change=("duration", "profile_steps"))
    train(more, tmp_path / "run", devices=devices)
    assert steps_of(tmp_path / "run") == [7, 8]


def test_past_steps_are_not_profiled(tmp_path):
    profile = profiling.Profile(profiling.parse("2:4"), tmp_path, None, begin=8, total_steps=12)
    with profile:
        assert profile.next(8) > 10**6
        for step in (8, 12):
            assert not profile.due(SimpleNamespace(step=step, at_end=step == 12, stopped=None))
    assert not any(tmp_path.iterdir())


def test_a_profile_that_cannot_be_written_does_not_end_the_run(tmp_path, capsys):
    """Fault: a full disk ends the run with a traceback."""
    (tmp_path / "plugins").write_text("in the way")
    with Watchdog(tmp_path, 0.0, 0.0) as watch:
        profile = profiling.Profile(profiling.parse("2:3"), tmp_path, watch, begin=0, total_steps=4)
        for step in (1, 2):
            run = SimpleNamespace(step=step, at_end=False, stopped=None)
            assert profile.due(run)
            profile(run)
    assert not profile.due(SimpleNamespace(step=3, at_end=False, stopped=None))
    assert "warning: the profile could not be written (" in capsys.readouterr().out
