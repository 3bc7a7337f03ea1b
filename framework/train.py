"""Train a model from a config in a workdir: the story of a run, from top to bottom."""

import math
import os
from collections.abc import Sequence
from typing import Any

import jax

from . import hooks, setup
from .base import cpu_backend
from .base.errors import TrainingStopped
from .checkpoint import ownership
from .loop import Run, storage_faults, train_to_end
from .reporting.profiling import Profile


def train(config: Any, workdir: str | os.PathLike[str], *, devices: Sequence[Any] | None = None) -> dict[str, Any]:
    """Train as `config` says, in `workdir`. The same call resumes a run, or returns the result of a complete one.

    On the first SIGINT or SIGTERM it finishes its step, saves a checkpoint and returns.

    Args:
      config: an `ml_collections.ConfigDict` from a `get_config`.
      workdir: created if it does not exist; from then on it belongs to this config.
      devices: the devices to train on; None for all devices of the job.

    Returns:
      The content of `result.json`. `stopped` is None, or the name of the signal that ended the run early. Held-out
      metrics are those of the last evaluation, None before the first.

    Raises:
      UserError: the config or the workdir is invalid. Nothing has been written, except prepared data.
      TrainingStopped: the run could not continue, for example because the guard skipped too many consecutive steps. A
        checkpoint is saved if that was possible.
    """
    cpu_backend.avoid_wrong_fusions()
    result = setup.completed(config, workdir)
    if result is not None:
        return result
    request = setup.examine(config, workdir, devices)
    with setup.surroundings(request) as (watch, still_ours, compilers):
        blueprint = setup.build(request, compilers)
        profile = Profile(
            request.profile_steps,
            request.workdir,
            watch,
            begin=blueprint.record.step,
            total_steps=blueprint.total_steps,
        )
        still_ours()
        setup.claim(blueprint)
        with blueprint.feed.ahead():
            state, seconds_reading = setup.start(blueprint, watch)
            run = Run(blueprint, state, watch, still_ours)
            del state
            if blueprint.taken.path is not None:
                run.saver.note_restored(blueprint.taken.path, seconds_reading)
            with run, profile:
                train_to_end(run, hooks.of(blueprint, profile))
                watch.at("checkpoint", run.step)
                with storage_faults("stop"):
                    run.saver.confirm()
        return finish(run)


def finish(run: Run) -> dict[str, Any]:
    """Write result.json and return its content.

    Raises:
      TrainingStopped: the guard, the optimizer's service or a lack of rows has ended the run.
    """
    workdir, ended = run.blueprint.request.workdir, run.trouble()
    result = ownership.finish(workdir, _result(run, ended))
    saved = f"a checkpoint of step {run.step} is saved in {workdir}"
    if ended:
        raise TrainingStopped(f"{ended}; {saved}")
    if isinstance(run.stopped, Exception):
        raise TrainingStopped(f"{run.stopped}; {saved}") from run.stopped
    return result


def _result(run: Run, ended: str | None) -> dict[str, Any]:
    blueprint, record, state = run.blueprint, run.record, run.state
    heldout = record.last.values if record.last else dict.fromkeys(blueprint.metrics)
    diagnostics, _ = run.steps["diagnose"](state.opt_state)
    early = str(run.stopped) if run.stopped and not run.at_end else None
    return {name: value for name, value in heldout.items() if name != "loss"} | {
        "steps": record.step,
        "seconds": round(record.seconds, 3),
        "tokens": record.tokens,
        "heldout_loss": heldout["loss"],
        "best_heldout_loss": record.best.values["loss"] if record.best else None,
        "optimizer": type(blueprint.request.options).__name__,
        "skipped_steps": int(state.guard.skipped),
        "clipped_steps": int(state.guard.clipped),
        "refreshes": int(diagnostics.get("optimizer/refreshes", 0)),
        "devices": blueprint.request.mesh.size,
        "parameters": sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state.params)),
        "seconds_to_first_step": run.journal.seconds_to_first_step,
        "stopped": ended or early,
    }
