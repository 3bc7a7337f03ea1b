"""Training, from a config and a workdir to a result: the whole story, to be read from top to bottom."""

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from . import dataset, optimizer
from .base import cpu_backend, durations, paths
from .base import workdir as layout
from .base.durations import Period
from .base.errors import TrainingStopped, UserError
from .checkpoint import evaluations, origin, ownership, store, takeover
from .checkpoint.record import Record
from .checkpoint.store import Checkpoints, SaveError
from .config import components
from .config.check import check
from .data import pipeline
from .distributed import agreement, console
from .distributed.signals import StopSignals
from .reporting import progress, startup
from .reporting.clock import Clock
from .reporting.journal import Journal
from .reporting.metrics import MetricsWriter
from .reporting.profiling import Profile
from .reporting.profiling import parse as parse_steps
from .reporting.watchdog import Watchdog
from .sharding import partitioning
from .sharding.global_batch import Share
from .step import compilation_cache, refusals
from .step.evaluation import compiled_at_first_call, evaluate, predict
from .step.program import Program
from .step.schedule import make_schedule
from .step.state import TrainState, initial_arrays
from .step.steps import make_diagnosis, make_eval_step, make_predict_step
from .task import judge_of

SPIKE = "loss spike"  # stops the loop, and not the run


def train(config: Any, workdir: str | Path, *, devices: Sequence[Any] | None = None) -> dict[str, Any]:
    """Train as `config` says, in `workdir`; the same call again resumes, or returns the result of a complete run.

    The first SIGINT or SIGTERM makes it finish its step, save a checkpoint and return.

    Args:
      config: an `ml_collections.ConfigDict` from a `get_config`, with whatever changes.
      workdir: made if it does not exist; from then on it belongs to this config.
      devices: what to train on; None takes every device of the job.

    Returns:
      The content of `result.json`. `stopped` is None, or the name of the signal that ended the run early.
      Held-out metrics are those of the last evaluation, None before the first.

    Raises:
      UserError: something in the config or the workdir cannot work. Nothing has been written, or where only the
        data could tell, no more than their cache in the workdir.
      TrainingStopped: the guard has skipped too many steps in a row; a checkpoint is saved.
    """
    # Set-up: what can be refused is refused before anything is written
    cpu_backend.avoid_wrong_fusions()
    check(config)
    paths.refuse_bucket("workdir", workdir)
    workdir = Path(workdir).expanduser().absolute()
    task, data, options = (components.build(section) for section in (config.task, config.data, config.optimizer))
    profile_steps = parse_steps(config.profile_steps)
    ownership.refuse_foreign(workdir, config)
    finished = ownership.finished(workdir, config)
    if finished is not None:
        console.say(f"{workdir} is complete after {finished['steps']} steps: nothing left to train")
        return finished

    # Mesh
    mesh = partitioning.make_mesh(config.mesh, devices)
    partitioning.check_rules(config.sharding_rules, mesh)
    partitioning.check_batch(config.batch_size, config.microbatches, mesh)
    console.say(f"mesh: {', '.join(f'{axis} {size}' for axis, size in mesh.shape.items())}")

    with (
        compilation_cache.kept(workdir, config.compilation_cache),
        ownership.hold(workdir),
        jax.set_mesh(mesh),
        Watchdog(workdir, config.watchdog_seconds) as watch,
    ):
        start = origin.find(workdir, resume_from=config.resume_from, init_from=config.init_from)
        record = start.record()

        # Data: batch = batches[step], the same rows in the same order on any mesh
        cache = workdir / layout.CACHE
        agreement.first(lambda: data.prepare(cache))
        record = with_data(record, dataset.fingerprint(data, cache), start, config.may_change)
        source = data.examples("train", cache)
        share = Share(config.batch_size, mesh)
        wanted = {"global_batch_size": config.batch_size, "rows": share.rows}
        batches = pipeline.Batches(source, seed=config.seed, augment=dataset.augment(data), **wanted)
        heldout_source = data.examples("heldout", cache)
        heldout = pipeline.HeldoutBatches(heldout_source, limit=config.evaluation.batches, **wanted)
        to_devices = share.to_devices
        batch_spec = jax.tree.map(as_spec, to_devices(batches[0]))

        units = durations.Units(config.batch_size, len(source), data.tokens_per_example)
        total_steps = durations.to_steps(config.duration, units)
        in_steps = functools.partial(durations.to_steps, units=dataclasses.replace(units, total_steps=total_steps))
        tokens_per_step = config.batch_size * data.tokens_per_example
        refuse_overrun(record.step, total_steps, start)
        profile = Profile(profile_steps, workdir, watch, begin=record.step, total_steps=total_steps)

        # State: its shapes and where it lies; nothing is computed yet
        program = Program.of(config, task, mesh, batch_spec)
        schedule = make_schedule(
            config.schedule.learning_rate,
            warmup_steps=in_steps(config.schedule.warmup),
            total_steps=total_steps,
            decay=config.schedule.decay,
            final_fraction=config.schedule.final_fraction,
            begin_step=in_steps(config.schedule.begin),
        )
        began = takeover.optimizer_began(start, record, config.optimizer.name)

        tx, abstract, train_step = program.assemble(options, schedule, began=began)
        treatments = optimizer.treatments(tx, abstract.params)
        eval_step = make_eval_step(task, abstract, mesh)
        with refusals.of(task):
            metric_names = list(jax.eval_shape(eval_step, abstract.variables, batch_spec))
        refuse_unknown_metric(config.evaluation.best_metric, metric_names)
        manifest = takeover.describe(tx, config.optimizer.name, abstract.params, treatments, mesh.shape)
        taken = takeover.plan(start, abstract, tx, config.optimizer.name, config.renamed)

        # The workdir is this run's from here on
        ownership.claim(workdir, config)
        origin.set_aside(workdir, start)
        agreement.first(functools.partial(evaluations.forget_after, workdir, record.step))
        startup.show_parameters(startup.parameter_rows(abstract.params, program.placements, treatments), workdir)
        console.say(startup.memory_line(abstract))
        console.say(str(start))
        startup.show_takeover(taken, workdir)

        watch.at("reading the checkpoint" if taken.path else "initialising", record.step)
        fresh = initial_arrays(task, tx, batch_spec, abstract, config.seed, taken.fresh)
        reading = time.perf_counter()
        state = jax.block_until_ready(taken.state(fresh))
        reading = time.perf_counter() - reading
        record = dataclasses.replace(
            record, optimizer_began=began, began=record.began if start.kind == "own" else record.step
        )

        # Compile, apart from the loop, so that it is not taken for training time
        console.say("compiling the train step ...")
        watch.at("compiling", record.step)
        with refusals.of(task):
            lowered_step = train_step.lower(abstract, batch_spec)
        compiled_step = lowered_step.compile()
        diagnose = make_diagnosis(tx, abstract, mesh).lower(abstract.opt_state).compile()
        judge = judge_of(task)
        compiling = functools.partial(watch.during, "compiling")
        evaluate_batch = compiled_at_first_call(eval_step, compiling)
        predict_batch = compiled_at_first_call(make_predict_step(judge, abstract, mesh), compiling) if judge else None

        def heldout_batches() -> Iterator[Any]:
            for batch in heldout:
                watch.at("evaluation", record.step)
                yield to_devices(batch)

        def judged(variables: Any) -> dict[str, float]:
            """The metrics of a task that judges all held-out examples together; {} for others."""
            if not (judge and predict_batch):
                return {}
            examples = min(len(heldout_source), len(heldout) * config.batch_size)
            predictions = predict(predict_batch, variables, heldout_batches(), examples)
            values, line = judge.judge(predictions, dataset.decoder(data, cache))
            if line:
                console.say(line)
            return values

        service = optimizer.service(tx, abstract.params)

        # Loop: evaluate, save, train up to the next pause
        evaluation, saving = Period(in_steps(config.evaluation.every)), Period(in_steps(config.checkpoint.every))
        judging = Period(in_steps(config.evaluation.judge_every))
        clock = Clock(record.seconds)
        pace = {"total_steps": total_steps, "tokens_per_step": tokens_per_step}

        def milestone(step: int) -> bool:
            """Whether the run saves after a step whatever happens, and may go back to it."""
            return saving.due(step) or (config.guard.on_spike == "rollback" and step == record.began)

        saver = Checkpoints(
            workdir,
            keep_last=config.checkpoint.keep_last,
            keep_best=config.checkpoint.keep_best,
            best_metric=config.evaluation.best_metric,
            milestone=milestone,
        )
        if taken.path is not None:
            saver.note_restored(taken.path, reading)
        journal = Journal(
            MetricsWriter(workdir, after_step=record.step, evaluated=record.evaluated)
            if jax.process_index() == 0
            else None,
            progress.Speedometer(mesh, flops_per_step=task.flops(batch_spec), **pace),
            clock,
            (service, saver),
            start=record,
            period=Period(in_steps(config.log.every)),
            **pace,
        )
        upcoming = map(to_devices, batches.from_step(record.step + record.batches_passed_over))
        stopped = None
        with StopSignals() as signals, journal, contextlib.closing(saver), contextlib.closing(service), profile:
            state = dataclasses.replace(state, opt_state=service.start(state.opt_state))

            def stop_reason(step: int) -> str | None:
                return signals.reason(step) or trouble(journal, record, config.guard) or spike(journal, config.guard)

            def save() -> None:
                watch.at("checkpoint", record.step)
                whole = dataclasses.replace(state, opt_state=service.with_in_flight(state.opt_state))
                with storage_faults(config.checkpoint.on_error):
                    saver.save(whole, record, manifest)

            while True:
                at_end = record.step == total_steps
                refuse_alone(stopped)
                if at_end or stopped or milestone(record.step):
                    save()
                if (at_end or evaluation.due(record.step)) and not record.evaluated and not stopped:
                    values = evaluate(evaluate_batch, state.variables, heldout_batches())
                    if at_end or judging.due(record.step):
                        values |= judged(state.variables)
                    record = record.with_evaluation(values, config.evaluation.best_metric)
                    journal.evaluated(record.step, values, best=record.best == record.last)
                    saver.evaluated(record)
                    if record.best == record.last and config.checkpoint.keep_best:
                        save()
                if at_end or stopped:
                    break
                pause = min(period.next(record.step) for period in (evaluation, saving, profile))
                profile.begin(record.step)
                with clock:
                    steps = range(record.step, min(pause, total_steps))
                    state, step, stopped = advance(
                        compiled_step, diagnose, service, state, upcoming, steps, journal, watch, stop_reason
                    )
                profile.end(step)
                record = dataclasses.replace(
                    record, step=step, seconds=clock.seconds, tokens=journal.tokens(step), skipped=journal.skipped
                )
                if spike(journal, config.guard) and not trouble(journal, record, config.guard):
                    stopped = None if stopped == SPIKE else stopped
                    del state
                    watch.at("checkpoint", record.step)
                    with storage_faults("stop"):
                        saver.confirm()
                    point = origin.newest_of(workdir, milestone)
                    record = point.record().rolled_back(record, spike=journal.first_spike or step)
                    agreement.first(functools.partial(forget_after, workdir, record.step))
                    state = takeover.plan(point, abstract, tx, config.optimizer.name, config.renamed).state({})
                    state = dataclasses.replace(state, opt_state=service.start(state.opt_state))
                    upcoming = map(to_devices, batches.from_step(record.step + record.batches_passed_over))
                    journal.went_back(record, limit=config.guard.max_rollbacks)
            watch.at("checkpoint", record.step)
            with storage_faults("stop"):
                saver.confirm()

        # Result
        ended = trouble(journal, record, config.guard)
        heldout_metrics = record.last.values if record.last else dict.fromkeys(metric_names)
        diagnostics = diagnose(state.opt_state)
        result = {name: value for name, value in heldout_metrics.items() if name != "loss"} | {
            "steps": record.step,
            "seconds": round(record.seconds, 3),
            "tokens": record.tokens,
            "heldout_loss": heldout_metrics["loss"],
            "best_heldout_loss": record.best.values["loss"] if record.best else None,
            "optimizer": type(options).__name__,
            "skipped_steps": int(state.guard.skipped),
            "clipped_steps": int(state.guard.clipped),
            "loss_spikes": int(state.guard.spikes) + record.rollbacks,
            "rollbacks": record.rollbacks,
            "batches_passed_over": record.batches_passed_over,
            "refreshes": int(diagnostics["optimizer/refreshes"]) if "optimizer/refreshes" in diagnostics else 0,
            "devices": mesh.size,
            "parameters": sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state.params)),
            "seconds_to_first_step": journal.seconds_to_first_step,
            "stopped": ended or (str(stopped) if stopped and record.step < total_steps else None),
        }
    result = ownership.finish(workdir, result)
    if ended:
        raise TrainingStopped(f"{ended}; a checkpoint after step {record.step} is saved in {workdir}")
    if isinstance(stopped, optimizer.ServiceError):
        raise TrainingStopped(f"{stopped}; a checkpoint after step {record.step} is saved in {workdir}") from stopped
    return result


