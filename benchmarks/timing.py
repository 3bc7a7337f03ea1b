"""What steps and updates of the optimizers cost, side by side: they take turns, so that all meet the same machine."""

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

GRADIENTS = 4  # different ones that updates are measured on


@dataclasses.dataclass
class Timed:
    """A compiled program that is run again and again, and how long each run took.

    Attributes:
      once: runs it one time, to its end.
      costs: of its compilation, and the bytes of the optimizer's state.
      seconds: of every run since the warm-up.
    """

    once: Callable[[], None]
    costs: dict[str, Any]
    seconds: list[float] = dataclasses.field(default_factory=list)


def compile_measured(program: jax.stages.Wrapped, *arguments: Any) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The compiled program, the seconds to trace and to compile it, and its size before and after XLA's passes."""
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


def take_turns(timed: Mapping[str, Timed], *, turns: int, runs: int) -> None:
    """`runs` of each program one after the other, `turns` times, everyone being first in turn; untimed once before."""
    names = list(timed)
    for turn in range(-1, turns):
        for name in (*names[turn % len(names) :], *names[: turn % len(names)]):
            for _ in range(runs):
                start = time.perf_counter()
                timed[name].once()
                if turn >= 0:
                    timed[name].seconds.append(time.perf_counter() - start)
        _say(f"turn {turn + 1} of {turns}")


def time_steps(workload: Workload, rates: Mapping[str, float], *, interval: int, turns: int) -> dict[str, Any]:
    """Train steps of the contestants in `rates`, and of ours with periodic instead of staggered refresh.

    Args:
      workload: what is learnt; everyone sees the same batches, from the first on.
      rates: peak learning rate, by contestant.
      interval: steps of a turn, one refresh interval of ours.
      turns: of everyone, after the one that warms up.

    Returns:
      For each contestant its options and costs; the mean step of a whole run in milliseconds, early intervals
      included as far as they go beyond the turn that warms up; and of the steps after these the number, and the median
      and longest. Neighbours on a machine lengthen single steps,
      so there is also the slowest phase: the median over turns of each of the interval's steps, and of these the
      longest; and the two as multiples of the median.
    """
    options = {name: workload.options[name] for name in rates}
    rates = dict(rates)
    if "ours" in options:
        options["ours_periodic"] = dataclasses.replace(options["ours"], refresh="periodic")
        rates["ours_periodic"] = rates["ours"]
    stream = workload.batches(seed=0)
    batches = [jax.device_put(stream[step]) for step in range((1 + turns) * interval)]
    timed = {name: _train_step(workload, options[name], rate, batches) for name, rate in rates.items()}
    take_turns(timed, turns=turns, runs=interval)
    results = {}
    for name, program in timed.items():
        milliseconds = 1e3 * np.array(program.seconds).reshape(turns, interval)
        early = early_steps(options[name])
        # The turn that warms up is over; the next begins at step 1 + interval.
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
    task: LMTask, options: Mapping[str, Any], *, interval: int, intervals: int, repetitions: int
) -> dict[str, Any]:
    """Updates alone, without a model's computation, on random gradients for a task's parameters.

    Args:
      task: gives the parameters' shapes.
      options: of the optimizers, by name.
      interval: steps from one refresh of the roots to the next, of all of them.
      intervals: whole intervals that one repetition lasts, so that refreshes are counted in full.
      repetitions: of the measurement, in turns.

    Returns:
      `parameters`, and by optimizer the costs and the mean milliseconds of an update in each repetition.
    """
    spec = {"tokens": jax.ShapeDtypeStruct((1, 2), jnp.int32)}
    shapes = jax.eval_shape(task.init, jax.random.key(0), spec)
    axis_names = task.logical_axes(shapes)["params"]
    params = _random_like(shapes["params"], seed=0)
    gradients = [_random_like(shapes["params"], seed=1 + i) for i in range(GRADIENTS)]
    timed = {}
    for name, chosen in options.items():
        _say(f"compiling {name}")
        tx = chosen.build(lambda count: 1e-3, mesh=None, axis_names=axis_names)
        timed[name] = _update(tx, params, gradients)
    take_turns(timed, turns=repetitions, runs=intervals * interval)
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


def early_steps(options: Any) -> int:
    """The step after which an optimizer's refresh interval no longer changes; 0 of those that have none."""
    return max((last for last, _ in getattr(options, "early_intervals", ())), default=0)


def _train_step(workload: Workload, options: Any, rate: float, batches: Sequence[Any]) -> Timed:
    program = workload.program(options)
    params, state = program.start(0)
    costs = {"state_bytes": _bytes(state)}
    peak = jnp.float32(rate)
    compiled, compilation = compile_measured(program.step, params, state, batches[0], peak)
    step = 0

    def once() -> None:
        nonlocal params, state, step
        params, state, _ = jax.block_until_ready(compiled(params, state, batches[step], peak))
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
    """Normal, falling off as one over the row and over the column: multiples of the identity are too easy a root."""
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
