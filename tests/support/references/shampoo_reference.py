"""Compute Distributed Shampoo in float64 NumPy, one block at a time, as the algorithm is written."""

import dataclasses
import itertools
import math
import re
import types
from typing import Any

import ml_dtypes
import numpy as np

from shampax.optimizers.linalg.polynomials import NEWTON_SCHULZ as POLYNOMIAL
from shampax.optimizers.plan.blocks import split


def inverse_root(a, p, ridge=0.0, cut=0.0):
    """Return V diag(w)^(-1/p) V' with a ridge or a cut relative to the largest eigenvalue."""
    w, v = np.linalg.eigh((a + a.T) / 2)
    w = np.maximum(w, 0)
    if cut:
        kept = w > cut * w[-1]
        return (v * np.where(kept, np.where(kept, w, 1) ** (-1 / p), 0)) @ v.T
    return (v * (w + ridge * w[-1]) ** (-1 / p)) @ v.T


def stored(x, dtype):
    """Return x rounded to a storage dtype."""
    return x.astype(ml_dtypes.bfloat16).astype(np.float64) if dtype == "bfloat16" else x


def ratio(a, b):
    return a / b if b else 0.0


def unfolding(tensor, side):
    return np.moveaxis(tensor, side, 0).reshape(tensor.shape[side], -1)


def along(tensor, side, matrix):
    """Apply a matrix along one side of a tensor: from the left for side 0, from the right for side 1."""
    return np.moveaxis(np.tensordot(matrix, tensor, (1, side)), 0, side)


def first_match(rules, path):
    return next(value for pattern, value in rules if re.fullmatch(pattern, path))


def view(shape, names, treatment, options):
    """Return (axes that stack matrices, groups of neighbouring axes that form the sides, in the parameter's order)."""
    if names is None:
        stack = list(range(min(treatment.stack, len(shape))))
    else:
        stack = [i for i, name in enumerate(names) if name in options.stack_axes]
    axes = [i for i in range(len(shape)) if i not in stack]

    if treatment.view == "tensor" and treatment.side == "both":
        sides = [[i] for i in axes if shape[i] != 1]
        at = 1
        while at < len(sides):
            if len(sides) > 2 and math.prod(shape[i] for i in sides[at - 1] + sides[at]) <= options.merge_dims:
                sides[at - 1] += sides.pop(at)
            else:
                at += 1
        return stack, sides

    folds = [names is not None and names[i] in options.fold_axes for i in axes]
    split = len(axes) - 1
    if folds and all(folds):
        return stack, [axes]
    if not all(folds):
        leading, trailing = folds.index(False), folds[::-1].index(False)
        split = leading or (len(axes) - trailing if trailing else split)
    return stack, [axes[:split], axes[split:]]


@dataclasses.dataclass
class Block:
    """One block of a matrix: its position, and for each preconditioned side its statistics and root (or basis)."""

    at: tuple[slice, ...]
    statistics: dict[int, Any]
    roots: dict[int, Any] | None = None
    second: Any = 0.0  # in the basis, under SOAP
    to_come: dict[int, Any] = dataclasses.field(default_factory=dict)  # step after which they act -> roots


@dataclasses.dataclass
class Matrix:
    """A matrix (or tensor) of a parameter's stack; with a diagonal treatment, a whole parameter without blocks."""

    momentum: Any
    second: Any
    blocks: list[Block]


