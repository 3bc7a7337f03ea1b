"""Train a config's model in a plain jitted loop with the same parameters, batches and schedule for every optimizer.

Each run is one file, so that an interrupted grid can be resumed.
"""

import dataclasses
import hashlib
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from ..framework.base import durations, paths
from ..framework.base.errors import UserError
from ..framework.base.json_files import read_object
from ..framework.config import components
from ..framework.data import pipeline
from ..framework.reporting import curves
from ..framework.reporting.runs import Run
from ..framework.step.evaluation import evaluate
from ..framework.step.schedule import make_schedule
from . import contestants
from .grid import Outcome, Trial

# Sections of a config that this loop uses; the others configure the trainer.
SECTIONS = ("task", "data", "batch_size", "duration", "schedule")


class Workload:
    """Task, data and schedule of a config, on one device.

    Attributes:
      options: options of the optimizers, by name.
      total_steps: length of a run in steps.
      settings: everything except the optimizer that determines the outcome of a run, as JSON.
    """

    def __init__(self, config: Any, cache: Path):
        task, data = components.build(config.task), components.build(config.data)
        data.prepare(cache)
        self._task, self._source = task, data.examples("train", cache)
        self._share = {"global_batch_size": config.batch_size, "rows": range(config.batch_size)}
        limit = config.evaluation.batches
        self._heldout: list[Any] = list(
            pipeline.HeldoutBatches(data.examples("heldout", cache), limit=limit, **self._share)
        )
        self.options = contestants.all_options(config)
        self.settings = {name: config.to_dict()[name] for name in SECTIONS} | {"heldout_batches": limit}

        units = durations.Units(config.batch_size, lambda: len(self._source), data.tokens_per_example)
        self.total_steps = durations.to_steps(config.duration, units)
        units = dataclasses.replace(units, total_steps=self.total_steps)
        self.evaluate_every = durations.to_steps(config.evaluation.every, units)
        self._schedule = make_schedule(
            1.0,
            warmup_steps=durations.to_steps(config.schedule.warmup, units),
            total_steps=self.total_steps,
            decay=config.schedule.decay,
            final_fraction=config.schedule.final_fraction,
        )
        self._spec = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), self.batches(0)[0])
        variables = jax.eval_shape(task.init, jax.random.key(0), self._spec)
        self._axis_names = task.logical_axes(variables)["params"]
        self._evaluate = jax.jit(lambda params, batch: self._loss(params, batch, train=False)[1])

    def batches(self, seed: int) -> pipeline.Batches:
        """Return the training batches of a seed, indexed by step."""
        return pipeline.Batches(self._source, seed=seed, **self._share)

    def program(self, options: Any) -> "Program":
        """Return jitted training with these options. It compiles once for all rates and seeds."""

        def start(seed: jax.Array) -> tuple[Any, Any]:
            # The same key as in the trainer.
            params = self._task.init(jax.random.fold_in(jax.random.key(seed), 2**32 - 1), self._spec)["params"]
            return params, self._optimizer(options, 0.0).init(params)

        def step(params: Any, state: Any, batch: Any, peak: jax.Array) -> tuple[Any, Any, jax.Array]:
            (loss, _), gradients = jax.value_and_grad(self._loss, has_aux=True)(params, batch, train=True)
            updates, state = self._optimizer(options, peak).update(gradients, state, params)
            return optax.apply_updates(params, updates), state, loss

        return Program(jax.jit(start), jax.jit(step, donate_argnums=(0, 1)))

    def heldout_metrics(self, params: Any) -> dict[str, float]:
        """Return the task's metrics over the held-out batches."""
        return evaluate(self._evaluate, params, self._heldout)

    def _optimizer(self, options: Any, peak: jax.Array | float) -> optax.GradientTransformation:
        return options.build(lambda count: peak * self._schedule(count), mesh=None, axis_names=self._axis_names)

    def _loss(self, params: Any, batch: Any, *, train: bool) -> tuple[jax.Array, Any]:
        loss, (_, metrics) = self._task.loss({"params": params}, batch, key=jax.random.key(0), train=train)
        return loss, metrics


class Program(NamedTuple):
    """Jitted training with one optimizer.

    Attributes:
      start: `seed -> (params, state)`, the parameters and the optimizer's state.
      step: `(params, state, batch, peak learning rate) -> (params, state, loss)`; it donates params and state.
    """

    start: jax.stages.Wrapped
    step: jax.stages.Wrapped


