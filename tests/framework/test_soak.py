"""Run a short form of soak.py."""

import pytest
import soak


@pytest.mark.slow
def test_killed_and_stopped_runs_end_as_the_undisturbed_one(tmp_path, monkeypatch):
    """Faults: files that a SIGKILL leaves incomplete are used; steps are repeated after a SIGTERM."""
    monkeypatch.setattr(soak, "STEPS", 60)
    result = soak.soak(tmp_path, kills=1, terms=1, seed=0, each=(1,))
    assert result["faults"] == {}
    assert result["bitwise equal"] == 2
    assert result["kills"] == 1 and result["stopped by SIGTERM"] == 1
