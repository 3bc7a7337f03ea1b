"""Continue prompts: one compiled prefill for all of them, then one compiled step per token."""

import dataclasses
import math
import time
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from ..sharding import meshes
from ..step import compiler_options, refusals
from ..task import Generating
from .sampling import Sampling, draw

SHORTEST = 32  # slots of a row; sizes are this times a power of two, so that few are compiled


@dataclasses.dataclass
class Speed:
    """Tokens and seconds of what has been generated so far.

    Attributes:
      read: tokens of prompts.
      reading: seconds of prefill.
      written: tokens of continuations, without the first of each, which prefill draws.
      writing: seconds of decoding.
      compiling: seconds.
    """

    read: int = 0
    reading: float = 0.0
    written: int = 0
    writing: float = 0.0
    compiling: float = 0.0

    def __str__(self):
        def rate(name: str, tokens: int, seconds: float) -> str:
            return f"{name} {tokens:,} tokens in {seconds:.2f} s ({tokens / max(seconds, 1e-9):,.0f} tokens/s)"

        rates = rate("prefill", self.read, self.reading), rate("decode", self.written, self.writing)
        return "; ".join((*rates, f"compiled in {self.compiling:.1f} s"))


class Generator:
    """Generates tokens on a mesh, which `jax.set_mesh` has made current.

    Args:
      task: the model.
      mesh: the mesh.
      sampling: how tokens are drawn.

    Attributes:
      speed: of all that has been generated.
    """

    def __init__(self, task: Generating, mesh: Mesh, sampling: Sampling):
        self._task, self._mesh, self._sampling = task, mesh, sampling
        self._options = compiler_options.choose((), mesh.devices.flat[0])
        self._compiled: dict[tuple[int, ...], tuple[Any, Any]] = {}
        self.speed = Speed()

    def tokens(self, variables: Any, prompts: Sequence[Sequence[int]], most: int) -> Iterator[np.ndarray]:
        """Yield the next token of each prompt, int32 [prompts], up to `most` times; ends of texts do not end it.

        Args:
          variables: of the model, laid over the mesh.
          prompts: tokens of each, at least one.
          most: number of tokens of each continuation.
        """
        parts = math.prod(self._mesh.shape[axis] for axis in meshes.batch_axes(self._mesh))
        rows = parts * power_of_two(-(-len(prompts) // parts))
        length = SHORTEST * power_of_two(-(-max(map(len, prompts)) // SHORTEST))
        slots = SHORTEST * power_of_two(-(-(length + most) // SHORTEST))
        tokens, real = np.zeros((rows, length), np.int32), np.zeros((rows, length), bool)
        salts = np.zeros(rows, np.uint32)
        for row, prompt in enumerate(prompts):
            tokens[row, -len(prompt) :], real[row, -len(prompt) :] = prompt, True
            salts[row] = zlib.crc32(np.array(prompt, np.int32).tobytes())
        sharding = meshes.batch_sharding(self._mesh)
        inputs = [jax.make_array_from_callback(x.shape, sharding, x.__getitem__) for x in (tokens, real, salts)]

        prefill, decode = self._programs(variables, inputs, slots)
        begun = time.perf_counter()
        drawn, positions, cache = prefill(variables, *inputs)
        salts = inputs[2]
        found = np.asarray(drawn)
        self.speed.read += sum(map(len, prompts))
        self.speed.reading += time.perf_counter() - begun
        for left in range(most - 1, -1, -1):
            begun = time.perf_counter()
            # The next step is dispatched before its input is shown, so that the devices stay busy.
            following = decode(variables, drawn, salts, positions, cache) if left else None
            yield found[: len(prompts)]
            if following is not None:
                drawn, positions, cache = following
                found = np.asarray(drawn)
                self.speed.written += len(prompts)
                self.speed.writing += time.perf_counter() - begun

    def _programs(self, variables: Any, inputs: Sequence[jax.Array], slots: int) -> tuple[Any, Any]:
        task, sampling = self._task, self._sampling

        def prefill(variables, tokens_BxT, real_BxT, salts_B):
            logits_BxV, cache = task.prefill(variables, tokens_BxT, real_BxT, slots)
            positions_B = real_BxT.sum(axis=1)
            return draw(logits_BxV, salts_B, positions_B, sampling), positions_B, cache

        def decode(variables, drawn_B, salts_B, positions_B, cache):
            logits_BxV, cache = task.decode(variables, drawn_B, cache)
            return draw(logits_BxV, salts_B, positions_B + 1, sampling), positions_B + 1, cache

        size = (*inputs[0].shape, slots)
        if size not in self._compiled:
            begun, everywhere = time.perf_counter(), meshes.replicated(self._mesh)
            with refusals.of(task):
                first = jax.jit(prefill, out_shardings=(everywhere, everywhere, None)).lower(variables, *inputs)
                made = compiler_options.compile_with(first, self._options)
                shapes = jax.eval_shape(prefill, variables, *inputs)
                layout = made.output_shardings
                drawn, *rest = jax.tree.map(lambda x, sharding: x.update(sharding=sharding), shapes, layout)
                step = jax.jit(decode, donate_argnums=4, out_shardings=layout)
                step = step.lower(variables, drawn, inputs[2], *rest)
            self._compiled[size] = made, compiler_options.compile_with(step, self._options)
            self.speed.compiling += time.perf_counter() - begun
        return self._compiled[size]


def power_of_two(number: int) -> int:
    """Return the least power of two that is at least a number."""
    return 1 << (number - 1).bit_length()
