"""Measure steps and updates of the optimizers in turns, so that all are measured under the same load."""

import dataclasses
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..models.lm import LMTask
from .learning import Workload

GRADIENTS = 4  # number of different gradients for updates


@dataclasses.dataclass
class Timed:
    """A compiled program and its measurements.

    Attributes:
      once: runs the program once and waits for its end.
      costs: costs of its compilation, and the bytes of the optimizer's state.
      seconds: duration of every run after the warm-up.
    """

    once: Callable[[], None]
    costs: dict[str, Any]
    seconds: list[float] = dataclasses.field(default_factory=list)


def compile_measured(program: jax.stages.Wrapped, *arguments: Any) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Return the compiled program and its costs: seconds to trace and compile, size before and after XLA's passes."""
    start = time.perf_counter()
    lowered = program.lower(*arguments)
    traced = time.perf_counter()
    compiled = lowered.compile()
    costs = {
        "trace_seconds": round(traced - start, 3),
        "compile_seconds": round(time.perf_counter() - traced, 3),
        "stablehlo_characters": len(lowered.as_text()),
        "hlo_instructions": sum(" = " in line for line in (compiled.as_text() or "").splitlines()),
    }
    return compiled, costs


Clock = Callable[[], float]


def take_turns(timed: Mapping[str, Timed], *, turns: int, runs: int, clock: Clock) -> None:
    """Run each program `runs` times per turn, after one turn without timing. The first program changes every turn."""
    names = list(timed)
    for turn in range(-1, turns):
        for name in (*names[turn % len(names) :], *names[: turn % len(names)]):
            for _ in range(runs):
                start = clock()
                timed[name].once()
                if turn >= 0:
                    timed[name].seconds.append(clock() - start)
        _say(f"turn {turn + 1} of {turns}")


