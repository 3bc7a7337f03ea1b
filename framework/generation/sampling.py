"""Draw the next token of each row: a pure function of its logits, its prompt, the seed and the position."""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. The defaults leave out the long tail, in which a small model gets lost."""

    temperature: float = 0.8  # divisor of the logits; 0 takes the most probable token
    top_k: int = 0  # draw from this many of the most probable tokens; 0: from all
    top_p: float = 0.95  # draw from the fewest of the most probable tokens that have this probability together
    seed: int = 0  # of the random numbers

    def __post_init__(self):
        if not 0 <= self.temperature <= 100:
            raise ValueError(f"temperature={self.temperature}: must be 0 to 100. Use 0 for the most probable tokens.")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k}: must be at least 0. Use 0 to draw from all tokens.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: must be above 0 and at most 1. Use 1 to draw from all tokens.")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed}: must be 0 to {2**32 - 1}.")


def draw(logits_BxV: jax.Array, salts_B: jax.Array, positions_B: jax.Array, sampling: Sampling) -> jax.Array:
    """Return the next tokens, int32 [B]. A text does not depend on the other rows, nor on its place among them.

    Args:
      logits_BxV: float32.
      salts_B: uint32, numbers that differ between prompts. With equal ones, texts would drift into the same words.
      positions_B: int32, number of tokens before the one that is drawn.
      sampling: how to draw.
    """
    if not sampling.temperature:
        return jnp.argmax(logits_BxV, axis=-1).astype(jnp.int32)
    logits_BxV = logits_BxV / sampling.temperature
    vocab = logits_BxV.shape[-1]
    if 0 < sampling.top_k < vocab or sampling.top_p < 1:
        falling_BxV = jnp.sort(logits_BxV, axis=-1, descending=True)
        kept_BxV = jnp.arange(vocab) < (sampling.top_k or vocab)
        probable_BxV = jax.nn.softmax(jnp.where(kept_BxV, falling_BxV, -jnp.inf), axis=-1)
        kept_BxV &= jnp.cumsum(probable_BxV, axis=-1) - probable_BxV < sampling.top_p
        least_Bx1 = jnp.where(kept_BxV, falling_BxV, jnp.inf).min(axis=-1, keepdims=True)
        logits_BxV = jnp.where(logits_BxV >= least_Bx1, logits_BxV, -jnp.inf)

    def noise(salt: jax.Array, position: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(sampling.seed), salt), position)
        return jax.random.gumbel(key, (vocab,))

    return jnp.argmax(logits_BxV + jax.vmap(noise)(salts_B, positions_B), axis=-1).astype(jnp.int32)
