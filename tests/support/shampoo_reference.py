"""Distributed Shampoo in float64 NumPy, one block at a time: the algorithm as written, and no machinery."""

import numpy as np


def inverse_root(a, p, ridge=0.0, cut=0.0):
    """V diag(w)^(-1/p) V' with a ridge or a cut relative to the largest eigenvalue."""
    w, v = np.linalg.eigh((a + a.T) / 2)
    w = np.maximum(w, 0)
    if w[-1] == 0:
        return np.zeros_like(a)
    if cut:
        kept = w > cut * w[-1]
        return (v * np.where(kept, np.where(kept, w, 1) ** (-1 / p), 0)) @ v.T
    return (v * (w + ridge * w[-1]) ** (-1 / p)) @ v.T


def spans(side, block_size):
    """The pieces a side is cut into: (start, stop) of equal padded lengths."""
    pieces = -(-side // block_size)
    length = -(-side // pieces)
    granule = max(8, 2 ** (length.bit_length() - 1) // 16)
    length = max(length, min(-(-length // granule) * granule, -(-block_size // 8) * 8))
    return [(i * length, min((i + 1) * length, side)) for i in range(pieces)], length


class Matrix:
    """State of one matrix parameter."""

    def __init__(self, shape, options):
        self.short_first = shape[0] <= shape[1]
        rows, cols = sorted(shape)
        (row_spans, row_length), (col_spans, col_length) = (
            spans(rows, options.block_size),
            spans(cols, options.block_size),
        )
        self.bucket = (row_length, col_length)
        self.m, self.v = np.zeros((rows, cols)), np.zeros((rows, cols))
        self.blocks = [
            {"at": np.s_[r0:r1, c0:c1], "l": 0.0, "r": 0.0, "roots": None}
            for r0, r1 in row_spans
            for c0, c1 in col_spans
        ]


def graft_direction(o, m_hat, v, t):
    """The diagonal methods, written out."""
    correction = 1 if o.beta2 == 1 else 1 - o.beta2**t
    return {
        "adam": lambda: m_hat / (np.sqrt(v / correction) + o.epsilon),
        "rmsprop": lambda: m_hat / np.sqrt(v + o.epsilon),
        "adagrad": lambda: m_hat / (np.sqrt(v) + o.epsilon),
        "sgd": lambda: m_hat,
        "none": lambda: m_hat,
        "sign": lambda: np.sign(m_hat),
    }[o.graft]()


def run(params, gradients, options, rate, one_sided=False):
    """Parameters after each step. `params`: list of 2-D arrays, all under one treatment, in tree order."""
    o = options
    p = round(1 / o.exponent) if o.exponent else (2 if one_sided else 4)
    params = [np.array(x, np.float64) for x in params]
    states = [Matrix(x.shape, o) for x in params]
    # Block numbers run through the buckets in the order of their shapes.
    numbered = [
        b for bucket in sorted({s.bucket for s in states}) for s in states if s.bucket == bucket for b in s.blocks
    ]
    history = []
    for t, step_gradients in enumerate(gradients, 1):
        correction = 1 if o.beta2 == 1 else 1 - o.beta2**t
        for x, g, s in zip(params, step_gradients, states, strict=True):
            g = np.asarray(g, np.float64)
            g = g if s.short_first else g.T
            s.m = o.beta1 * s.m + (1 - o.beta1) * g
            ahead = o.beta1 * s.m + (1 - o.beta1) * g if o.nesterov else s.m
            s.v = s.v + g * g if o.graft == "adagrad" else o.beta2 * s.v + (1 - o.beta2) * g * g
            graft = graft_direction(o, ahead / (1 - o.beta1**t), s.v, t)
            direction = np.zeros_like(g)
            for b in s.blocks:
                at = b["at"]
                if b["roots"] is None:
                    direction[at] = graft[at]
                elif one_sided:
                    direction[at] = b["roots"][0] @ (ahead / (1 - o.beta1**t))[at]
                else:
                    direction[at] = b["roots"][0] @ (ahead / (1 - o.beta1**t))[at] @ b["roots"][1]
            rooted = [b["at"] for b in s.blocks if b["roots"] is not None]
            if o.graft != "none":
                for together in [[at] for at in rooted] if o.graft_norm == "block" else [rooted]:
                    norm = np.sqrt(sum(np.sum(direction[at] ** 2) for at in together))
                    wanted = np.sqrt(sum(np.sum(graft[at] ** 2) for at in together))
                    for at in together:
                        direction[at] *= wanted / norm if norm else 0
            x -= rate * ((direction if s.short_first else direction.T) + o.weight_decay * x)
            new = 1 if o.beta2 == 1 else 1 - o.beta2
            for b in s.blocks:
                block = g[b["at"]]
                b["l"] = o.beta2 * b["l"] + new * block @ block.T
                b["r"] = o.beta2 * b["r"] + new * block.T @ block
        for number, b in enumerate(numbered):
            due = (t - 1) % o.interval == 0 if o.refresh == "periodic" else number % o.interval == (t - 1) % o.interval
            if due and np.trace(b["l"]) > 0:
                b["roots"] = [inverse_root(b[side] / correction, p, o.ridge, o.cut) for side in "lr"]
        history.append([x.copy() for x in params])
    return history