def time_steps(
    workload: Workload, options: Mapping[str, Any], *, interval: int, turns: int, clock: Clock
) -> dict[str, Any]:
    """Measure train steps of optimizers.

    Args:
      workload: task, data and schedule; all optimizers get the same batches.
      options: options of the optimizers, by name.
      interval: steps per turn, one refresh interval of our Shampoo.
      turns: turns of each optimizer after the warm-up turn.
      clock: returns seconds.

    Returns:
      For each optimizer its options and costs. The mean step of a whole run in milliseconds includes the early
      intervals, except those in the warm-up turn. The number of steps, their median and the longest are of the steps
      after the early intervals. Other processes can lengthen single steps, so there is also the slowest phase: the
      longest of the interval's steps, after taking the median of each over turns. The longest step and the slowest
      phase are also given as multiples of the median.
    """
    stream = workload.batches(seed=0)
    batches = [jax.device_put(stream[step]) for step in range((1 + turns) * interval)]
    timed = {name: _train_step(workload, chosen, batches) for name, chosen in options.items()}
    take_turns(timed, turns=turns, runs=interval, clock=clock)
    results = {}
    for name, program in timed.items():
        milliseconds = 1e3 * np.array(program.seconds).reshape(turns, interval)
        early = early_steps(options[name])
        # The first timed turn begins at step 1 + interval.
        steady = milliseconds[max(0, -(-early // interval) - 1) :]
        median, longest = float(np.median(steady)), float(steady.max())
        slowest_phase = float(np.median(steady, axis=0).max())
        mean = float(steady.mean())
        if early > interval:
            first = float(milliseconds.ravel()[: early - interval].mean())
            mean += (first - mean) * early / workload.total_steps
        results[name] = {
            "options": {"name": type(options[name]).__name__} | dataclasses.asdict(options[name]),
            **program.costs,
            "steps": steady.size,
            "median_ms": median,
            "mean_ms": mean,
            "longest_ms": longest,
            "slowest_phase_ms": slowest_phase,
            "longest_to_median": longest / median,
            "slowest_phase_to_median": slowest_phase / median,
        }
    return results


def time_updates(
    task: LMTask, options: Mapping[str, Any], *, interval: int, intervals: int, repetitions: int, clock: Clock
) -> dict[str, Any]:
    """Measure only the optimizers' updates, on random gradients for a task's parameters.

    Args:
      task: task with the parameters' shapes.
      options: options of the optimizers, by name.
      interval: steps from one refresh to the next, for all optimizers.
      intervals: intervals per repetition; they are whole so that all refreshes count.
      repetitions: turns of each optimizer.
      clock: returns seconds.

    Returns:
      `parameters`: their number. `optimizers`: by name, the options, the costs, and for the updates in milliseconds
      the mean of each repetition, the median and the longest.
    """
    spec = {"tokens": jax.ShapeDtypeStruct((1, 2), jnp.int32)}
    shapes = jax.eval_shape(task.init, jax.random.key(0), spec)
    # Google's Shampoo does not support stacked layers; ours stacks equal blocks itself.
    axis_names = _unstacked(task.logical_axes(shapes)["params"], task.layers, lambda names: names[1:])
    shapes = _unstacked(shapes["params"], task.layers, lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype))
    params = _random_like(shapes, seed=0)
    gradients = [_random_like(shapes, seed=1 + i) for i in range(GRADIENTS)]
    timed = {}
    for name, chosen in options.items():
        _say(f"compiling {name}")
        tx = chosen.build(lambda count: 1e-3, mesh=None, axis_names=axis_names)
        timed[name] = _update(tx, params, gradients)
    take_turns(timed, turns=repetitions, runs=intervals * interval, clock=clock)
    results = {}
    for name, program in timed.items():
        milliseconds = 1e3 * np.array(program.seconds).reshape(repetitions, intervals * interval)
        results[name] = {
            "options": {"name": type(options[name]).__name__} | dataclasses.asdict(options[name]),
            **program.costs,
            "mean_ms": [float(mean) for mean in milliseconds.mean(axis=1)],
            "median_ms": float(np.median(milliseconds)),
            "longest_ms": float(milliseconds.max()),
        }
    return {"parameters": sum(leaf.size for leaf in jax.tree.leaves(shapes)), "optimizers": results}


def _unstacked(tree: Any, layers: int, of_layer: Callable[[Any], Any]) -> Any:
    """Return a tree with "layers_0", "layers_1", ... in place of "layers"."""
    own = jax.tree.map(of_layer, tree["layers"], is_leaf=lambda leaf: isinstance(leaf, tuple))
    return {name: part for name, part in tree.items() if name != "layers"} | {
        f"layers_{layer}": own for layer in range(layers)
    }


def early_steps(options: Any) -> int:
    """Return the last step with an early interval; 0 for optimizers without early intervals."""
    return max((last for last, _ in getattr(options, "early", ())), default=0)


def _train_step(workload: Workload, options: Any, batches: Sequence[Any]) -> Timed:
    program = workload.program(options)
    variables, state = program.start(0)
    costs = {"state_bytes": _bytes(state)}
    rate, seed = np.float32(1e-3), np.uint32(0)  # a rate at which none diverges: it does not change the time
    compiled, compilation = compile_measured(program.step, variables, state, batches[0], rate, seed, np.uint32(0))
    step = 0

    def once() -> None:
        nonlocal variables, state, step
        variables, state, _ = jax.block_until_ready(
            compiled(variables, state, batches[step], rate, seed, np.uint32(step))
        )
        step += 1

    return Timed(once, compilation | costs)


def _update(tx: Any, params: Any, gradients: Sequence[Any]) -> Timed:
    state = jax.jit(tx.init)(params)
    costs = {"state_bytes": _bytes(state)}
    compiled, compilation = compile_measured(jax.jit(tx.update, donate_argnums=1), gradients[0], state, params)
    step = 0

    def once() -> None:
        nonlocal state, step
        _, state = jax.block_until_ready(compiled(gradients[step % len(gradients)], state, params))
        step += 1

    return Timed(once, compilation | costs)


def _random_like(shapes: Any, seed: int) -> Any:
    """Draw normal values scaled by 1 / (row x column): the root of a multiple of the identity would be too easy."""
    generator = np.random.default_rng(seed)

    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        value = generator.standard_normal(leaf.shape, np.float32)
        for number in np.ix_(*(np.arange(1, length + 1, dtype=np.float32) for length in leaf.shape)):
            value /= number
        return jnp.asarray(value, leaf.dtype)

    return jax.tree.map(draw, shapes)


def _bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