def advance(
    train_step: Callable[..., Any],
    diagnose: Callable[..., Any],
    service: optimizer.Service,
    state: TrainState,
    batches: Iterator[Any],
    steps: range,
    journal: Journal,
    watch: Watchdog,
    stop_reason: Callable[[int], str | None],
) -> tuple[TrainState, int, str | optimizer.ServiceError | None]:
    """Train from step `steps.start` to `steps.stop`, or until there is a reason to stop.

    The host runs one step ahead of what it has seen: it dispatches a step and then waits for the one before.

    Returns:
      The state, the number of steps it has taken, and why it stopped early, if it did.
    """
    step, stopped, unread = steps.start, None, None
    for number in steps:
        watch.at("host roots", number)
        try:
            state = dataclasses.replace(state, opt_state=service.install(state.opt_state))
        except optimizer.ServiceError as error:
            stopped = error
            break
        watch.at("data", number)
        batch = next(batches)
        watch.at("step", number)
        with jax.profiler.StepTraceAnnotation("train", step_num=number + 1):
            state, metrics = train_step(state, batch)
        service.take(state.opt_state)
        step = number + 1
        if journal.due(step):
            metrics |= diagnose(state.opt_state)
        if unread is not None:
            journal.step_done(*unread)
        unread = (step, metrics)
        stopped = stop_reason(step)
        if stopped:
            break
    if unread is not None:
        journal.step_done(*unread)
    return state, step, stopped or stop_reason(step)


