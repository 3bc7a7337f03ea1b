"""The search for a mesh and a block size, over figures that are made up."""

import math
from types import SimpleNamespace

import jax
import pytest

from shampax.configs import base
from shampax.framework.base.errors import UserError
from shampax.framework.planning import search

TPU = "TPU v5 lite"


def make(overrides=()):
    """A config with overrides of whole numbers."""
    config = base.get_config()
    config.optimizer = base.component("shampax.optimizers.shampoo:ShampooOptions", block_size=1_024)
    config.mesh.expert = 2
    pairs = (override.split("=") for override in overrides)
    config.update_from_flattened_dict({name: int(value) for name, value in pairs})
    return config


@pytest.fixture
def tried(monkeypatch):
    """What has been tried, as (fsdp, tensor, block size): fsdp costs memory nothing and time little, blocks a lot."""
    seen = []

    def figures(config, devices, *, compiles, kind):
        assert not compiles
        assert kind == TPU
        fsdp, tensor, size = config.mesh.fsdp, config.mesh.tensor, config.optimizer.block_size
        seen.append((fsdp, tensor, size))
        if tensor == 4:
            raise UserError("heads are not divisible by 4")
        seconds = 1 + 0.1 * fsdp + tensor + (0 if size == 512 else 0.05)
        predicted = SimpleNamespace(step_seconds=seconds, utilisation=1 / seconds, peak=10**10 // fsdp)
        return SimpleNamespace(fits=fsdp >= 2, predicted=predicted, needed=10**10 // fsdp)

    monkeypatch.setattr(search.planning, "figures", figures)
    return seen


def test_the_fastest_that_fits_comes_first(tried):
    """Fault: what does not fit is proposed, a mesh is left out, or block sizes are not tried on the best one."""
    found = search.search(make, jax.devices()[:8], TPU, lambda _: None)
    meshes = {(fsdp, tensor) for fsdp, tensor, _ in tried}
    assert meshes == {(fsdp, tensor) for fsdp in (1, 2, 4) for tensor in (1, 2, 4) if fsdp * tensor <= 4}
    assert found[0].overrides == ("mesh.data=-1", "mesh.fsdp=2", "mesh.tensor=1", "optimizer.block_size=512")
    assert found[0].seconds == pytest.approx(2.2)
    assert all(math.isinf(each.seconds) for each in found if each.overrides[1] == "mesh.fsdp=1")
    assert [each.refusal for each in found if each.figures is None] == ["heads are not divisible by 4"]


def test_the_answer_can_be_pasted(tried):
    """Fault: the flags shown are not those of the best candidate, or what does not fit is shown."""
    text = search.text(search.search(make, jax.devices()[:8], TPU, lambda _: None))
    first = text.splitlines()[2]
    assert first.endswith(
        "--config.mesh.data=-1 --config.mesh.fsdp=2 --config.mesh.tensor=1 --config.optimizer.block_size=512"
    )
    assert "fsdp=1 " not in text


def test_chips_without_figures_are_refused():
    """Fault: candidates are ranked by nothing."""
    with pytest.raises(UserError, match="--chip: v2, v3"):
        search.search(make, jax.devices()[:8], "cpu", lambda _: None)