class Parameter:
    """One parameter: its treatment, its view as a stack of matrices with sides sorted by length, and their state."""

    def __init__(self, path, x, names, options):
        self.x = np.array(x, np.float64)
        self.rule = options.treatment(first_match(options.treatments, path))
        self.decay = options.weight_decay if first_match(options.decay_rules, path) else 0.0

        stack, sides = view(self.x.shape, names, self.rule, options)
        lengths = [math.prod(self.x.shape[i] for i in side) for side in sides]
        self.by_row = self.rule.kind == "rows" and self.x.ndim >= 2
        self.diagonal = self.rule.kind in ("diagonal", "rows") or sum(length > 1 for length in lengths) < 2
        self.diagonal = self.diagonal or self.x.size == 0
        self.options, self.rate = options, 1.0
        if self.diagonal:
            self.matrices = [Matrix(np.zeros(self.x.shape), np.zeros(self.x.shape), [])]
            self.rate = options.diagonal_rate
            own = {"graft": options.diagonal}
            for name in ("beta1", "nesterov"):
                value = getattr(options, f"diagonal_{name}")
                own[name] = getattr(options, name) if value is None else value
            self.options = types.SimpleNamespace(**(vars(options) | own))
            if options.diagonal_beta2 is not None and self.rule.kind != "diagonal":
                self.rule = dataclasses.replace(self.rule, beta2=options.diagonal_beta2)
            return

        self.lengths = lengths
        self.order = sorted(range(len(sides)), key=lambda i: lengths[i])
        # Axes of length 1 belong to no side of a tensor; their position does not matter.
        self.axes = (*stack, *(i for i in range(self.x.ndim) if i not in stack))
        self.stacks = math.prod(self.x.shape[i] for i in stack)

        if self.rule.side == "both":
            preconditioned = tuple(range(len(sides)))
        else:
            preconditioned = ({"left": self.order.index(0), "right": self.order.index(1), "short": 0}[self.rule.side],)
        self.p = self.rule.order(len(preconditioned))
        if self.p == 0:
            preconditioned = ()
        shape = [lengths[i] for i in self.order]
        pieces = [split(side, self.rule.block_size) for side in shape]
        padded = tuple(length for _, length in pieces)
        self.bucket = (padded, preconditioned, self.p, self.rule.beta2, self.rule.ridge, self.rule.cut)
        self.bucket += (self.rule.orthogonalize, self.rule.preconditioner.name)
        self.matrices = []
        for _ in range(self.stacks):
            blocks = []
            for piece in itertools.product(*(range(count) for count, _ in pieces)):
                at = tuple(
                    slice(i * length, min((i + 1) * length, side))
                    for i, length, side in zip(piece, padded, shape, strict=True)
                )
                sizes = {side: at[side].stop - at[side].start for side in preconditioned}
                statistics = {side: np.zeros((n, n)) for side, n in sizes.items()}
                blocks.append(Block(at, statistics, roots=None if preconditioned else {}))
            self.matrices.append(Matrix(np.zeros(shape), np.zeros(shape), blocks))

    def split(self, x):
        """Split a tensor of the parameter's shape into the list of its matrices."""
        if self.diagonal:
            return [x]
        stack = x.transpose(self.axes).reshape(self.stacks, *self.lengths)
        return [matrix.transpose(self.order) for matrix in stack]

    def join(self, matrices):
        """Invert `split`."""
        if self.diagonal:
            return matrices[0]
        stack = np.stack([matrix.transpose(np.argsort(self.order)) for matrix in matrices])
        return stack.reshape([self.x.shape[i] for i in self.axes]).transpose(np.argsort(self.axes))


def diagonal_method(o, a, v, beta2, t):
    """Compute the methods that can graft."""
    correction = 1 - beta2**t if beta2 < 1 else 1.0
    return {
        "adam": lambda: a / (np.sqrt(v / correction) + o.epsilon),
        "rmsprop": lambda: a / np.sqrt(v / correction + o.epsilon),
        "adagrad": lambda: a / (np.sqrt(v) + o.epsilon),
        "sgd": lambda: a,
        "none": lambda: a,
    }[o.graft.removesuffix("_normalized")]()


