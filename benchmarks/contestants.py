"""The optimizers that are compared and their settings: AdamW, Muon, Google's Shampoo, ours and its siblings."""

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
# Decay of the momentum: of each one's default, 0.8 and 0.7 the best with one seed, as ours is in the config. So short a
# run gains from a shorter memory than the defaults'. The siblings have ours.
MOMENTUM = {"adamw": 0.7, "muon": 0.8, "google": 0.7}

# Names of the axis that stacks matrices, and of those that fold into one side of them.
_STACK = "layers"
_FOLDS = ("heads", "kv_heads", "kv")


@dataclasses.dataclass(frozen=True)
class GoogleOptions:
    """Distributed Shampoo of the package precondition-opt.

    It is shown the matrices of every layer one by one (`as_matrices`): a scanned stack of layers it would take for an
    order-3 tensor, with an exponent of 1/6 instead of 1/4 and the layers mixed. Shapes are taken as they are, because
    its own interpretation merges the sides of a matrix of up to 64 x 64 into a vector. Its training metrics, which
    cost time, are off. Exponent and ridge are those of our sample, which served it better than its defaults.
    """

    block_size: int = 128  # largest side of a block
    interval: int = 10  # steps from one refresh of the roots to the next
    p: int = 2  # each side is raised to -1/p; 0 takes its default, 2 x sides
    ridge: float = 1e-4  # relative to the largest eigenvalue
    graft: str = "RMSPROP_NORMALIZED"  # a member of its GraftingType
    beta1: float = 0.9  # decay of the momentum, taken after preconditioning
    beta2: float = 0.99  # decay of the statistics and of the graft's second moment
    epsilon: float = 1e-8  # of the graft
    nesterov: bool = False  # look one step ahead along the momentum
    start_step: int = 1  # before this step the graft acts alone
    largest_side: int = 4_096  # parameters with a longer side are left to the graft
    clip: float = 1.0  # largest root mean square of a graft, whose second moment begins at 0 uncorrected: 10 at first
    rate_rules: tuple[tuple[str, float], ...] = AdamWOptions.rate_rules  # factors of the learning rate
    scale: float = 1e4  # of gradients; statistics begin at ridge x I, which small gradients do not outgrow in 200 steps

    def build(self, learning_rate: optax.Schedule, *, axis_names: Any = None, **layout: Any):
        """The optimizer for parameters whose dimensions are named by `axis_names`; it takes no mesh."""
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
    """The options of every contestant, by name.

    Ours are the config's, and its siblings' differ in the word that names them. Google's share their block size and
    interval, and leave the embedding, whose longer side is the vocabulary, to the graft as ours do. AdamW and Google's
    also have our factors of the learning rate; Muon gives the embedding a learning rate of another kind anyway.
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
    """The module precondition.distributed_shampoo.

    Raises:
      UserError: it is not installed; the message says how to install it.
    """
    # Names it uses that JAX has dropped from its top level.
    for name in ("tree_map", "tree_flatten", "tree_unflatten"):
        setattr(jax, name, getattr(jax.tree_util, name))
    try:
        return importlib.import_module("precondition.distributed_shampoo")
    except ModuleNotFoundError as error:
        raise UserError(
            f"Google's Shampoo cannot be imported ({error}); install it with make install EXTRA=benchmarks, "
            "or leave google out of --optimizers"
        ) from error


def as_matrices(tx: optax.GradientTransformation, axis_names: Any) -> optax.GradientTransformation:
    """`tx` on parameters that are cut into matrices [rows, cols] and vectors.

    Args:
      tx: an optimizer that knows neither stacks of matrices nor folded sides.
      axis_names: a tuple of names for each parameter.
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
    """[layers, embed, heads, kv] to a list of [embed, heads kv]."""
    stack, names = (leaf, names[1:]) if names[0] == _STACK else (leaf[None], names)
    sides = []
    for folds, axes in itertools.groupby(zip(names, stack.shape[1:], strict=True), lambda axis: axis[0] in _FOLDS):
        lengths = [length for _, length in axes]
        sides += [math.prod(lengths)] if folds else lengths
    return [matrix.reshape(sides) for matrix in stack]
