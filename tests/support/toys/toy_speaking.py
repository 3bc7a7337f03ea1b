"""A toy that continues texts: the next token depends on the last one only, and a text is written in hexadecimal."""

import dataclasses

import jax.numpy as jnp
import toy

from shampax.framework.dataset import Codec


@dataclasses.dataclass(frozen=True)
class SpeakingTask(toy.ToyTask):
    def prefill(self, variables, tokens, real, slots):
        last = jnp.argmax(jnp.where(real, jnp.arange(tokens.shape[1]), -1), axis=1)
        return self._logits(variables, jnp.take_along_axis(tokens, last[:, None], axis=1)[:, 0]), jnp.zeros(slots)

    def decode(self, variables, tokens, cache):
        return self._logits(variables, tokens), cache

    def _logits(self, variables, tokens):
        params = variables["params"]
        return jnp.tanh(params["embed"]["kernel"][tokens] @ params["hidden"]["kernel"]) @ params["out"]["kernel"]


@dataclasses.dataclass(frozen=True)
class SpeakingData(toy.ToyData):
    def codec(self, cache):
        return Codec(lambda text: [int(c, 16) for c in text], lambda tokens: "".join(f"{t:x}" for t in tokens), ())