def direction(o, rule, matrix, g, t):
    """Return the update of one matrix for a learning rate of 1, before weight decay."""
    h = g * ratio(1.0, np.linalg.norm(g)) if o.graft.endswith("_normalized") else g

    a = h
    if o.beta1 > 0:
        new = 1 - o.beta1 if o.momentum == "ema" else 1.0
        matrix.momentum = stored(o.beta1 * matrix.momentum + new * h, o.momentum_dtype)
        a = o.beta1 * matrix.momentum + new * h if o.nesterov else matrix.momentum
        if o.momentum == "ema":
            a = a / (1 - o.beta1 ** (t + o.nesterov))

    if o.graft.startswith("adagrad"):
        matrix.second = matrix.second + h**2
    else:
        matrix.second = rule.beta2 * matrix.second + (1 - rule.beta2) * h**2
    graft = diagonal_method(o, a, matrix.second, rule.beta2, t)

    d = graft.copy()
    if rule.kind in ("soap", "muon"):
        for b in matrix.blocks:
            d[b.at] = soap(o, rule, b, a[b.at], h[b.at], t) if rule.kind != "muon" else muon(o, a[b.at])
        acting = []
    else:
        acting = [b for b in matrix.blocks if b.roots is not None and t >= o.start_step]
    for b in acting:
        block = a[b.at]
        for side, root in b.roots.items():
            block = along(block, side, root)
        d[b.at] = orthogonalized(block, rule.orthogonalize)

    if o.graft != "none":
        wanted = math.sqrt(sum(np.sum(graft[b.at] ** 2) for b in acting))
        norm = math.sqrt(sum(np.sum(d[b.at] ** 2) for b in acting))
        for b in acting:
            d[b.at] *= ratio(wanted, norm)
    return d


def soap(o, rule, b, a, h, t):
    """Apply Adam to the gradient in the basis, and rotate the result back."""
    bases = b.roots or {side: np.eye(len(s)) for side, s in b.statistics.items()}
    for side, q in bases.items():
        a, h = along(a, side, q.T), along(h, side, q.T)
    b.second = rule.beta2 * b.second + (1 - rule.beta2) * h**2
    correction = 1 - rule.beta2**t
    d = a / (np.sqrt(b.second / correction) + o.epsilon)
    for side, q in bases.items():
        d = along(d, side, q)
    x = orthogonalized(d, rule.orthogonalize)
    return x * ratio(np.linalg.norm(d), np.linalg.norm(x))


def iterated(s, q):
    """Do one step of orthogonal iteration; directions of largest variance come first."""
    order = np.argsort(-np.diag(q.T @ s @ q))
    return np.linalg.qr(s @ q[:, order])[0]


def new_bases(b):
    """Return eigenvectors, from old ones by one step of orthogonal iteration, and the rotated second moment."""
    new = {
        side: np.linalg.eigh(s)[1][:, ::-1] if b.roots is None else iterated(s, b.roots[side])
        for side, s in b.statistics.items()
    }
    for side, q in new.items():
        old = np.eye(len(q)) if b.roots is None else b.roots[side]
        b.second = along(b.second, side, ((old.T @ q) ** 2).T)
    return new


def orthogonalized(a, steps):
    """Return the polynomial approximation of the nearest semi-orthogonal matrix; with 0 steps, the matrix itself."""
    if not steps:
        return a
    x = a / (1.01 * np.linalg.norm(a)) if a.any() else a
    c1, c3, c5 = POLYNOMIAL
    for _ in range(steps):
        x = c1 * x + c3 * x @ x.T @ x + c5 * x @ x.T @ x @ x.T @ x
    return x


def muon(o, a):
    """Return the polynomial approximation of the nearest matrix with orthonormal rows, with the length of Adam's
    update."""
    return 0.2 * math.sqrt(max(a.shape)) * orthogonalized(a, 5)


def whitened(b, u, side):
    """Apply the root along every other side of a block's gradient, divided by the root of their lengths (KL-Shampoo).

    Before the first roots the statistics of the other sides are rms(u)^(2 / sides) I.
    """
    others = [other for other in b.statistics if other != side]
    rms = math.sqrt(np.mean(u**2))
    for other in others:
        u = along(u, other, b.roots[other]) if b.roots else u * ratio(1.0, rms ** (1 / len(b.statistics)))
        u = u / math.sqrt(len(b.statistics[other]))
    return u


def row_direction(o, matrix, g):
    """Divide every element by the root of its row's sum of mean squares (row-wise AdaGrad)."""
    matrix.second = matrix.second + (g**2).mean(axis=-1, keepdims=True)
    return g / (np.sqrt(matrix.second) + o.epsilon)


