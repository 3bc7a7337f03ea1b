"""Options of Distributed Shampoo, validated at construction."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from jax.core import Tracer

from .diagonal import GRAFTS, METHODS, Rule
from .preconditioners import PRECONDITIONERS, Preconditioner
from .preconditioners.shampoo import SOLVERS

DIAGONAL_KINDS = ("diagonal", "rows")
KINDS = (*PRECONDITIONERS, *DIAGONAL_KINDS)
DTYPES = ("float32", "bfloat16")

# Values of options, and of words of treatments, that are names.
_CHOICES = {
    "side": ("both", "left", "right", "short"),
    "view": ("matrix", "tensor"),
    "solver": SOLVERS,
    "refresh": ("staggered", "host"),
    "graft": GRAFTS,
    "diagonal": METHODS,
    "momentum": ("ema", "heavy_ball"),
    "decay": ("decoupled", "coupled"),
    "roots_dtype": DTYPES,
    "momentum_dtype": DTYPES,
    "precision": ("auto", "float32"),
}
# Default last step with the shortest interval.
_EARLY = 10
# What names of methods with an average of squares begin with.
_AVERAGES = ("adam", "rmsprop")
# Smallest and largest values. An interval costs memory on every device, a worker on the host.
_BOUNDS = {
    **dict.fromkeys(("beta1", "beta2", "diagonal_beta1", "diagonal_beta2"), (0, 1)),
    **dict.fromkeys(("block_size", "max_failures"), (1, math.inf)),
    **dict.fromkeys(
        ("ridge", "cut", "epsilon", "weight_decay", "start_step", "merge_dims", "delay", "stack", "diagonal_rate"),
        (0, math.inf),
    ),
    "interval": (1, 10_000),
    "phases": (0, 10_000),
    "host_workers": (0, 1_024),
    "orthogonalize": (0, 10),
}


def _check(values: Mapping[str, Any]) -> None:
    """Raise ValueError if one of the options or words of a treatment has an invalid value."""
    for name, value in values.items():
        if name in _CHOICES and value not in _CHOICES[name]:
            raise ValueError(f"{name}={value!r}: must be one of {', '.join(_CHOICES[name])}.")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name}={value}: must be finite.")
        if name in _BOUNDS and value is not None:
            least, most = _BOUNDS[name]
            if value < least:
                raise ValueError(f"{name}={value}: must be at least {least}.")
            if value > most:
                raise ValueError(f"{name}={value}: must be at most {most:,}.")


@dataclasses.dataclass(frozen=True)
class Treatment:
    """Treatment of a group of parameters, parsed by `Options.treatment` from text such as "shampoo block_size=512".

    Attributes:
      kind: a preconditioner ("shampoo", "one_sided", "soap", ...), "diagonal" (the method of the option `diagonal`) or
        "rows" (row-wise AdaGrad, for large tables that are looked up).
      side: the preconditioned sides of a matrix: "both", "left" (the axes that come first), "right" or "short" (the
        shorter of the two).
      view: "matrix" or "tensor".
      block_size: largest side of a block.
      exponent: inverse power of the statistics of each side; None for 1 / (2 x sides), 0 for no preconditioning.
      ridge, cut: regularisers relative to the largest eigenvalue; setting one sets the other to 0.
      beta2: decay of the statistics and of the graft's second moment, or of the diagonal method's.
      orthogonalize: number of Newton-Schulz steps on the preconditioned direction.
      stack: number of leading axes that stack matrices, for parameters without axis names.

    Raises:
      ValueError: a value is out of range, or two values conflict.
    """

    kind: str
    side: str
    view: str
    block_size: int
    exponent: float | None
    ridge: float
    cut: float
    beta2: float
    orthogonalize: int
    stack: int = 0

    def __post_init__(self):
        _check(vars(self))
        if self.ridge > 0 and self.cut > 0:
            raise ValueError(f"ridge={self.ridge} and cut={self.cut}: only one may be set. Set the other to 0.")

    @property
    def preconditioner(self) -> Preconditioner | None:
        """Return the preconditioner, or None for diagonal kinds."""
        return PRECONDITIONERS.get(self.kind)

    def order(self, sides: int) -> int:
        """Return the order p of the inverse roots for `sides` preconditioned sides, or 0 for no preconditioning.

        Raises:
          ValueError: the exponent is neither 0 nor 1/p for a whole p.
        """
        assert self.preconditioner
        if self.preconditioner.p is not None or self.exponent == 0:
            return self.preconditioner.p or 0
        exponent = 1 / (2 * sides) if self.exponent is None else self.exponent
        p = max(1, round(1 / exponent)) if exponent > 1e-9 else 1  # 1 / exponent may overflow
        if not abs(p * exponent - 1) <= 1e-5:
            raise ValueError(f"exponent={exponent}: must be 0 or 1/p for a whole p. Use 1/{p} = {1 / p:.6g}.")
        return p


# Types of the words of a treatment.
_WORDS: dict[str, Any] = {
    "side": str,
    "view": str,
    "block_size": int,
    "exponent": float,
    "ridge": float,
    "cut": float,
    "beta2": float,
    "orthogonalize": int,
    "stack": int,
}
# Words that default to the option of the same name.
_OVERRIDES = ("view", "block_size", "exponent", "ridge", "cut", "beta2", "orthogonalize")


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of Distributed Shampoo. The defaults are measured; most users set only the learning rate.

    docs/optimizer.md gives the formulas and the names of these options in other implementations.
    """

    # Blocks and treatments
    block_size: int = 1024  # largest side of a block; a longer side is cut into equal parts
    view: str = "matrix"  # "matrix" (axes fold into two sides) or "tensor" (every axis is a side)
    merge_dims: int = 0  # in the tensor view, adjacent axes merge while their product is at most this
    treatments: tuple[tuple[str, str], ...] = (
        # (regex over the path, treatment), first match wins; vectors and scalars are always diagonal
        (r"(.*/)?[^/]*embed[^/]*(/.*)?", "diagonal"),
        (r".*", "shampoo"),
    )
    stack_axes: tuple[str, ...] = ("layers", "experts")  # names of axes that stack matrices
    fold_axes: tuple[str, ...] = ("heads", "kv_heads", "kv", "head_dim")  # adjacent axes that fold into one side

    # Statistics and their roots
    beta2: float = 0.95  # decay of the statistics and of the graft's second moment; 1.0 sums, as in AdaGrad
    exponent: float | None = 0.5  # inverse power of each side; None: 1 / (2 x sides); 0: no preconditioning
    ridge: float = 1e-4  # added to the statistics before the root, relative to the largest eigenvalue
    cut: float = 0.0  # drop eigenvalues below this share of the largest; needs ridge 0 and eigh or host
    solver: str = "newton"  # "newton" (matmuls only) or "eigh", both on the owner's device
    residual_bound: float = 0.1  # largest residual of an accepted root
    max_failures: int = 3  # rejected refreshes in a row after which a block uses the graft method
    orthogonalize: int = 3  # Newton-Schulz steps on each preconditioned matrix, which undo what old roots miss; 0: none

    # Refresh schedule
    refresh: str = "staggered"  # "staggered": the step computes roots; "host": the CPUs do, while the devices continue
    interval: int = 20  # steps between two refreshes of a block's roots
    phases: int = 0  # steps of an interval with refreshes, each of a share of the blocks; 0: blocks / devices
    delay: int = 2  # with "host": roots of the statistics of step t are used from step t + 1 + delay
    host_workers: int = 0  # with "host": solver threads per process; 0: one fewer than the cores, at least 1
    early_intervals: tuple[tuple[int, int], ...] | None = None  # pairs (last step, interval); None: shortest to step 10
    start_step: int = 0  # first step that uses roots; the graft method acts before

    # Grafting
    # "none" is unstable unless the interval is 1 or the ridge large.
    graft: str = "adam"  # none, sgd, adagrad, rmsprop, adam, or one of the last three with "_normalized"
    epsilon: float = 1e-8  # in the denominator of the graft and the diagonal method, absolute

    # Embeddings, norms, biases and all else under diagonal treatment
    diagonal: str = "adam"  # their method, whatever the graft: one of the grafts, except none
    diagonal_rate: float = 1.0  # factor of their learning rate
    diagonal_beta1: float | None = None  # decay of their momentum; None: as beta1
    diagonal_beta2: float | None = None  # decay of their second moment; None: as beta2
    diagonal_nesterov: bool | None = None  # look one step ahead along their momentum; None: as nesterov

    # Momentum and weight decay
    beta1: float = 0.9  # decay of the momentum, computed before preconditioning; 0: no momentum
    momentum: str = "ema"  # "ema" (beta1 M + (1 - beta1) G) or "heavy_ball" (beta1 M + G)
    nesterov: bool = True  # look one step ahead along the momentum
    weight_decay: float = 0.0  # "decoupled": parameters shrink by learning rate x weight decay
    decay: str = "decoupled"  # or "coupled" (weight decay x parameter is added to the gradient)
    decay_rules: tuple[tuple[str, bool], ...] = (
        # (regex over the path, whether weight decay applies), first match wins
        (r"(.*/)?[^/]*(bias|scale|norm|embed)[^/]*(/.*)?", False),
        (r".*", True),
    )

    rate_rules: tuple[tuple[str, float], ...] = (
        # (regex over the path, factor of the learning rate), first match wins
        (r".*", 1.0),
    )
    wider: float = 1.0  # times that the model is wider than the one for which the rate was tuned; see plan/width.py

    precision: str = "auto"  # of products on accelerators: as each needs (docs/optimizer.md), or "float32"

    # Storage of the state
    roots_dtype: str = "float32"  # or "bfloat16"
    momentum_dtype: str = "float32"  # or "bfloat16"

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if isinstance(getattr(self, field.name), Tracer):
                raise ValueError(f"{field.name} is traced: options are constants. Inject only the learning rate.")
        _check(vars(self))
        self._check_combinations()
        for pattern, _ in (*self.treatments, *self.decay_rules, *self.rate_rules):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r}: invalid regex: {error}. Escape special characters.") from None
        for pattern, factor in self.rate_rules:
            if not 0 <= factor < math.inf:
                raise ValueError(
                    f"rate_rules[{pattern!r}]={factor}: must be finite and not negative. Use 1 to keep the rate."
                )
        for treatment in [self.treatment(text) for _, text in self.treatments]:
            if not treatment.preconditioner:
                continue
            treatment.order(2)
            newton = self.solver == "newton" and self.refresh != "host" and treatment.preconditioner.p is None
            if treatment.cut and newton:
                raise ValueError(f"cut={treatment.cut}: solver 'newton' needs a ridge. Use solver 'eigh' or set ridge.")

    def _check_combinations(self) -> None:
        if self.phases > self.interval:
            raise ValueError(f"phases={self.phases}: must be at most interval={self.interval}.")
        for name in ("beta1", "diagonal_beta1"):
            if getattr(self, name) == 1:
                raise ValueError(f"{name}=1.0: must be below 1, or gradients have no effect. Use 0.9.")
        for name, rule in (("graft", self.of_graft), ("diagonal", self.of_diagonal)):
            if rule.method.has_second_moment and self.epsilon == 0:
                raise ValueError(f"epsilon=0: must be positive, or {name} {rule.name!r} divides 0 by 0. Use 1e-8.")
        if not self.wider > 0:
            raise ValueError(f"wider={self.wider}: must be positive. Use width / width of the tuned model.")
        before = 0
        for last, interval in self.early:
            if last <= before:
                raise ValueError(f"early_intervals={self.early_intervals}: last steps must increase and be positive.")
            if interval < 1 or self.interval % interval:
                divisors = [str(d) for d in range(1, self.interval + 1) if self.interval % d == 0]
                raise ValueError(
                    f"early_intervals={self.early_intervals}: {interval} must divide interval={self.interval}. "
                    f"Use one of {', '.join(divisors)}."
                )
            before = last
        shortest = min([self.interval, *[interval for _, interval in self.early]])
        if self.refresh == "host" and self.delay >= shortest:
            raise ValueError(
                f"delay={self.delay}: must be less than the shortest interval, {shortest}. Use a delay of at most "
                f"{shortest - 1}, or intervals of at least {self.delay + 1}."
            )

    @property
    def early(self) -> tuple[tuple[int, int], ...]:
        """Return `early_intervals`, or its default: the shortest interval that the schedule allows, up to step 10."""
        if self.early_intervals is not None:
            return self.early_intervals
        least = self.delay + 1 if self.refresh == "host" else 1
        shortest = next((k for k in range(least, self.interval) if self.interval % k == 0), self.interval)
        return ((_EARLY, shortest),) if shortest < self.interval else ()

    @property
    def of_graft(self) -> Rule:
        """Return the graft method; blocks without a graft use plain momentum before their first roots."""
        return self._rule("sgd" if self.graft == "none" else self.graft, self.beta1, self.nesterov)

    @property
    def of_diagonal(self) -> Rule:
        """Return the method of parameters under diagonal treatment."""
        return self._rule(
            self.diagonal,
            self.beta1 if self.diagonal_beta1 is None else self.diagonal_beta1,
            self.nesterov if self.diagonal_nesterov is None else self.diagonal_nesterov,
        )

    def _rule(self, name: str, beta1: float, nesterov: bool) -> Rule:
        return Rule(name, beta1, nesterov, self.momentum, self.momentum_dtype, self.epsilon)

    def diagonal_beta2_of(self, treatment: "Treatment") -> float:
        """Return the decay of the second moment of a diagonal parameter, whose treatment may be a preconditioner."""
        beta2 = self.diagonal_beta2
        return treatment.beta2 if treatment.kind == "diagonal" or beta2 is None else beta2

    def treatment(self, text: str) -> Treatment:
        """Parse a kind followed by key=value words; other values come from the options.

        Raises:
          ValueError: an unknown kind or key, or a value of the wrong type or out of range.
        """
        kind, *words = text.split() or [""]
        if kind not in KINDS:
            raise ValueError(f"treatment {text!r}: must begin with one of {', '.join(KINDS)}.")
        own: dict[str, Any] = {}
        for word in words:
            key, _, value = word.partition("=")
            if key not in _WORDS:
                raise ValueError(f"treatment {text!r}: {key!r} is unknown. Use {', '.join(_WORDS)} as key=value.")
            try:
                own[key] = _WORDS[key](value)
            except ValueError:
                raise ValueError(f"treatment {text!r}: {key} needs a {_WORDS[key].__name__}, not {value!r}.") from None
        family = PRECONDITIONERS.get(kind)
        if "side" in own and not family:
            raise ValueError(f"treatment {text!r}: only preconditioners have a side. Leave it out.")
        if "exponent" in own and family and family.p is not None:
            raise ValueError(f"treatment {text!r}: {kind} has a fixed exponent. Leave it out.")
        if "orthogonalize" in own and family and family.orthogonal:
            raise ValueError(f"treatment {text!r}: {kind} always orthogonalizes. Leave it out.")
        if own and kind == "rows":
            raise ValueError(f"treatment {text!r}: rows take no further words. Write 'rows' alone.")
        values: dict[str, Any] = {name: getattr(self, name) for name in _OVERRIDES}
        values["side"] = family.side if family else "both"
        if kind == "diagonal" and self.diagonal_beta2 is not None:
            values["beta2"] = self.diagonal_beta2
        if "ridge" in own or "cut" in own:
            values |= {"ridge": 0.0, "cut": 0.0}
        try:
            treatment = Treatment(kind, **(values | own))
        except ValueError as error:
            raise ValueError(f"treatment {text!r}: {error}" if own else str(error)) from None
        if own.get("view") == "tensor" and family and (family.matrices_only or treatment.side != "both"):
            raise ValueError(f"treatment {text!r}: this treatment is for matrices. Leave view=tensor out.")
        if treatment.view == "tensor" and family:
            if own.get("orthogonalize"):
                raise ValueError(f"treatment {text!r}: orthogonalize is for matrices, not view=tensor. Leave one out.")
            treatment = dataclasses.replace(treatment, orthogonalize=0)
        if family and treatment.beta2 == 1 and self.graft.startswith(_AVERAGES):
            raise ValueError(f"beta2=1.0: graft {self.graft!r} averages second moments. Use graft 'adagrad' for sums.")
        if self.diagonal_beta2_of(treatment) == 1 and self.diagonal.startswith(_AVERAGES):
            raise ValueError(
                f"beta2=1.0: diagonal {self.diagonal!r} averages second moments. Use a diagonal_beta2 below 1, or "
                "diagonal 'adagrad' for sums."
            )
        return treatment
