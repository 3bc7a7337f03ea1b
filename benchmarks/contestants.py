"""Define the compared optimizers: AdamW, Muon, Google's Shampoo, and our Shampoo, SOAP and KL-Shampoo."""

import dataclasses
import importlib
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ..framework.base.errors import UserError
from ..framework.config import components
from ..optimizers import ShampooOptions
from ..optimizers.baselines import AdamWOptions, MuonOptions, scale_by_rules

TITLES = {
    "adamw": "AdamW",
    "muon": "Muon",
    "google": "Google's Shampoo",
    "ours": "ours",
    "soap": "our SOAP",
    "kl_shampoo": "our KL-Shampoo",
}
RATES = {
    "adamw": (1.5e-3, 3e-3, 6e-3),
    "muon": (2.4e-2, 4.8e-2, 9.6e-2),
    "google": (3e-3, 6e-3, 1.2e-2),
    "ours": (3e-3, 6e-3, 1.2e-2),
    "soap": (3e-3, 6e-3, 1.2e-2),
    "kl_shampoo": (3e-3, 6e-3, 1.2e-2),
}
# Decay of the momentum: for each optimizer the best of its default, 0.8 and 0.7 with one seed. The config has that of
# our Shampoo, SOAP and KL-Shampoo. Short runs gain from shorter memory than the defaults have.
MOMENTUM = {"adamw": 0.7, "muon": 0.8, "google": 0.7}

# Name of the axis that stacks matrices, and names of axes that fold into one side.
_STACK = "layers"
_FOLDS = ("heads", "kv_heads", "kv")


@dataclasses.dataclass(frozen=True)
class GoogleOptions:
    """Configure Distributed Shampoo of the package precondition-opt.

    `as_matrices` passes it every layer's matrices separately: it would treat a scanned stack of layers as an order-3
    tensor, with exponent 1/6 instead of 1/4 and mixed layers. Its own shape interpretation is off because it merges
    both sides of a matrix of up to 64 x 64 into a vector. Its training metrics are off because they cost time. Exponent
    and ridge are those of our sample, which gave lower losses than its defaults.
    """

    block_size: int = 128  # largest side of a block
    interval: int = 10  # steps from one refresh of the roots to the next
    p: int = 2  # the root of each side has exponent -1/p; 0: its default, 2 x sides
    ridge: float = 1e-4  # relative to the largest eigenvalue
    graft: str = "RMSPROP_NORMALIZED"  # member of its GraftingType
    beta1: float = 0.9  # decay of the momentum, which is applied after preconditioning
    beta2: float = 0.99  # decay of the statistics and of the graft's second moment
    epsilon: float = 1e-8  # epsilon of the graft
    nesterov: bool = False  # Nesterov momentum
    start_step: int = 1  # first step with preconditioning; earlier steps use the graft alone
    largest_side: int = 4_096  # parameters with a longer side use the graft alone
    clip: float = 1.0  # largest root mean square of a graft: its second moment starts at 0 without bias correction
    rate_rules: tuple[tuple[str, float], ...] = AdamWOptions.rate_rules  # factors of the learning rate
    scale: float = 1e4  # factor of gradients: statistics start at ridge x I, too large for small gradients in 200 steps

    def build(self, learning_rate: optax.Schedule, *, axis_names: Any = None, **layout: Any):
        """Return the optimizer. `axis_names` names the dimensions of each parameter; the mesh is ignored."""
        del layout
        package = google_package()
        tx = package.distributed_shampoo(
            learning_rate,
            block_size=self.block_size,
            beta1=self.beta1,
            beta2=self.beta2,
            diagonal_epsilon=self.epsilon,
            matrix_epsilon=self.ridge,
            start_preconditioning_step=self.start_step,
            preconditioning_compute_steps=self.interval,
            best_effort_shape_interpretation=False,
            graft_type=package.GraftingType[self.graft],
            nesterov=self.nesterov,
            exponent_override=self.p,
            clip_by_scaled_gradient_norm=self.clip,
            moving_average_for_momentum=True,
            skip_preconditioning_dim_size_gt=self.largest_side,
            skip_preconditioning_rank_lt=2,
            generate_training_metrics=False,
        )
        tx = as_matrices(optax.chain(optax.scale(self.scale), tx), axis_names)
        return optax.chain(tx, scale_by_rules(self.rate_rules))


def all_options(config: Any) -> dict[str, Any]:
    """Return the options of every optimizer, by name.

    Our Shampoo has the config's options; SOAP and KL-Shampoo differ from it only in the treatment. Google's Shampoo has
    our block size and interval, and uses the graft alone for the embedding (its longer side is the vocabulary), as ours
    does. AdamW and Google's Shampoo have our factors of the learning rate. Muon does not: it trains the embedding with
    Adam, on another scale of learning rates.
    """
    ours = components.build(config.optimizer)
    google = GoogleOptions(
        ours.block_size,
        ours.interval,
        beta1=MOMENTUM["google"],
        largest_side=config.task.vocab_size - 1,
        rate_rules=ours.rate_rules,
    )
    adamw = AdamWOptions(beta1=MOMENTUM["adamw"], rate_rules=ours.rate_rules)
    return {
        "adamw": adamw,
        "muon": MuonOptions(beta=MOMENTUM["muon"]),
        "google": google,
        "ours": ours,
        "soap": _sibling(ours, "soap"),
        "kl_shampoo": _sibling(ours, "kl_shampoo"),
    }


def _sibling(ours: ShampooOptions, kind: str) -> ShampooOptions:
    treatments = tuple((pattern, kind if text == "shampoo" else text) for pattern, text in ours.treatments)
    return dataclasses.replace(ours, treatments=treatments)


def google_package() -> Any:
    """Import the module precondition.distributed_shampoo.

    Raises:
      UserError: it is not installed; the message says how to install it.
    """
    # The package uses names that JAX removed from its top level.
    for name in ("tree_map", "tree_flatten", "tree_unflatten"):
        setattr(jax, name, getattr(jax.tree_util, name))
    try:
        return importlib.import_module("precondition.distributed_shampoo")
    except ModuleNotFoundError as error:
        raise UserError(
            f"Google's Shampoo cannot be imported ({error}). Run make install EXTRA=benchmarks, or remove google from "
            "--optimizers"
        ) from error


def as_matrices(tx: optax.GradientTransformation, axis_names: Any) -> optax.GradientTransformation:
    """Apply `tx` to parameters split into matrices [rows, cols] and vectors.

    Args:
      tx: optimizer without support for stacked matrices and folded sides.
      axis_names: tree with a tuple of names for each parameter.
    """

    def cut(tree: Any) -> Any:
        return jax.tree.map(_matrices, tree, axis_names)

    def init(params: Any) -> Any:
        return tx.init(cut(params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        parts, state = tx.update(cut(updates), state, cut(params))
        return jax.tree.map(lambda leaf, matrices: jnp.stack(matrices).reshape(leaf.shape), updates, parts), state

    return optax.GradientTransformation(init, update)


def _matrices(leaf: jax.Array, names: Sequence[str]) -> list[jax.Array]:
    """Split [layers, embed, heads, kv] into a list of [embed, heads * kv]."""
    stack, names = (leaf, names[1:]) if names[0] == _STACK else (leaf[None], names)
    sides = []
    for folds, axes in itertools.groupby(zip(names, stack.shape[1:], strict=True), lambda axis: axis[0] in _FOLDS):
        lengths = [length for _, length in axes]
        sides += [math.prod(lengths)] if folds else lengths
    return [matrix.reshape(sides) for matrix in stack]