@contextlib.contextmanager
def storage_faults(on_error: str) -> Iterator[None]:
    """Where a checkpoint cannot be saved, say so and go on, or with "stop" raise TrainingStopped."""
    try:
        yield
    except SaveError as error:
        if on_error == "stop":
            raise TrainingStopped(f"{error}; mend the storage, and the same command goes on from there") from error
        console.say(f"warning: {error}; training goes on")


def as_spec(array: jax.Array) -> jax.ShapeDtypeStruct:
    """Shape, type and place of an array."""
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)


def spike(journal: Journal, guard: Any) -> str | None:
    """What stops the loop for the run to go back to a checkpoint, or None."""
    return SPIKE if guard.on_spike == "rollback" and journal.first_spike is not None else None


def trouble(journal: Journal, record: Record, guard: Any) -> str | None:
    """Why the guard ends the run, or None."""
    if spike(journal, guard) and record.rollbacks >= guard.max_rollbacks:
        return (
            f"step {journal.first_spike} has a loss spike after {record.rollbacks} rollbacks (guard.max_rollbacks "
            f"{guard.max_rollbacks}); in a new workdir, use a lower schedule.learning_rate or a larger "
            "guard.spike_factor, with resume_from this one"
        )
    limit = guard.max_consecutive_skips
    if journal.most_consecutive_skips < limit:
        return None
    return (
        f"{journal.most_consecutive_skips} steps in a row were skipped for a loss or gradient that was not finite, or "
        f"a loss spike (guard.max_consecutive_skips {limit}); in a new workdir, use a lower schedule.learning_rate, a "
        "gradient_clip or, against spikes, a larger guard.spike_factor, with resume_from this one"
    )


