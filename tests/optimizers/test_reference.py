"""Every option that changes the mathematics: the optimizer against its float64 reference over 50 steps.

The fast tier takes a few steps of the cases that together have every option.
"""

import contextlib
import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import shampoo_reference as reference
from optimizing import PLAIN

from shampax.framework.optimizer import service
from shampax.optimizers import ShampooOptions, distributed_shampoo

STEPS = 50
# Small blocks for small arrays, an interval shorter than the run, and a ridge that float32 resolves.
BASE = PLAIN | {"block_size": 16, "interval": 4, "early_intervals": (), "exponent": None, "ridge": 1e-4}
TREE = {"dense": {"bias": (21,), "kernel": (33, 21)}, "wide": (11, 33)}
FAMILY = {"a": (33, 21), "b": (14, 40), "w": (16, 14)}
STACK = {"layers": (3, 20, 12), "vectors": (3, 12)}


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A tree of shapes under some options.

    Attributes:
      options: differences to BASE and the defaults; each must matter.
      shapes: nested dicts of shapes.
      names: nested dicts of axis names.
      rate: learning rate or schedule.
      noise: gradients are of rank three plus this much noise.
      late: the first rows of every gradient are zero up to this step.
      tolerance: largest distance from the reference, relative to the distance it moved.
      margin: minimum effect of each option on a parameter, as a multiple of the tolerance.
      inert: options and treatment words that must have no effect.
      brief: steps in the fast tier; 0 if other cases have the same options.
      part: names of the shapes that the fast tier keeps, all by default.
    """

    options: dict[str, Any]
    shapes: dict[str, Any] = dataclasses.field(default_factory=lambda: TREE)
    names: dict[str, Any] | None = None
    rate: Any = 0.01
    noise: float = 1.0
    late: int = 0
    tolerance: float = 2e-4
    margin: float = 20.0
    inert: tuple[str, ...] = ("solver",)
    brief: int = 0
    part: tuple[str, ...] = ()


def rules(**treatments):
    return tuple((f"{path}.*", text) for path, text in treatments.items())


CASES = {
    "defaults": Case(
        {"orthogonalize": 3, "nesterov": True, "beta2": 0.95, "exponent": 0.5},
        TREE | {"odd": (3, 1, 20), "scalar": (), "empty": (0, 4), "row": (1, 9)},
        brief=8,
        part=("dense", "wide", "scalar", "empty", "row"),
    ),
    "learning rate schedule": Case({}, rate=lambda step: 0.1 * 0.8**step),
    # Momentum, weight decay and step numbers
    "nesterov, decay with one path exempt": Case(
        {
            "nesterov": True,
            "weight_decay": 0.3,
            "decay_rules": ((r"wid", True), (r"wide", False), (r".*", True)),
        },
        brief=8,
    ),
    "coupled decay": Case({"weight_decay": 0.3, "decay": "coupled", "beta1": 0.8}),
    "coupled decay before normalising": Case(
        {"weight_decay": 0.3, "decay": "coupled", "graft": "adagrad_normalized"}, brief=8
    ),
    "heavy ball": Case({"momentum": "heavy_ball", "weight_decay": 0.3}),
    "heavy ball, nesterov, sgd": Case(
        {"momentum": "heavy_ball", "nesterov": True, "graft": "sgd", "beta1": 0.8}, brief=8
    ),
    "diagonal parameters on their own": Case(
        {
            "diagonal": "rmsprop_normalized",
            "diagonal_rate": 0.5,
            "diagonal_beta1": 0.5,
            "diagonal_beta2": 0.9,
            "diagonal_nesterov": True,
            "treatments": rules(dense="shampoo", table="diagonal beta2=0.8"),
        },
        {"dense": TREE["dense"], "table": (11, 3)},
        brief=8,
    ),
    "no momentum but for diagonal parameters": Case({"beta1": 0.0, "diagonal_beta1": 0.8, "graft": "sgd"}),
    "no momentum, rmsprop, epsilon": Case({"beta1": 0.0, "graft": "rmsprop", "epsilon": 0.3}, brief=8),
    # Statistics, roots and their schedule
    "sum, adagrad, one phase": Case(
        {"beta2": 1.0, "graft": "adagrad", "diagonal": "adagrad", "phases": 1, "epsilon": 0.3}
    ),
    "sum, no graft, uneven early intervals": Case(
        {
            "beta2": 1.0,
            "graft": "none",
            "diagonal": "sgd",
            "ridge": 1e-2,
            "phases": 1,
            "early_intervals": ((2, 2), (5, 1)),
        },
        brief=8,
    ),
    "exponent 1/2, no graft": Case({"exponent": 0.5, "graft": "none", "ridge": 1e-2, "nesterov": True}),
    "exponent 1/3": Case({"exponent": 1 / 3}, brief=8),
    "exponent 0, start step": Case({"exponent": 0.0, "graft": "adagrad", "start_step": 5}, brief=8),
    "early intervals": Case({"early_intervals": ((4, 1), (12, 2)), "beta2": 0.9}),
    "early intervals, one phase": Case({"early_intervals": ((4, 1), (12, 2)), "phases": 1, "start_step": 5}),
    "cut": Case({"ridge": 0.0, "cut": 1e-3, "solver": "eigh"}, noise=1e-3, brief=8),
    "cut, eigh, no graft": Case({"ridge": 0.0, "cut": 1e-2, "solver": "eigh", "graft": "none"}, noise=1e-3),
    "host": Case(
        {"refresh": "host", "interval": 6, "delay": 3, "host_workers": 2}, inert=("solver", "host_workers"), brief=12
    ),
    "host, no delay, cut": Case(
        {"refresh": "host", "interval": 6, "delay": 0, "ridge": 0.0, "cut": 1e-2},
        noise=1e-3,
        inert=("solver", "refresh"),
    ),
    "host, early intervals, start step, no graft": Case(
        {
            "refresh": "host",
            "interval": 12,
            "early_intervals": ((9, 4),),
            "delay": 3,
            "start_step": 8,
            "graft": "none",
            "ridge": 1e-2,
        }
    ),
    "eigh, exponent 1/2, uneven early intervals": Case(
        {"solver": "eigh", "early_intervals": ((2, 1), (5, 2)), "exponent": 0.5, "ridge": 1e-2}, brief=8
    ),
    # The update's length
    "adam_normalized": Case(
        {"graft": "adam_normalized"}, STACK, names={"layers": ("layers", "a", "b"), "vectors": ("layers", "a")}
    ),
    "rmsprop_normalized": Case({"graft": "rmsprop_normalized", "beta2": 0.9}, late=9),
    "adagrad_normalized": Case(
        {"graft": "adagrad_normalized", "treatments": rules(layers="shampoo stack=1", vectors="shampoo stack=1")}, STACK
    ),
    "adagrad_normalized, exponent 0": Case(
        {"graft": "adagrad_normalized", "exponent": 0.0, "beta1": 0.0, "start_step": 20}
    ),
    # What is preconditioned
    "one-sided": Case(
        {
            "treatments": rules(left="one_sided side=left", right="one_sided side=right", short="one_sided"),
            "solver": "eigh",
        },
        {"left": (33, 21), "right": (2, 10, 40), "short": {"square": (22, 22), "tall": (33, 21)}},
        brief=8,
        part=("right",),
    ),
    "one-sided, exponent 1, no graft": Case(
        {"treatments": rules(a="one_sided side=left exponent=1"), "graft": "none", "ridge": 1e-2},
        {"a": {"square": (16, 16), "tall": (33, 21)}},
    ),
    "tensors": Case({"view": "tensor"}, {"conv": (3, 3, 8, 12), "flat": (1, 20, 12)}),
    "tensors, no graft": Case({"view": "tensor", "graft": "none", "ridge": 1e-2}, {"cube": (5, 18, 10)}),
    "tensors with merged sides": Case(
        {"view": "tensor", "merge_dims": 24},
        {"deep": (13, 2, 3, 4, 5), "flat": (2, 2, 1, 6), "small": (2, 3, 4)},
        brief=8,
        part=("deep",),
    ),
    "rules": Case(
        {
            "treatments": rules(
                a="shampoo block_size=8 exponent=0.5 ridge=1e-2",
                b="shampoo beta2=0.9",
                c="diagonal beta2=0.9",
                d="shampoo exponent=0",
                e="shampoo view=tensor beta2=0.9 stack=1",
                f="one_sided side=right block_size=24 stack=1",
            )
        },
        {
            "a": (16, 24),
            "b": (16, 14),
            "c": (16, 14),
            "d": (16, 14),
            "e": {"bias": (9,), "kernel": (2, 4, 6, 8)},
            "f": (2, 20, 24),
        },
        noise=1e-2,
        brief=8,
        part=("a", "b", "c"),
    ),
    "rows beside blocks": Case(
        {
            "treatments": rules(cube="rows", table="rows", vector="rows", w="shampoo"),
            "epsilon": 0.3,
            "weight_decay": 0.3,
            "decay": "coupled",
        },
        {"cube": (2, 6, 5), "table": (40, 6), "vector": (7,), "w": (16, 14)},
        late=9,
        brief=12,
    ),
    "rows, decoupled decay, normalized graft": Case(
        {"treatments": rules(table="rows", w="shampoo"), "weight_decay": 0.3, "graft": "adam_normalized"},
        {"table": (40, 6), "w": (16, 14)},
    ),
    "axis names": Case(
        {"stack_axes": ("experts", "scan"), "fold_axes": ("heads", "width")},
        {"key": (12, 2, 3, 8), "layers": (4, 3, 24), "mixed": (12, 2, 12), "out": (2, 12, 4, 6), "scalars": (2, 3)},
        names={
            "key": ("embed", "scan", "heads", "width"),
            "layers": ("layers", None, "mlp"),
            "mixed": ("embed", "experts", "mlp"),
            "out": ("scan", "heads", "a", "b"),
            "scalars": ("scan", "experts"),
        },
        brief=8,
    ),
    "heads": Case(
        {},
        {"key": (12, 4, 6), "out": (4, 6, 12), "qkv": (12, 3, 2, 4), "whole": (4, 3, 12), "mlp": (2, 3, 12, 12)},
        names={
            "key": ("embed", "heads", "head_dim"),
            "out": ("heads", "head_dim", "embed"),
            "qkv": ("embed", "kv", "heads", "head_dim"),
            "whole": ("kv_heads", "heads", "head_dim"),
            "mlp": ("layers", "experts", "embed", "mlp"),
        },
    ),
    # The rest of the family. The first basis needs statistics of full rank, because other eigenvectors are arbitrary.
    "soap": Case(
        {"treatments": rules(a="soap", b="soap side=short", w="shampoo"), "start_step": 16},
        FAMILY,
        brief=20,
        part=("a",),
    ),
    "kl_shampoo": Case(
        {"treatments": rules(a="kl_shampoo", b="kl_shampoo side=short", w="shampoo")}, FAMILY, brief=8, part=("a",)
    ),
    "kl_shampoo of tensors": Case(
        {"treatments": rules(a="kl_shampoo", b="shampoo"), "view": "tensor", "graft": "sgd"},
        {"a": (5, 18, 10), "b": (16, 14)},
    ),
    "muon": Case(
        {"treatments": rules(a="muon", b="muon block_size=40", w="shampoo"), "nesterov": True, "weight_decay": 0.3},
        FAMILY,
        brief=8,
        part=("a", "b"),
    ),
    "orthogonalized": Case(
        {
            "treatments": rules(a="shampoo", b="one_sided orthogonalize=2", k="kl_shampoo", m="muon"),
            "orthogonalize": 3,
            "exponent": 0.5,
            "nesterov": True,
        },
        {"a": (33, 21), "b": (14, 40), "k": (21, 9), "m": (16, 14)},
        brief=8,
        part=("a", "b"),
    ),
    "soap, orthogonalized": Case(
        {"treatments": rules(a="soap orthogonalize=2"), "start_step": 16}, {"a": (33, 21)}, brief=20
    ),
    # Storage. If float32 and float64 are on two sides of a tie, an element differs by 2^-8 of its value.
    "bfloat16 roots": Case(
        {"roots_dtype": "bfloat16", "graft": "sgd", "interval": 16, "exponent": 0.5}, tolerance=5e-4, margin=4, brief=20
    ),
    "bfloat16 momentum": Case({"momentum_dtype": "bfloat16"}, tolerance=5e-4, margin=4, brief=8),
}


@functools.cache
def case_of(name, steps):
    """Return a case for its tier: complete for `STEPS`, or reduced for the fast tier."""
    case = CASES[name]
    if steps == STEPS or not case.part:
        return case
    treatments = case.options.get("treatments", ())
    kept = tuple(rule for rule in treatments if any(re.fullmatch(rule[0], path) for path in case.part))
    return dataclasses.replace(
        case,
        options=case.options | ({"treatments": kept} if treatments else {}),
        shapes={path: case.shapes[path] for path in case.part},
    )


BY_TIER = [
    *(pytest.param(name, case.brief, id=name) for name, case in CASES.items() if case.brief),
    *(pytest.param(name, STEPS, id=f"{name}, {STEPS} steps", marks=pytest.mark.slow) for name in CASES),
]


def tree_of(case, make):
    return jax.tree.map(make, case.shapes, is_leaf=lambda x: isinstance(x, tuple))


@functools.cache
def problem(name, steps):
    """Return (parameters, gradients): anisotropic gradients with a mean, a low-rank part and a varying length."""
    case = case_of(name, steps)
    random = np.random.default_rng(7)

    def stream(shape):
        rows, cols = int(np.prod(shape[:-1])), shape[-1] if shape else 1
        left, right = random.normal(size=(rows, 3)), random.normal(size=(3, cols))
        scale = np.exp(random.normal(size=(rows, 1)) / 2) * np.exp(random.normal(size=(1, cols)) / 2)
        core = 0.3 + random.normal(size=(STEPS, 1, 3))
        g = (left * core) @ right + case.noise * scale * random.normal(size=(STEPS, rows, cols))
        g *= np.exp(random.normal(size=(STEPS, 1, 1)) / 2)
        g[: case.late, : rows // 2] = 0
        return g.reshape(STEPS, *shape).astype(np.float32)

    streams = tree_of(case, stream)
    params = tree_of(case, lambda shape: np.asarray(random.normal(size=shape), np.float32))
    return params, [jax.tree.map(lambda g: g[t], streams) for t in range(steps)]


def options_of(values):
    return ShampooOptions(**(BASE | values))


def wanted(name, steps, **changed):
    case = dataclasses.replace(case_of(name, steps), **changed)
    params, gradients = problem(name, steps)
    return reference.run(params, gradients, options_of(case.options), case.rate, case.names)[-1]


wanted_once = functools.cache(wanted)


def distances(name, steps, now):
    """Return for each parameter its distance from the reference, relative to the distance the reference moved."""
    start, there = reference.flatten(problem(name, steps)[0]), wanted_once(name, steps)
    return {
        path: np.linalg.norm(now[path] - there[path]) / max(np.linalg.norm(there[path] - start[path]), 1e-30)
        for path in there
    }


def ignored(case):
    """Return (ignored option, the case's fields without it) for every option, every treatment word, and the names."""
    options = case.options
    defaults = {field.name: field.default for field in dataclasses.fields(ShampooOptions)}
    for name in options or [name for name in BASE if BASE[name] != defaults[name]]:
        group = {name}
        if name in ("ridge", "cut") and "cut" in options:
            group = {"ridge", "cut"}  # one of the two is 0
        if name == "solver" and "cut" in options:
            continue  # no other solver on the device has one
        if name in ("graft", "diagonal") and options.get("beta2") == 1:
            group = {"graft", "diagonal", "beta2"}  # other methods do not sum
        rest = {k: v for k, v in options.items() if k not in group}
        if name == "refresh" and "cut" in options:
            rest["solver"] = "eigh"  # the solver on the device that has a cut
        yield name, {"options": rest if options else {name: defaults[name]}}
    treatments = options.get("treatments", ())
    for i, (pattern, text) in enumerate(treatments):
        kind, *words = text.split()
        for word in words:
            without = (pattern, " ".join([kind, *(w for w in words if w != word)]))
            rest = (*treatments[:i], without, *treatments[i + 1 :])
            yield word, {"options": options | {"treatments": rest}}
    if case.names is not None:
        yield "names", {"names": None}
    if callable(case.rate):
        yield "schedule", {"rate": case.rate(0)}


@pytest.mark.parametrize(("name", "steps"), BY_TIER)
def test_agrees_with_the_float64_reference(name, steps):
    """Fault: any difference from the algorithm: order of operations, view, schedule, norms, decay, corrections."""
    case = case_of(name, steps)
    params, gradients = problem(name, steps)
    tx = distributed_shampoo(case.rate, options_of(case.options), axis_names=case.names)

    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(jnp.asarray, params)
    with contextlib.closing(service(tx, params)) as host:
        state = host.start(jax.jit(tx.init)(params))
        for grads in gradients:
            params, state = step(params, host.install(state), grads)
            host.take(state)
    far = distances(name, steps, reference.flatten(jax.tree.map(np.asarray, params)))
    assert all(x <= case.tolerance for x in far.values()), far  # NaN is not


@pytest.mark.parametrize(("name", "steps"), BY_TIER)
def test_no_option_can_be_ignored(name, steps):
    """Fault: a case passes although the optimizer ignores one of its options."""
    case = case_of(name, steps)
    for what, changed in ignored(case):
        far = distances(name, steps, wanted(name, steps, **changed))
        if what in case.inert:
            assert max(far.values()) == 0, (what, far)
        else:
            assert max(far.values()) > case.margin * case.tolerance, (what, far)


def test_the_fast_tier_has_every_option():
    """Fault: only the slow tier compares an option with the reference."""
    everywhere = {option for case in CASES.values() for option in case.options}
    assert everywhere == {option for name, case in CASES.items() if case.brief for option in case_of(name, 8).options}
