"""Count the files that a gradient crosses on the default path of the optimizer."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.core import Tracer

from shampax import optimizers
from shampax.optimizers import ShampooOptions, ShampooState, distributed_shampoo, shampoo

ROOT = Path(optimizers.__file__).parent


def test_a_gradient_crosses_at_most_twelve_files(monkeypatch):
    """Fault: a reader has to follow a gradient through code for options that are off."""
    params = {"embed": jnp.zeros((20, 16)), "layers": {"norm": jnp.zeros(16), "w": jnp.zeros((4, 32, 48))}}
    names = {"embed": ("vocab", "embed"), "layers": {"norm": ("embed",), "w": ("layers", "embed", "mlp")}}
    monkeypatch.setattr(shampoo, "_precondition", shampoo.precondition)  # traced here, not in an earlier test
    tx = distributed_shampoo(lambda count: 1e-3, ShampooOptions(block_size=16), axis_names=names)
    state, files = tx.init(params), set()

    def handles_arrays(frame):
        values = [x for x in frame.f_locals.values() if isinstance(x, Tracer | dict | list | tuple | ShampooState)]
        return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(values))

    def watch(frame, event, _):
        path = frame.f_code.co_filename
        if event == "call" and path.startswith(str(ROOT)) and handles_arrays(frame):
            files.add(Path(path).relative_to(ROOT).as_posix())

    def update(grads, state, params):
        sys.setprofile(watch)
        try:
            return tx.update(grads, state, params)
        finally:
            sys.setprofile(None)

    jax.make_jaxpr(update)(params, state, params)
    assert {"shampoo.py", "precondition.py", "refresh.py"} <= files
    assert len(files) <= 12, sorted(files)