def accumulate(rule, matrix, g):
    """Update the statistics of every block."""
    new = 1 - rule.beta2 if rule.beta2 < 1 else 1.0
    for b in matrix.blocks:
        x = g[b.at]
        if rule.kind.startswith("kl") and len(b.statistics) > 1 and not any(s.any() for s in b.statistics.values()):
            start = math.sqrt(np.mean(x**2)) ** (2 / len(b.statistics))
            b.statistics = {side: new * start * np.eye(len(s)) for side, s in b.statistics.items()}
        seen = {
            side: unfolding(whitened(b, x, side) if rule.kind.startswith("kl") else x, side) for side in b.statistics
        }
        for side, u in seen.items():
            b.statistics[side] = rule.beta2 * b.statistics[side] + new * u @ u.T


def delay(o):
    return o.delay if o.refresh == "host" else 0


def due_phases(o, t, phases):
    """Return the phases refreshed at step t: number n is due once floor(n interval / phases) ticks are over."""
    if t < o.start_step - o.interval - delay(o):
        return set()
    interval_at = [next((k for last, k in o.early if s <= last), o.interval) for s in range(1, t + 1)]
    ticks = [o.interval // k for k in interval_at]
    begin, end = sum(ticks[:-1]), sum(ticks)
    numbers = range(begin * phases // o.interval, end * phases // o.interval + 1)
    return {n % phases for n in numbers if begin <= n * o.interval // phases < end}


def refresh(o, rule, p, block, t):
    """Refresh the roots of one block after its first gradient. They are used from the step after t + delay on."""
    age = t + (rule.kind.startswith("kl") and len(block.statistics) > 1)
    correction = 1 - rule.beta2**age if rule.beta2 < 1 else 1.0
    if not block.statistics or not all(s.any() for s in block.statistics.values()):
        return
    if rule.kind == "soap":
        block.to_come[t] = new_bases(block)
    else:
        block.to_come[t + delay(o)] = {
            side: stored(inverse_root(s / correction, p, rule.ridge, rule.cut), o.roots_dtype)
            for side, s in block.statistics.items()
        }


def flatten(tree, path=""):
    """Return {path: leaf} of nested dicts, in the order of jax.tree.leaves."""
    if not isinstance(tree, dict):
        return {path: tree}
    joined = {key: f"{path}/{key}" if path else key for key in sorted(tree)}
    return {leaf: x for key, name in joined.items() for leaf, x in flatten(tree[key], name).items()}


def run(params, gradients, options, rate, axis_names=None, owners=1):
    """Return the parameters after each step as a list of {path: array}.

    Args:
      params: nested dicts of arrays.
      gradients: one tree like params for each step.
      options: ShampooOptions.
      rate: learning rate, or a function of the number of steps already made.
      axis_names: None, or a tree like params with a tuple of names for each leaf.
      owners: number of devices.
    """
    o = options
    names = flatten(axis_names) if axis_names is not None else {}
    parameters = {path: Parameter(path, x, names.get(path), o) for path, x in flatten(params).items()}
    preconditioned = [q for q in parameters.values() if not q.diagonal]
    # A stable sort: parameters of a bucket keep the order of the tree.
    numbered = [
        (q, block)
        for q in sorted(preconditioned, key=lambda q: q.bucket)
        for matrix in q.matrices
        for block in matrix.blocks
    ]
    phases = o.phases or min(o.interval, math.ceil(len(numbered) / owners) or 1)
    phases = o.interval if o.refresh == "host" else phases
    history = []
    for t, tree in enumerate(gradients, 1):
        for path, g in flatten(tree).items():
            q = parameters[path]
            g = np.array(g, np.float64)
            if o.decay == "coupled":
                g = g + q.decay * q.x
            parts = q.split(g)
            if q.by_row:
                moved = row_direction(o, q.matrices[0], g)
            else:
                moving = zip(q.matrices, parts, strict=True)
                moved = q.join([direction(q.options, q.rule, m, part, t) for m, part in moving])
            for m, part in zip(q.matrices, parts, strict=True):
                accumulate(q.rule, m, part)
            if o.decay == "decoupled":
                moved = moved + q.decay * q.x
            now = rate(t - 1) if callable(rate) else rate
            q.x = q.x - q.rate * now * moved
        due = due_phases(o, t, phases)
        for number, (q, block) in enumerate(numbered):
            if number * phases // len(numbered) in due:
                refresh(o, q.rule, q.p, block, t)
            block.roots = block.to_come.pop(t, block.roots)
        history.append({path: q.x for path, q in parameters.items()})
    return history