def train(workload: Workload, program: Program, trial: Trial) -> dict[str, Any]:
    """Train until the last step or the first loss that is not finite.

    Args:
      workload: task, data and schedule.
      program: the workload's program with the trial's optimizer.
      trial: optimizer, peak learning rate and seed.

    Returns:
      `steps` taken; `losses`, the training loss of each step; `heldout`, a dict of metrics and `step` for every
      evaluation; `stopped`, why the run ended early, or None; `seconds`, including evaluations.
    """
    start = time.monotonic()
    params, state = program.start(trial.seed)
    batches = workload.batches(trial.seed).from_step(0)
    losses: list[float] = []
    heldout: list[dict[str, float]] = []
    for number in range(workload.total_steps + 1):
        finite = not losses or math.isfinite(losses[-1])
        if number == workload.total_steps or not finite or number % workload.evaluate_every == 0:
            heldout.append({"step": number} | workload.heldout_metrics(params))
        if number == workload.total_steps or not finite:
            break
        params, state, loss = program.step(params, state, next(batches), np.float32(trial.learning_rate))
        losses.append(float(loss))
    return {
        "steps": len(losses),
        "losses": [_finite(loss) for loss in losses],
        "heldout": [{name: _finite(value) for name, value in metrics.items()} for metrics in heldout],
        "stopped": None if finite and _finite(heldout[-1]["loss"]) is not None else "the loss was not finite",
        "seconds": round(time.monotonic() - start, 3),
    }


def settings_of(workload: Workload, trial: Trial) -> dict[str, Any]:
    """Return all settings that determine the outcome of a run, converted to JSON types."""
    options = workload.options[trial.variant]
    chosen = {
        "workload": workload.settings,
        "optimizer": {"name": type(options).__name__} | dataclasses.asdict(options),
        "learning_rate": trial.learning_rate,
        "seed": trial.seed,
    }
    return json.loads(json.dumps(chosen))


def fingerprint(settings: dict[str, Any]) -> str:
    """Return a hash of the settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def run_grid(
    grid: Sequence[Trial],
    folder: Path,
    settings_of: Callable[[Trial], dict[str, Any]],
    run: Callable[[Trial], dict[str, Any]],
) -> list[dict[str, Any]]:
    """Train the runs of a grid that are missing in `folder`. Return the content of all files, in the grid's order.

    Args:
      grid: the runs.
      folder: folder of the files, one per run.
      settings_of: returns the settings that determine the outcome of a run; they are stored with it.
      run: trains a run and returns its result.

    Raises:
      UserError: an existing file has other settings. Nothing is trained then.
    """
    done = {}
    for trial in grid:
        content = read_object(_path(folder, trial))
        if content is not None:
            _refuse_other_settings(_path(folder, trial), content, settings_of(trial))
            done[trial] = content
    folder.mkdir(parents=True, exist_ok=True)
    for number, trial in enumerate(grid, start=1):
        if trial not in done:
            settings = settings_of(trial)
            made = dataclasses.asdict(trial) | {"fingerprint": fingerprint(settings), "settings": settings} | run(trial)
            paths.write_text(paths.of(_path(folder, trial)), json.dumps(made, allow_nan=False) + "\n")
            done[trial] = made
            ending = made["stopped"] or f"held-out {made['heldout'][-1]['loss']:.4f}"
            print(
                f"[{number}/{len(grid)}] {trial.name}: {ending} after {made['steps']} steps, {made['seconds']:.0f} s",
                file=sys.stderr,
                flush=True,
            )
    return [done[trial] for trial in grid]


def read_grid(
    grid: Sequence[Trial], folder: Path, seconds_per_step: Mapping[str, float]
) -> tuple[list[Outcome], list[Trial]]:
    """Read a grid from `folder`. Return (outcomes, missing trials).

    Args:
      grid: the runs.
      folder: folder of their files.
      seconds_per_step: mean step time by optimizer; curves of optimizers without it have no time axis.
    """
    outcomes, missing = [], []
    for trial in grid:
        path = _path(folder, trial)
        content = read_object(path)
        if content is None:
            missing.append(trial)
            continue
        seconds = seconds_per_step.get(trial.variant)
        points = tuple(
            {"step": metrics["step"], "heldout/loss": metrics["loss"]}
            | ({} if seconds is None else {"seconds": metrics["step"] * seconds})
            for metrics in content["heldout"]
        )
        result = {
            "steps": content["steps"],
            "seconds": math.nan if seconds is None else content["steps"] * seconds,
            "heldout_loss": content["heldout"][-1]["loss"],
            "stopped": content["stopped"],
        }
        run = Run(path=path, points=points, config=content["settings"], result=result, notes=())
        outcomes.append(Outcome(trial, run, result))
    return outcomes, missing


def _path(folder: Path, trial: Trial) -> Path:
    return folder / f"{trial.name}.json"


def _refuse_other_settings(path: Path, content: dict[str, Any], settings: dict[str, Any]) -> None:
    if content["fingerprint"] == fingerprint(settings):
        return
    changed = curves.differences([content["settings"], settings])
    lines = [f"{name}: {old} -> {new}" for name, (old, new) in changed.items()]
    raise UserError(f"{path} was made with other settings ({'; '.join(lines)}). Remove it or choose another --workdir")


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
