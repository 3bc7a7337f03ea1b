"""Train a config's model in a plain jitted loop with the same parameters, batches and schedule for every optimizer.

Each run is one file, so that an interrupted search can be resumed.
"""

import dataclasses
import functools
import json
import math
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from ..framework import dataset
from ..framework.base import durations, paths
from ..framework.base.errors import UserError
from ..framework.base.json_files import read_object
from ..framework.config import components
from ..framework.data import pipeline
from ..framework.reporting import curves
from ..framework.reporting.runs import Run, measured
from ..framework.step.evaluation import evaluate
from ..framework.step.schedule import make_schedule
from ..framework.task import settled
from ..optimizers.plan import patterns
from .contestants import CONTESTANTS, EMBEDDINGS, with_settings
from .outcomes import Outcome
from .trials import Trial

# Sections of a config that this loop uses; the others configure the trainer.
SECTIONS = ("task", "data", "batch_size", "duration", "schedule")


class Workload:
    """Task, data and schedule of a config, on one device.

    Args:
      config: the config.
      cache: folder of prepared data.
      others: options of further optimizers, by name.

    Attributes:
      configured: options of the config's optimizer; those of all contestants derive from its Shampoo.
      total_steps: length of a run in steps.
      settings: everything except the optimizer that determines the outcome of a run, as JSON.
    """

    def __init__(self, config: Any, cache: Path, others: Mapping[str, Any] | None = None):
        task, data = components.build(config.task), components.build(config.data)
        data.prepare(cache)
        self._task, self._source = task, data.examples("train", cache)
        self._share = {"global_batch_size": config.batch_size, "rows": range(config.batch_size)}
        self._augment = dataset.augment(data)
        heldout = {"limit": config.evaluation.batches, "sample": config.evaluation.sample}
        self._heldout: list[Any] = list(
            pipeline.HeldoutBatches(data.examples("heldout", cache), **heldout, **self._share)
        )
        self.configured = components.build(config.optimizer)
        self._others = others or {}
        self.settings = {name: config.to_dict()[name] for name in SECTIONS} | {"heldout": heldout}

        units = durations.Units(config.batch_size, lambda: len(self._source), data.tokens_per_example)
        self.total_steps = durations.to_steps(config.duration, units)
        units = dataclasses.replace(units, total_steps=self.total_steps)
        self.evaluate_every = durations.to_steps(config.evaluation.every, units)
        self._schedule = functools.partial(
            make_schedule,
            1.0,
            warmup_steps=durations.to_steps(config.schedule.warmup, units),
            total_steps=self.total_steps,
            final_fraction=config.schedule.final_fraction,
        )
        self._spec = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), self.batches(0)[0])
        variables = jax.eval_shape(task.init, jax.random.key(0), self._spec)
        self._axis_names = task.logical_axes(variables)["params"]
        self._embeds = any(re.fullmatch(EMBEDDINGS, path) for path in patterns.paths(variables["params"]))
        self._evaluate = jax.jit(self._metrics)

    def options(self, trial: Trial) -> Any:
        """Return the options of a trial: of a contestant, of one of `others`, or of the config for another name."""
        if trial.variant in CONTESTANTS:
            options = CONTESTANTS[trial.variant].options(self.configured)
        else:
            options = self._others.get(trial.variant, self.configured)
        settings = dict(trial.settings)
        if not self._embeds:
            settings.pop("embeddings", None)
        return with_settings(options, settings)

    def chosen(self, trial: Trial) -> tuple[Any, str]:
        """Return all that a trial's program depends on: its options, and the decay of the learning rate."""
        return self.options(trial), dict(trial.settings).get("schedule", self.settings["schedule"]["decay"])

    def batches(self, seed: int) -> pipeline.Batches:
        """Return the training batches of a seed, indexed by step."""
        return pipeline.Batches(self._source, seed=seed, augment=self._augment, **self._share)

    def program(self, options: Any, decay: str = "") -> "Program":
        """Return jitted training with these options. It compiles once for all rates and seeds.

        `decay` is that of the learning rate; "" is the config's.
        """
        schedule = self._schedule(decay=decay or self.settings["schedule"]["decay"])

        def optimizer(peak: jax.Array | float) -> optax.GradientTransformation:
            return options.build(lambda count: peak * schedule(count), mesh=None, axis_names=self._axis_names)

        def start(seed: jax.Array) -> tuple[Any, Any]:
            # The same key as in the trainer.
            variables = self._task.init(jax.random.fold_in(jax.random.key(seed), 2**32 - 1), self._spec)
            return variables, optimizer(0.0).init(variables["params"])

        def step(
            variables: Any, state: Any, batch: Any, peak: jax.Array, seed: jax.Array, number: jax.Array
        ) -> tuple[Any, Any, jax.Array]:
            others = dict(variables)
            params = others.pop("params")
            key = jax.random.fold_in(jax.random.key(seed), number)

            def loss(params: Any) -> tuple[jax.Array, Any]:
                value, (model_state, _) = self._task.loss({"params": params, **others}, batch, key=key, train=True)
                return value, model_state

            (value, model_state), gradients = jax.value_and_grad(loss, has_aux=True)(params)
            updates, state = optimizer(peak).update(gradients, state, params)
            params = optax.apply_updates(params, updates)
            return {"params": params, **settled(self._task, model_state)}, state, value

        return Program(jax.jit(start), jax.jit(step, donate_argnums=(0, 1)))

    def heldout_metrics(self, variables: Any) -> dict[str, float]:
        """Return the task's metrics over the held-out batches."""
        return evaluate(self._evaluate, variables, self._heldout)

    def _metrics(self, variables: Any, batch: Any) -> Any:
        return self._task.loss(variables, batch, key=jax.random.key(0), train=False)[1][1]


