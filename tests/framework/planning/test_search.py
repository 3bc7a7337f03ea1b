"""Test the search for the fastest variant of a config."""

import jax
import pytest

from shampax.configs import base
from shampax.framework.base.errors import UserError
from shampax.framework.planning import search
from shampax.framework.sharding import chips

CHIP = chips.Chip(flops=1e9, float32=1e8, bandwidth=1e8, links=1e6, network=1e5, memory=1)


def config_of(overrides):
    config = base.get_config()
    config.task = base.component("toy:ToyTask", width=32, hidden=64)
    config.data = base.component("toy_specified:SpecifiedData")
    config.optimizer = base.component(base.ADAMW)
    config.batch_size = 16
    config.update_from_flattened_dict({key: int(value) for key, value in (each.split("=") for each in overrides)})
    return config


def test_variants_are_compiled_within_bounds_and_sorted(monkeypatch):
    """Faults: more compilations than allowed; the slowest comes first; a variant that is refused ends the search."""
    monkeypatch.setattr(chips, "chip", lambda kind: CHIP)
    said = []
    found = search.search(config_of, jax.devices()[:4], 5, said.append)
    assert [line.partition(":")[0] for line in said if line.startswith("compiling")] == [
        f"compiling {number} of at most 5" for number in (1, 2, 3, 4, 5)
    ]
    assert len(found) == len({trial.overrides for trial in found}) == 5 - sum("skipped" in line for line in said)
    assert {"mesh.fsdp=2"} <= {each for trial in found for each in trial.overrides}
    assert {"microbatches=2"} <= {each for trial in found for each in trial.overrides}
    seconds = [trial.plan.step_seconds for trial in found]
    assert seconds == sorted(seconds)
    assert "plan --config=toy --config.mesh.fsdp=2" in search.text("plan --config=toy", found)


def test_variants_that_do_not_fit_come_last_with_the_overflow(monkeypatch):
    """Fault: the fastest variant that does not fit is advised."""
    monkeypatch.setattr(chips, "chip", lambda kind: CHIP._replace(memory=1e-6))
    found = search.search(config_of, jax.devices()[:2], 1, lambda line: None)
    assert search.text("plan", found).endswith("peak 0.00 GB of 0.00 GB")


def test_devices_without_figures_are_refused():
    """Fault: variants in any order, as if they had been compared."""
    with pytest.raises(UserError, match="the speed of cpu is not known"):
        search.search(config_of, jax.devices()[:2], 3, lambda line: None)
