"""Score continuations of texts: log-probabilities of their tokens, in batches of rows of similar length."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ..sharding import meshes
from ..step import compiler_options, refusals
from ..task import Scoring
from .generator import SHORTEST, power_of_two


class Score(NamedTuple):
    """The score of a continuation.

    Attributes:
      nats: sum of the log-probabilities of its tokens.
      greedy: whether each of them is the most probable one.
    """

    nats: float
    greedy: bool


class Scorer:
    """Scores continuations on a mesh, which `jax.set_mesh` has made current.

    Args:
      task: the model.
      mesh: the mesh.
      batch_size: rows that are scored together; a larger multiple of the devices that share them if it does not divide.
    """

    def __init__(self, task: Scoring, mesh: Mesh, batch_size: int):
        self._task, self._mesh = task, mesh
        parts = math.prod(mesh.shape[axis] for axis in meshes.batch_axes(mesh))
        self._rows = -(-batch_size // parts) * parts
        self._options = compiler_options.choose((), mesh.devices.flat[0])
        self._compiled: dict[int, Any] = {}

    def scores(self, variables: Any, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Score]:
        """Return the score of each continuation.

        Args:
          variables: of the model, laid over the mesh.
          pairs: tokens of a text, at least one, and those of its continuation.
        """
        found: list[Score] = [Score(0.0, True)] * len(pairs)
        order = sorted(range(len(pairs)), key=lambda number: sum(map(len, pairs[number])))
        for start in range(0, len(order), self._rows):
            numbers = order[start : start + self._rows]
            longest = sum(map(len, pairs[numbers[-1]])) - 1
            length = SHORTEST * power_of_two(max(1, -(-longest // SHORTEST)))
            tokens, real = np.zeros((self._rows, length + 1), np.int32), np.zeros((self._rows, length + 1), bool)
            counted = np.zeros((self._rows, length), bool)
            for row, number in enumerate(numbers):
                text, continuation = pairs[number]
                end = len(text) + len(continuation)
                tokens[row, :end], real[row, :end] = [*text, *continuation], True
                counted[row, len(text) - 1 : end - 1] = True
            sharding = meshes.batch_sharding(self._mesh)
            inputs = [jax.make_array_from_callback(x.shape, sharding, x.__getitem__) for x in (tokens, real, counted)]
            nats, greedy = map(np.asarray, self._program(variables, inputs)(variables, *inputs))
            for row, number in enumerate(numbers):
                found[number] = Score(float(nats[row]), bool(greedy[row]))
        return found

    def _program(self, variables: Any, inputs: Sequence[jax.Array]) -> Any:
        def score(variables, tokens, real, counted):
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
            batch = {"tokens": tokens, "segments": real.astype(jnp.int32), "positions": positions}
            nats, best = self._task.scores(variables, batch)
            return jnp.where(counted, nats, 0).sum(axis=1), (best | ~counted).all(axis=1)

        length = inputs[0].shape[1]
        if length not in self._compiled:
            with refusals.of(self._task):
                lowered = jax.jit(score, out_shardings=meshes.replicated(self._mesh)).lower(variables, *inputs)
            self._compiled[length] = compiler_options.compile_with(lowered, self._options)
        return self._compiled[length]