class Program(NamedTuple):
    """Jitted training with one optimizer.

    Attributes:
      start: `seed -> (variables, state)`, the task's variables and the optimizer's state.
      step: `(variables, state, batch, peak learning rate, seed, number) -> (variables, state, loss)`; it donates the
        first two.
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
    variables, state = program.start(trial.seed)
    batches = workload.batches(trial.seed).from_step(0)
    rate, seed = np.float32(dict(trial.settings)["rate"]), np.uint32(trial.seed)
    losses: list[float] = []
    heldout: list[dict[str, float]] = []
    for number in range(workload.total_steps + 1):
        finite = not losses or math.isfinite(losses[-1])
        if number == workload.total_steps or not finite or number % workload.evaluate_every == 0:
            heldout.append({"step": number} | workload.heldout_metrics(variables))
        if number == workload.total_steps or not finite:
            break
        variables, state, loss = program.step(variables, state, next(batches), rate, seed, np.uint32(number))
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
    options, decay = workload.chosen(trial)
    chosen = {
        "workload": workload.settings,
        "decay": decay,
        "optimizer": {"name": type(options).__name__} | dataclasses.asdict(options),
        "learning_rate": dict(trial.settings)["rate"],
        "seed": trial.seed,
    }
    return json.loads(json.dumps(chosen))


def run(workload: Workload, trial: Trial, folder: Path, programs: dict[Any, Program]) -> dict[str, Any]:
    """Return the content of the trial's file in `folder`; train the trial first if it has none.

    `programs` keeps the program that was compiled last.

    Raises:
      UserError: the file has other settings.
    """
    path, settings = folder / f"{trial.name}.json", settings_of(workload, trial)
    content = read_object(path)
    if content is not None:
        if content["settings"] != settings:
            changed = curves.differences([content["settings"], settings])
            lines = "; ".join(f"{name}: {old} -> {new}" for name, (old, new) in changed.items())
            raise UserError(f"{path} was made with other settings ({lines}). Remove it or choose another --workdir")
        return content
    chosen = workload.chosen(trial)
    if chosen not in programs:
        programs.clear()
        programs[chosen] = workload.program(*chosen)
    made = {"variant": trial.variant, "trial": dict(trial.settings), "seed": trial.seed}
    made |= {"settings": settings} | train(workload, programs[chosen], trial)
    folder.mkdir(parents=True, exist_ok=True)
    paths.write_text(paths.of(path), json.dumps(made, allow_nan=False) + "\n")
    ending = made["stopped"] or f"held-out {made['heldout'][-1]['loss']:.4f}"
    print(f"{trial.name}: {ending} after {made['steps']} steps, {made['seconds']:.0f} s", file=sys.stderr, flush=True)
    return made


def read(folder: Path) -> list[Outcome]:
    """Return all runs in a folder."""
    outcomes = []
    for path in sorted(folder.glob("*.json")):
        content = read_object(path)
        if content is None:
            continue
        trial = Trial.of(content["variant"], content["seed"], **content["trial"])
        *_, last = points = [
            {name if name == "step" else f"heldout/{name}": value for name, value in metrics.items()}
            for metrics in content["heldout"]
        ]
        result = {name.removeprefix("heldout/"): value for name, value in last.items()}
        result |= {"steps": content["steps"], "stopped": content["stopped"]}
        run = Run(path=path, points=measured(points), config=content["settings"], result=result)
        outcomes.append(Outcome(trial, run, result))
    return outcomes


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
