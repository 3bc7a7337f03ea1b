"""What a user of Distributed Shampoo may choose, validated at construction."""

import dataclasses
import re
from typing import Any

import jax
import optax

from .grafting import DIAGONALS
from .roots import SOLVERS

KINDS = ("shampoo", "one_sided", "diagonal")


@dataclasses.dataclass(frozen=True)
class Treatment:
    """How one group of parameters is treated; parsed from text such as "shampoo block_size=512 exponent=0.5".

    Attributes:
      kind: "shampoo" (both sides), "one_sided" (the smaller side only) or "diagonal" (the graft method alone).
      block_size: largest side of a block; 0 takes the options' block size.
      exponent: the power each side is raised to is -exponent; 0 takes the options' exponent.
      stack: number of leading axes that are stacks of matrices where no axis names are given.
    """

    kind: str = "shampoo"
    block_size: int = 0
    exponent: float = 0.0
    stack: int = 0

    def __post_init__(self):
        if min(self.block_size, self.exponent, self.stack) < 0:
            raise ValueError(
                f"a treatment has block_size {self.block_size}, exponent {self.exponent}, stack {self.stack}; "
                "none may be negative"
            )

    @classmethod
    def parse(cls, text: str) -> "Treatment":
        """Parse a kind followed by key=value words.

        Raises:
          ValueError: an unknown kind, an unknown key or a value of the wrong type, with what is allowed.
        """
        kind, *words = text.split() or [""]
        if kind not in KINDS:
            raise ValueError(f"treatment {text!r} must begin with one of {', '.join(KINDS)}")
        types = {"block_size": int, "exponent": float, "stack": int}
        values: dict[str, Any] = {}
        for word in words:
            key, _, value = word.partition("=")
            if key not in types:
                raise ValueError(f"treatment {text!r} sets {key!r}; it may set {', '.join(types)} as key=value")
            try:
                values[key] = types[key](value)
            except ValueError:
                raise ValueError(f"treatment {text!r}: {key} needs a {types[key].__name__}, not {value!r}") from None
        return cls(kind, **values)


@dataclasses.dataclass(frozen=True)
class ShampooOptions:
    """Options of Distributed Shampoo; a user who sets only the learning rate gets the measured defaults.

    The comment beside each attribute describes it.
    """

    block_size: int = 1024  # largest side of a block; a longer side is cut into equal parts
    treatments: tuple[tuple[str, str], ...] = (
        # (regex over the path, treatment), first match wins; vectors and scalars are always diagonal
        (r"(.*/)?[^/]*embed[^/]*(/.*)?", "diagonal"),
        (r".*", "shampoo"),
    )
    stack_axes: tuple[str, ...] = ("layers", "experts")  # axis names that stack matrices and are never mixed with them
    fold_axes: tuple[str, ...] = ("heads", "kv_heads", "kv", "head_dim")  # neighbours among these fold into one side
    beta2: float = 0.99  # decay of the statistics and of the graft's second moment; 1.0 sums, as AdaGrad
    exponent: float = 0.0  # each side's inverse power; 0 means 1 / (2 x preconditioned sides)
    ridge: float = 1e-6  # relative to the largest eigenvalue, added before the root is taken
    cut: float = 0.0  # relative; with it, eigen-directions below contribute nothing, and ridge must be 0
    solver: str = "newton"  # "newton" (matmuls only) or "eigh", both on the owner's device
    refresh: str = "staggered"  # "staggered" (a share of the blocks each step) or "periodic" (all every interval)
    interval: int = 20  # steps from one refresh of a block's roots to the next
    residual_bound: float = 0.5  # a root is accepted with max |X^p A - I| at most this
    max_failures: int = 3  # refused refreshes in a row after which a block uses the graft method until one succeeds
    graft: str = "adam"  # "none" or a diagonal method: adam, rmsprop, adagrad, sgd, sign
    graft_norm: str = "parameter"  # the norm is taken over the "parameter" (each matrix of a stack) or the "block"
    epsilon: float = 1e-8  # of the diagonal method, absolute
    beta1: float = 0.9  # decay of the momentum, which is taken before preconditioning; 0 turns it off
    nesterov: bool = False  # look one step ahead along the momentum
    weight_decay: float = 0.0  # decoupled: parameters shrink by learning rate x weight decay
    decay_rules: tuple[tuple[str, bool], ...] = (
        # (regex over the path, whether weight decay applies), first match wins
        (r"(.*/)?[^/]*(bias|scale|norm|embed)[^/]*(/.*)?", False),
        (r".*", True),
    )

    def __post_init__(self):
        for name, low, high in (("beta1", 0.0, 1.0), ("beta2", 0.0, 1.0)):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"{name} is {value}; it must lie between {low} and {high}")
        if self.beta1 == 1:
            raise ValueError("beta1 is 1.0, so no gradient would ever count; use a value below 1, such as 0.9")
        for name in ("block_size", "interval", "max_failures"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("ridge", "cut", "epsilon", "weight_decay", "exponent"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be negative")
        if self.ridge > 0 and self.cut > 0:
            raise ValueError(f"ridge {self.ridge} and cut {self.cut} are both set; set one of them to 0")
        if self.beta2 == 1 and self.graft in ("adam", "rmsprop"):
            raise ValueError(
                f"beta2 1.0 sums second moments but graft {self.graft!r} averages them; use graft 'adagrad'"
            )
        device_solvers = [name for name in SOLVERS if name != "host"]
        for name, allowed in (
            ("solver", device_solvers),
            ("refresh", ["staggered", "periodic"]),
            ("graft", ["none", *DIAGONALS]),
            ("graft_norm", ["parameter", "block"]),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(allowed)}")
        if self.diagonal.has_second_moment and self.epsilon == 0:
            raise ValueError(f"epsilon is 0, so graft {self.graft!r} divides 0 by 0 where no gradient was; use 1e-8")
        for pattern, _ in (*self.treatments, *self.decay_rules):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
        for _, text in self.treatments:
            treatment = Treatment.parse(text)
            for sides in (1, 2):
                self.root_order(treatment, sides)

    @property
    def diagonal(self):
        """The diagonal method; without grafting, diagonal parameters use plain momentum."""
        return DIAGONALS["sgd" if self.graft == "none" else self.graft]

    def root_order(self, treatment: Treatment, sides: int) -> int:
        """The p of each side's inverse p-th root.

        Raises:
          ValueError: the exponent is not one over a whole number.
        """
        exponent = treatment.exponent or self.exponent or 1 / (2 * sides)
        p = max(1, round(1 / exponent))
        if abs(p * exponent - 1) > 1e-6:
            raise ValueError(f"exponent {exponent} is not 1/p for a whole p; the nearest is 1/{p} = {1 / p:.6g}")
        return p

    def build(
        self,
        learning_rate: float | optax.Schedule,
        *,
        mesh: jax.sharding.Mesh | None = None,
        axis_names: Any = None,
    ) -> optax.GradientTransformation:
        """The optimizer; see `distributed_shampoo`."""
        from .shampoo import distributed_shampoo

        return distributed_shampoo(learning_rate, self, mesh=mesh, axis_names=axis_names)
