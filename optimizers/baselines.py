"""Baseline optimizers from optax, for the config field `optimizer`."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from optax.contrib import MuonDimensionNumbers

from .options import DIAGONAL_KINDS
from .plan import patterns
from .plan.views import matrix_axes, names_by_path
from .shampoo import ShampooOptions

NO_DECAY = ShampooOptions.decay_rules


def scale_by_rules(rate_rules: patterns.Rules[float]) -> optax.GradientTransformation:
    """Multiply the update of each parameter by the factor of the first rule that matches its path."""

    def scale(updates: Any, params: Any = None) -> Any:
        del params
        return jax.tree.map(lambda x, factor: x * factor, updates, patterns.map_paths(rate_rules, updates))

    return optax.stateless(scale)


def _sides(params: Any, axis_names: Any, treatments: patterns.Rules[str] = ShampooOptions.treatments) -> Any:
    """Return MuonDimensionNumbers for each matrix, and None for vectors and parameters under diagonal treatment."""
    rules = [(pattern, ShampooOptions().treatment(text)) for pattern, text in treatments]
    names = names_by_path(axis_names)

    def of(leaf: Any, path: str) -> MuonDimensionNumbers | None:
        treatment = patterns.first_match(rules, path)
        _, inputs, outputs = matrix_axes(
            leaf.ndim,
            names.get(path),
            stack_axes=ShampooOptions.stack_axes,
            fold_axes=ShampooOptions.fold_axes,
            stack=min(treatment.stack, leaf.ndim),
        )
        matrix = treatment.kind not in DIAGONAL_KINDS and inputs and outputs
        return MuonDimensionNumbers(tuple(inputs), tuple(outputs)) if matrix else None

    return jax.tree.map(of, params, patterns.path_tree(params))


@dataclasses.dataclass(frozen=True)
class AdamWOptions:
    """AdamW: Adam with decoupled weight decay (Loshchilov and Hutter 2019, arXiv 1711.05101)."""

    beta1: float = 0.9  # decay of the first moment
    beta2: float = 0.99  # decay of the second moment
    epsilon: float = 1e-8  # added to the root of the second moment
    weight_decay: float = 0.0  # parameters shrink by learning rate x weight decay
    decay_rules: tuple[tuple[str, bool], ...] = NO_DECAY  # which parameters decay
    rate_rules: tuple[tuple[str, float], ...] = ShampooOptions.rate_rules  # factors of the learning rate
    nesterov: bool = False  # look one step ahead along the momentum
    wider: float = ShampooOptions.wider  # as for Shampoo: matrices except embeddings have the rate / wider

    def build(self, learning_rate: optax.Schedule, *, axis_names: Any = None, **layout: Any):
        """Return the optimizer; `axis_names` tell matrices from vectors, as for Shampoo."""
        del layout

        def narrowed(updates: Any, params: Any = None) -> Any:
            del params
            return jax.tree.map(lambda x, matrix: x / self.wider if matrix else x, updates, _sides(updates, axis_names))

        adamw = optax.adamw(
            learning_rate,
            b1=self.beta1,
            b2=self.beta2,
            eps=self.epsilon,
            weight_decay=self.weight_decay,
            mask=partial(patterns.map_paths, self.decay_rules),
            nesterov=self.nesterov,
        )
        scaled = [optax.stateless(narrowed)] if self.wider != 1 else []
        return optax.chain(adamw, scale_by_rules(self.rate_rules), *scaled)


def scale_by_trust_ratio(adapt_rules: patterns.Rules[bool], axis_names: Any) -> optax.GradientTransformation:
    """Scale the update of each matrix to the norm of the matrix, unless either norm is 0.

    Like `optax.scale_by_trust_ratio`, but for each matrix of a stack.

    Args:
      adapt_rules: (regex over the path, whether to scale), first match wins.
      axis_names: tree with a tuple of axis names per parameter, or None. Axes in `ShampooOptions.stack_axes` stack.
    """
    names = names_by_path(axis_names)

    def adapt(update: jax.Array, param: jax.Array, path: str, on: bool) -> jax.Array:
        if not on:
            return update
        named = names.get(path) or [None] * param.ndim
        axes = tuple(axis for axis, name in enumerate(named) if name not in ShampooOptions.stack_axes)
        of_param, of_update = (jnp.sqrt(jnp.sum(jnp.square(x), axis=axes, keepdims=True)) for x in (param, update))
        known = (of_param > 0) & (of_update > 0)
        return update * jnp.where(known, of_param / jnp.where(known, of_update, 1.0), 1.0)

    def scale(updates: Any, params: Any = None) -> Any:
        return jax.tree.map(adapt, updates, params, patterns.path_tree(params), patterns.map_paths(adapt_rules, params))

    return optax.stateless(scale)


@dataclasses.dataclass(frozen=True)
class LambOptions:
    """LAMB: Adam with each layer's update scaled to the norm of its weights (You et al. 2020, arXiv 1904.00962)."""

    beta1: float = 0.9  # decay of the first moment
    beta2: float = 0.999  # decay of the second moment
    epsilon: float = 1e-6  # added to the root of the second moment
    weight_decay: float = 0.01  # times the parameter, added to Adam's update before scaling
    decay_rules: tuple[tuple[str, bool], ...] = NO_DECAY  # which parameters decay
    adapt_rules: tuple[tuple[str, bool], ...] = (
        # (regex over the path, whether to scale the update to the parameter's norm), as in the published code
        (r"(.*/)?[^/]*(bias|scale|norm)[^/]*(/.*)?", False),
        (r".*", True),
    )
    rate_rules: tuple[tuple[str, float], ...] = ShampooOptions.rate_rules  # factors of the learning rate

    def build(self, learning_rate: optax.Schedule, *, axis_names: Any = None, **layout: Any):
        """Return the optimizer; `axis_names` mark layers stacked in one parameter."""
        del layout
        return optax.chain(
            optax.scale_by_adam(b1=self.beta1, b2=self.beta2, eps=self.epsilon),
            optax.add_decayed_weights(self.weight_decay, partial(patterns.map_paths, self.decay_rules)),
            scale_by_trust_ratio(self.adapt_rules, axis_names),
            optax.scale_by_learning_rate(learning_rate),
            scale_by_rules(self.rate_rules),
        )


