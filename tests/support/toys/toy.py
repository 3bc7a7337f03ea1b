"""A model and a data set without any neural-network library.

A two-layer MLP predicts the next token of a Markov chain. It consists of pure functions on a dict of arrays.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

VOCAB = 16
TRACES = {"train": 0, "eval": 0}  # number of traces of the loss


@dataclasses.dataclass(frozen=True)
class ToyTask:
    """`embed` [V, D], `hidden` [D, M], `out` [M, V]; model state counts the batches seen."""

    width: int = 16  # D
    hidden: int = 32  # M
    nan_from: int = -1  # after this many batches, one element of the loss is NaN; -1 disables
    nan_seed: int = -1  # seed that makes about a tenth of the steps NaN; -1 disables
    nan_steps: tuple[int, ...] = ()  # steps, from 1, whose loss is NaN
    seed: int = 0  # seed of the run, to know the keys of these steps

    def init(self, key, batch_spec):
        width, hidden = self.width, self.hidden
        shapes = {"embed": (VOCAB, width), "hidden": (width, hidden), "out": (hidden, VOCAB)}
        # One draw for all arrays: random draws take long to compile.
        noise = jax.random.normal(key, (sum(rows * cols for rows, cols in shapes.values()),))
        params = {}
        for name, (rows, cols) in shapes.items():
            drawn, noise = jnp.split(noise, [rows * cols])
            params[name] = {"kernel": drawn.reshape(rows, cols) / rows**0.5}
        return {"params": params, "counters": {"batches": jnp.zeros((), jnp.int32)}}

    def loss(self, variables, batch, *, key, train):
        TRACES["train" if train else "eval"] += 1
        params = variables["params"]
        x = params["embed"]["kernel"][batch["tokens"][:, :-1]]
        x = jnp.tanh(x @ params["hidden"]["kernel"])
        logits = x @ params["out"]["kernel"]
        targets = batch["tokens"][:, 1:]
        nats = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
        counters = variables["counters"]
        if train:
            counters = {"batches": counters["batches"] + 1}
            broken = (self.nan_from >= 0) & (counters["batches"] > self.nan_from)
            if self.nan_seed >= 0:
                broken |= jax.random.uniform(jax.random.fold_in(key, self.nan_seed)) > 0.9
            broken |= self._is_of(self.nan_steps, key)
            nats = nats.at[0, 0].set(jnp.where(broken, jnp.nan, nats[0, 0]))
        weights = batch["weights"]
        total, weight = (nats * weights).sum(), weights.sum()
        metrics = {
            "loss": (total, weight),
            "accuracy": (((logits.argmax(-1) == targets) * weights).sum(), weight),
        }
        return total / weight, ({"counters": counters}, metrics)

    def _is_of(self, steps, key):
        """Return whether the key belongs to the first micro-batch of one of the steps."""
        if not steps:
            return False
        run = jax.random.key(self.seed)
        keys = jax.vmap(lambda step: jax.random.fold_in(jax.random.fold_in(run, step - 1), 0))(np.array(steps))
        return (jax.random.key_data(keys) == jax.random.key_data(key)).all(axis=1).any()

    def logical_axes(self, variables):
        return {
            "params": {
                "embed": {"kernel": ("vocab", "embed")},
                "hidden": {"kernel": ("embed", "mlp")},
                "out": {"kernel": ("mlp", "vocab")},
            },
            "counters": {"batches": ()},
        }

    def flops(self, batch_spec):
        rows, length = batch_spec["tokens"].shape
        return 6.0 * rows * (length - 1) * self.hidden * (self.width + VOCAB)


class ToySource:
    """Rows of a Markov chain, each a function of its index; weights are uneven."""

    def __init__(self, length, seed):
        self.length, self.seed = length, seed

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        rng = np.random.default_rng((self.seed, index))
        tokens = [int(rng.integers(VOCAB))]
        for _ in range(8):
            tokens.append((3 * tokens[-1] + int(rng.integers(3))) % VOCAB)
        weights = (np.arange(8) < rng.integers(1, 9)).astype(np.float32)
        return {"tokens": np.array(tokens, np.int32), "weights": weights}


@dataclasses.dataclass(frozen=True)
class ToyData:
    """Random access to the toy rows."""

    rows: int = 200  # examples of the training split
    heldout_rows: int = 20  # examples of the held-out split

    @property
    def tokens_per_example(self):
        return 8

    def prepare(self, cache):
        cache.mkdir(parents=True, exist_ok=True)

    def examples(self, split, cache):
        return ToySource(self.rows, 1) if split == "train" else ToySource(self.heldout_rows, 2)
