"""Define the compared optimizers: AdamW, Muon, Google's Shampoo, and our Shampoo, SOAP and KL-Shampoo."""

import dataclasses
import importlib
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ..configs.base import EMBEDDING_RATE
from ..framework.base.errors import UserError
from ..optimizers import ShampooOptions
from ..optimizers.baselines import AdamWOptions, MuonOptions, scale_by_rules
from ..optimizers.options import DIAGONAL_KINDS
from ..optimizers.plan import patterns

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
    treatments: tuple[tuple[str, str], ...] = ShampooOptions.treatments  # "diagonal" and "rows" use the graft alone
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
            skip_preconditioning_rank_lt=2,  # vectors
            generate_training_metrics=False,
        )
        tx = as_matrices(optax.chain(optax.scale(self.scale), tx), axis_names, self.treatments)
        return optax.chain(tx, scale_by_rules(self.rate_rules))


@dataclasses.dataclass(frozen=True)
class Contestant:
    """A compared optimizer.

    Attributes:
      title: its name in tables.
      rate: learning rate in the middle of the ladder.
      options: from the options of a config's Shampoo, which give block size, factors of the rate and decay, to its own.
    """

    title: str
    rate: float
    options: Callable[[ShampooOptions], Any]


def _adamw(ours: ShampooOptions) -> AdamWOptions:
    return AdamWOptions(
        beta2=BETA2, weight_decay=ours.weight_decay, decay_rules=ours.decay_rules, rate_rules=ours.rate_rules
    )


def _muon(ours: ShampooOptions) -> MuonOptions:
    # Rates of Muon are four times ours, and decay is a multiple of the rate.
    return MuonOptions(beta2=BETA2, weight_decay=ours.weight_decay / 4, decay_rules=ours.decay_rules)


def _google(ours: ShampooOptions) -> GoogleOptions:
    return GoogleOptions(ours.block_size, beta2=BETA2, treatments=ours.treatments, rate_rules=ours.rate_rules)


def _family(kind: str = "shampoo", **changes: Any) -> Callable[[ShampooOptions], ShampooOptions]:
    def options(ours: ShampooOptions) -> ShampooOptions:
        treatments = tuple((pattern, kind if text == "shampoo" else text) for pattern, text in ours.treatments)
        return dataclasses.replace(ours, **(PLAIN | changes), treatments=treatments)

    return options


EMBEDDINGS = EMBEDDING_RATE[0][0]
# Where every search begins.
FIRST: dict[str, Any] = {"momentum": 0.8, "nesterov": True}
BETA2 = 0.95  # of all second moments and statistics
PLAIN: dict[str, Any] = {
    "exponent": 0.5,
    "ridge": 1e-4,
    "beta2": BETA2,
    "graft": "adam",
    # Other parameters are under Adam with the matrices' settings, as in AdamW and Muon.
    **{"diagonal": "adam", "diagonal_rate": 1.0},
    **dict.fromkeys(("diagonal_beta1", "diagonal_beta2", "diagonal_nesterov")),
    "interval": 10,
    "early_intervals": ((20, 1),),
    "orthogonalize": 0,
}
ORTHOGONAL: dict[str, Any] = {"orthogonalize": 3, "interval": 20, "early_intervals": ((10, 1),)}
CONTESTANTS = {
    "ours": Contestant("ours", 0.02, _family(**ORTHOGONAL)),
    "muon": Contestant("Muon", 0.048, _muon),
    "muon_adam": Contestant("Muon with Adam's norm", 0.02, _family(exponent=0.0, orthogonalize=5, block_size=2**20)),
    "adamw": Contestant("AdamW", 0.005, _adamw),
    "shampoo": Contestant("Shampoo without orthogonalization", 0.02, _family()),
    "soap": Contestant("SOAP", 0.01, _family("soap")),
    "kl_shampoo": Contestant("KL-Shampoo", 0.02, _family("kl_shampoo")),
    "google": Contestant("Google's Shampoo", 0.01, _google),
}


def title(name: str) -> str:
    """Return the name of an optimizer in tables: that of a contestant, or the variant of a config."""
    return CONTESTANTS[name].title if name in CONTESTANTS else f"`{name}`"


def with_settings(options: Any, settings: Mapping[str, Any]) -> Any:
    """Return options with the settings of a trial, as far as they have them.

    "momentum" sets the decay of every momentum: Muon has one for matrices and one for other parameters. "rate" is no
    option, nor is "schedule". "embeddings" is the factor of the rate of embeddings, other parameters then having none.
    Other settings are fields of the options.
    """
    momenta = [name for name in ("beta", "beta1", "momentum") if isinstance(getattr(options, name, None), float)]
    fields = {name: value for name, value in settings.items() if hasattr(options, name) and name != "momentum"}
    factor = settings.get("embeddings")
    if factor is not None and factor != patterns.first_match(getattr(options, "rate_rules", [(".*", factor)]), "embed"):
        fields["rate_rules"] = ((EMBEDDINGS, factor), (".*", 1.0))
    return dataclasses.replace(options, **fields, **dict.fromkeys(momenta, settings["momentum"]))


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


def as_matrices(
    tx: optax.GradientTransformation, axis_names: Any, treatments: patterns.Rules[str]
) -> optax.GradientTransformation:
    """Apply `tx` to parameters split into matrices [rows, cols] and vectors.

    Args:
      tx: optimizer without support for stacked matrices and folded sides.
      axis_names: tree with a tuple of names for each parameter.
      treatments: rules over paths; parameters with "diagonal" or "rows" become vectors.
    """

    def cut(tree: Any) -> Any:
        def of(leaf: jax.Array, names: Sequence[str], treatment: str) -> list[jax.Array]:
            return [leaf.reshape(-1)] if treatment in DIAGONAL_KINDS else _matrices(leaf, names)

        return jax.tree.map(of, tree, axis_names, patterns.map_paths(treatments, tree))

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