@dataclasses.dataclass(frozen=True)
class MomentumOptions:
    """Stochastic gradient descent with momentum and coupled weight decay."""

    momentum: float = 0.9  # heavy-ball decay
    nesterov: bool = True  # look one step ahead along the momentum
    weight_decay: float = 0.0  # added to the gradient
    decay_rules: tuple[tuple[str, bool], ...] = NO_DECAY  # which parameters decay

    def build(self, learning_rate: optax.Schedule, **layout: Any):
        """Return the optimizer; `layout` is ignored."""
        del layout
        return optax.chain(
            optax.add_decayed_weights(self.weight_decay, partial(patterns.map_paths, self.decay_rules)),
            optax.sgd(learning_rate, momentum=self.momentum, nesterov=self.nesterov),
        )


@dataclasses.dataclass(frozen=True)
class MuonOptions:
    """Muon (Jordan 2024) for matrices, Adam for parameters under diagonal treatment."""

    beta: float = 0.95  # decay of the momentum that is orthogonalised
    nesterov: bool = True  # look one step ahead along the momentum
    beta1: float = 0.9  # Adam's, for diagonal parameters
    beta2: float = 0.99  # Adam's, for diagonal parameters
    weight_decay: float = 0.0  # decoupled
    decay_rules: tuple[tuple[str, bool], ...] = NO_DECAY  # which parameters decay
    treatments: tuple[tuple[str, str], ...] = ShampooOptions.treatments  # "diagonal" and "rows" mean Adam
    rate_rules: tuple[tuple[str, float], ...] = ShampooOptions.rate_rules  # factors of the learning rate
    wider: float = ShampooOptions.wider  # as for Shampoo; Muon's rate serves all widths, its decay is divided

    def build(self, learning_rate: optax.Schedule, *, axis_names: Any = None, **layout: Any):
        """Return the optimizer; `axis_names` define the sides of matrices, as for Shampoo."""
        del layout
        muon = optax.contrib.muon(
            learning_rate,
            beta=self.beta,
            nesterov=self.nesterov,
            weight_decay=self.weight_decay / self.wider,
            weight_decay_mask=partial(patterns.map_paths, self.decay_rules),
            adam_b1=self.beta1,
            adam_b2=self.beta2,
            muon_weight_dimension_numbers=partial(_sides, axis_names=axis_names, treatments=self.treatments),
        )
        return optax.chain(muon, scale_by_rules(self.rate_rules))


@dataclasses.dataclass(frozen=True)
class AdaGradOptions:
    """AdaGrad (Duchi et al. 2011) with sums that begin at zero, row-wise for embedding tables as is usual for DLRM.

    It is Distributed Shampoo with diagonal treatment only, and shards its state in the same way.
    """

    epsilon: float = 1e-8  # added to the root of the sum of squares
    weight_decay: float = 0.0  # parameters shrink by learning rate x weight decay
    decay_rules: tuple[tuple[str, bool], ...] = NO_DECAY  # which parameters decay
    rate_rules: tuple[tuple[str, float], ...] = ShampooOptions.rate_rules  # factors of the learning rate
    row_rules: tuple[tuple[str, bool], ...] = (
        # (regex over the path, whether to keep one sum per row instead of per element), first match wins
        (r"(.*/)?[^/]*embed[^/]*(/.*)?", True),
        (r".*", False),
    )

    def build(self, learning_rate: optax.Schedule, **layout: Any):
        """Return the optimizer for parameters with the given mesh, axis names and specs."""
        return ShampooOptions(
            treatments=tuple((pattern, "rows" if by_row else "diagonal") for pattern, by_row in self.row_rules),
            graft="adagrad",
            diagonal="adagrad",
            beta1=0.0,
            beta2=1.0,
            epsilon=self.epsilon,
            weight_decay=self.weight_decay,
            decay_rules=self.decay_rules,
            rate_rules=self.rate_rules,
        ).build(learning_rate, **layout)
