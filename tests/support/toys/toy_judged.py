"""The toy task with held-out metrics that need all examples, and its data with text and augmentation."""

import dataclasses

import jax
import numpy as np
import toy


@dataclasses.dataclass(frozen=True)
class JudgedTask(toy.ToyTask):
    """Judges by the median over examples, which is not a sum over batches."""

    judged_metrics = ("median", "examples")

    def predict(self, variables, batch):
        def nats(row):
            one = {name: value[None] for name, value in row.items()}
            return self.loss(variables, one, key=jax.random.key(0), train=False)[0]

        return {"nats": jax.vmap(nats)(dict(batch)), "tokens": batch["tokens"]}

    def judge(self, predictions, decode):
        assert len(predictions["tokens"]) == len(predictions["nats"])
        first = decode(predictions["tokens"][0])
        return {
            "median": float(np.median(predictions["nats"])),
            "examples": float(len(predictions["nats"])),
        }, f"judged from {first!r} on"


@dataclasses.dataclass(frozen=True)
class AugmentedData(toy.ToyData):
    """Set the weights of some targets to 0."""

    def augment(self, example, rng):
        return example | {"weights": example["weights"] * (rng.random(8) < 0.7).astype(np.float32)}

    def decoder(self, cache):
        assert cache.is_dir()
        return lambda tokens: " ".join(map(str, tokens))