def refuse_unknown_metric(best_metric: str, names: Sequence[str]) -> None:
    """Raise UserError if the task does not report the metric that checkpoints are to be ranked by."""
    if best_metric not in names:
        raise UserError(f"evaluation.best_metric {best_metric!r} is none of the task's metrics: {', '.join(names)}")


def refuse_alone(stopped: Any) -> None:
    """Raise TrainingStopped where this process has to stop and the others of the run know nothing of it.

    They would never come to save a checkpoint with it; `processes.Group` ends them.
    """
    if isinstance(stopped, optimizer.ServiceError) and jax.process_count() > 1:
        raise TrainingStopped(f"{stopped}; the same command goes on from the newest checkpoint") from stopped


def forget_after(workdir: Path, last: int) -> None:
    """Delete the checkpoints of steps after `last`, which a run goes back to: it comes by them in another way."""
    evaluations.forget_after(workdir, last)
    steps = [int(path.name) for path in store.finished(workdir)]
    store.prune(workdir, {step for step in steps if step <= last})


def with_data(record: Record, fingerprint: str, start: origin.Origin, may_change: Sequence[str]) -> Record:
    """The record of a run on these data; where it began on others, that is said.

    Raises:
      UserError: a workdir's own run would go on with other data, and the config does not say that they may change.
    """
    if record.data and fingerprint != record.data:
        both = f"{record.data} when {start.path} was saved, {fingerprint or 'unknown'} now"
        if start.kind == "own" and "data" not in may_change:
            raise UserError(
                f"the training data have changed (fingerprint {both}); restore them, go on in another workdir with "
                'resume_from this one, or add "data" to config.may_change'
            )
        console.say(f"warning: the training data are others than before (fingerprint {both})")
    return dataclasses.replace(record, data=fingerprint)


def refuse_overrun(step: int, total_steps: int, start: origin.Origin) -> None:
    """Raise UserError if a run would begin after its own end."""
    if step > total_steps:
        raise UserError(
            f"{start.path} has {step} steps behind it, but config.duration is {total_steps} steps; use more"
        )
