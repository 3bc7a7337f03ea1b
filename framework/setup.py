"""Set up a run: check everything that can be refused, then build what the loop needs.

Nothing is written before `claim`, except prepared data in the workdir's cache.
"""

import contextlib
import dataclasses
import functools
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any

import jax
from jax.sharding import Mesh

from . import dataset, optimizer
from .base import durations, paths
from .base import workdir as layout
from .base.errors import UserError, told
from .base.paths import Path
from .checkpoint import origin, ownership, store, takeover
from .checkpoint.record import Ranking, Record
from .config import components
from .config.check import check, may_change
from .config.sets import Mixture, heldout_sets, mixture
from .data.feed import Feed, no_epochs
from .distributed import console
from .reporting import profiling, startup
from .reporting.trackers.choice import chosen
from .reporting.watchdog import Watchdog
from .sharding import global_batch, placement
from .step import compilation_cache, compiler_options
from .step.compilation import Steps
from .step.evaluation import of_sets
from .step.program import Program
from .step.schedule import make_schedule
from .step.state import TrainState, make_initial
from .task import notes_of


@dataclasses.dataclass(frozen=True)
class Request:
    """A checked config, with its components and mesh.

    Attributes:
      config: the config.
      workdir: absolute path.
      task: the model.
      data: the data set.
      mixture: further sources of training examples.
      sets: further held-out sets, by name.
      options: of the optimizer.
      mesh: the devices.
      profile_steps: steps to profile.
      trackers: by name, each as the section of a component.
    """

    config: Any
    workdir: Path
    task: Any
    data: Any
    mixture: Mixture
    sets: Mapping[str, Any]
    options: Any
    mesh: Mesh
    profile_steps: range
    trackers: Mapping[str, Any]

    @property
    def cache(self) -> Any:
        """The folder of prepared data."""
        return layout.cache(self.workdir)


@dataclasses.dataclass(frozen=True)
class Blueprint:
    """The parts of a run. None of them changes while the run is in progress.

    Attributes:
      request: the checked config.
      start: the checkpoint that the run starts from, if any.
      record: what the host knows at the start.
      feed: the data.
      total_steps: length of the run.
      in_steps: converts a duration of the config to steps.
      program: layout of the state, and the functions.
      steps: the functions, which are being compiled.
      metrics: names of the held-out metrics that every evaluation measures.
      manifest: describes the arrays of a checkpoint.
      taken: where each array of the first state comes from.
    """

    request: Request
    start: origin.Origin
    record: Record
    feed: Feed
    total_steps: int
    in_steps: Callable[[str], int]
    program: Program
    steps: Steps
    metrics: tuple[str, ...]
    manifest: dict[str, Any]
    taken: takeover.Takeover

    @property
    def ranking(self) -> Ranking:
        """The order of evaluations from best to worst."""
        section = self.request.config.evaluation
        return Ranking.of(section.best_metric, section.best_mode)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a global batch."""
        return self.request.config.batch_size * self.request.data.tokens_per_example


def completed(config: Any, workdir: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Return the result of a workdir whose run is complete, None for others.

    Raises:
      UserError: the config is invalid, or the workdir belongs to another config.
    """
    check(config)
    paths.refuse_unusable("--workdir", workdir)
    place = paths.of(workdir)
    paths.refuse_unusable("--workdir", place)
    try:
        result = ownership.finished(place, config)
    except paths.errors() as error:
        if paths.is_local(place):
            raise
        raise UserError(
            f"--workdir={workdir}: cannot be reached ({told(error):.200}). Check the bucket's name and your access."
        ) from error
    if result is not None:
        console.say(f"{place} is complete after {result['steps']} steps: nothing left to train")
    return result


def examine(config: Any, workdir: str | os.PathLike[str], devices: Sequence[Any] | None) -> Request:
    """Build the components and the mesh of a config.

    Raises:
      UserError: a component, the mesh or an option of the compiler is invalid.
    """
    Ranking.of(config.evaluation.best_metric, config.evaluation.best_mode)
    task, data, options = components.build_all(config)
    profile_steps, trackers = profiling.parse(config.profile_steps), chosen(config)
    mesh = placement.mesh_of(config, devices)
    console.say(f"mesh: {', '.join(f'{axis} {size}' for axis, size in mesh.shape.items())}")
    compiling = compiler_options.choose(config.compiler_options, mesh.devices.flat[0])
    if config.compiler_options:
        compiler_options.compile_with(jax.jit(lambda: 0).lower(), compiling)
    console.say(f"compiler options: {' '.join(map('='.join, compiling.items())) or 'none'}")
    further = mixture(config), heldout_sets(config)
    return Request(config, paths.of(workdir), task, data, *further, options, mesh, profile_steps, trackers)


@contextlib.contextmanager
def surroundings(request: Request) -> Iterator[tuple[Watchdog, Callable[[], None], Executor]]:
    """Hold the workdir, the mesh, the compilation cache, the watchdog and the compiling threads of a run.

    Yields:
      The watchdog, the check of `ownership.hold`, and the threads. At the end they compile no further function.

    Raises:
      UserError: the workdir is in use or cannot be made.
    """
    config, workdir = request.config, request.workdir
    with (
        compilation_cache.kept(workdir, config.compilation_cache),
        ownership.hold(workdir, config.processes.death_seconds) as still_ours,
        jax.set_mesh(request.mesh),
        Watchdog(workdir, **config.watchdog) as watch,
        contextlib.ExitStack() as end,
    ):
        # One for the train step, one for all other functions.
        compilers = ThreadPoolExecutor(2, thread_name_prefix="compiling")
        end.callback(compilers.shutdown, wait=False, cancel_futures=True)
        yield watch, still_ours, compilers


def build(request: Request, compilers: Executor) -> Blueprint:
    """Choose the checkpoint, lay out the state, begin to compile, and open the data. No array of the state is computed.

    The data are prepared while the functions are compiled, unless only the data tell the shapes or the number of steps.

    Raises:
      UserError: a checkpoint, the data, the task or the optimizer cannot be used.
    """
    config, mesh = request.config, request.mesh
    start = origin.find(request.workdir, resume_from=config.resume_from, init_from=config.init_from)
    record = start.record()
    if start.path is not None and start.kind == "resume":
        ownership.continued(start.path, config)
    feed = functools.cache(lambda: _feed(request))
    of_epoch = no_epochs if request.mixture.sources or dataset.grows(request.data) else lambda: feed().examples
    units = durations.Units(config.batch_size, of_epoch, request.data.tokens_per_example)
    total_steps = durations.to_steps(config.duration, units)
    in_steps = functools.partial(durations.to_steps, units=dataclasses.replace(units, total_steps=total_steps))
    example = dataset.spec(request.data)
    batch_spec = global_batch.spec(example, config.batch_size, mesh) if example else feed().batch_spec
    begin = ownership.schedule_begin(start, record.step, config)
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.schedule.begin = begin
    request = dataclasses.replace(request, config=config)
    phase = in_steps(begin)
    if record.step > total_steps or (phase == record.step == total_steps):
        late = f"{start.path} is at step {record.step}, and config.duration={total_steps} steps counts from step 0"
        longer = f"--config.duration='{record.step + total_steps} steps'"
        raise UserError(f"{late}. Increase it, for example {longer}.")
    if phase and start.kind == "resume":
        console.say(f"warm-up and decay begin at step {phase} and end at step {total_steps} (config.schedule.begin)")

    began = takeover.optimizer_began(start, record, config.optimizer.name)
    of_phase = dataclasses.replace(units, total_steps=max(0, total_steps - phase))
    schedule = make_schedule(
        config.schedule.learning_rate,
        warmup_steps=durations.to_steps(config.schedule.warmup, of_phase),
        total_steps=total_steps,
        decay=config.schedule.decay,
        final_fraction=config.schedule.final_fraction,
        begin_step=phase,
    )
    options = takeover.continuing(start, request.options, config.optimizer.name)
    program = Program(config, request.task, options, mesh, batch_spec, schedule, began=began)
    metrics = of_sets(program.metrics(), request.sets)
    judged = of_sets(getattr(request.task, "judged_metrics", ()), request.sets)
    _refuse_unknown_metric(config.evaluation.best_metric, (*metrics, *judged))
    if in_steps(config.samples.every):
        _refuse_samples(request)
    tx, abstract = program.tx, program.abstract
    manifest = takeover.describe(tx, config.optimizer.name, abstract.params, mesh.shape)
    taken = takeover.plan(start, abstract, tx, config.optimizer.name, config.renamed, request.task)
    _refuse_random_frozen(taken)
    initial = make_initial(request.task, tx, batch_spec, abstract, config.seed, taken.fresh)
    steps = Steps(initial, program, compilers)
    _refuse_other_shapes(config.data.name, batch_spec, feed().batch_spec)
    record = _with_data(record, feed().fingerprint, start, may_change(config))
    record = dataclasses.replace(
        record, optimizer_began=began, began=record.began if start.kind == "own" else record.step
    )
    return Blueprint(request, start, record, feed(), total_steps, in_steps, program, steps, metrics, manifest, taken)


def claim(blueprint: Blueprint) -> None:
    """Make the workdir this run's: write its config, set damaged checkpoints aside, show what will be trained."""
    workdir, program = blueprint.request.workdir, blueprint.program
    ownership.claim(workdir, blueprint.request.config)
    origin.set_aside(workdir, blueprint.start)
    treatments = optimizer.treatments(program.tx, program.abstract.params)
    startup.note_start(workdir, blueprint.request.mesh, step=blueprint.record.step, total_steps=blueprint.total_steps)
    rows = startup.parameter_rows(program.abstract.params, program.placements, treatments)
    startup.show_parameters(rows, workdir)
    console.say(startup.memory_line(program.abstract))
    console.say(f"input: {blueprint.feed.reading}")
    for line in notes_of(blueprint.request.task, program.batch_spec):
        console.say(line)
    console.say(str(blueprint.start))
    startup.show_takeover(blueprint.taken, workdir)


def start(blueprint: Blueprint, watch: Watchdog) -> tuple[TrainState, float]:
    """Compute or restore the first state, and wait until the train step is compiled.

    Returns:
      The state, and the seconds that reading the checkpoint took.
    """
    console.say("compiling the train step ...")
    watch.at("compiling", blueprint.record.step)
    fresh = blueprint.steps["initial"]()
    begun = time.perf_counter()
    state = jax.block_until_ready(blueprint.taken.state(fresh))
    seconds = time.perf_counter() - begun
    _ = blueprint.steps["train"]
    return state, seconds


def _feed(request: Request) -> Feed:
    return Feed(request.data, request.mixture, request.sets, request.cache, request.mesh, request.config)


def _with_data(record: Record, fingerprint: str, start: origin.Origin, changeable: Sequence[str]) -> Record:
    """Return the record with the fingerprint of today's data; warn if they have changed since the checkpoint.

    Raises:
      UserError: a workdir would continue on other data, and the config does not allow it.
    """
    if record.data and fingerprint != record.data:
        both = f"fingerprint {record.data} when {start.path} was saved, {fingerprint or 'unknown'} now"
        if start.kind == "own" and "data" not in changeable:
            raise UserError(
                f"the training data have changed ({both}). Restore them, or use a new workdir with resume_from this "
                "one, or allow the change with --config.may_change=data."
            )
        console.say(f"warning: the training data have changed since the checkpoint ({both})")
    return dataclasses.replace(record, data=fingerprint)


def _refuse_other_shapes(name: str, told: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    if dict(told) != dict(given):
        shapes = [{k: f"{v.dtype}{list(v.shape[1:])}" for k, v in sorted(spec.items())} for spec in (told, given)]
        raise UserError(
            f"config.data.name={name}: an example has {shapes[1]}, but its method spec() tells {shapes[0]}. Correct it."
        )


def _refuse_random_frozen(taken: takeover.Takeover) -> None:
    if random := sorted(path for path in taken.fresh if path.startswith(store.FROZEN)):
        raise UserError(
            f"config.init_from: {len(random)} frozen parameters, such as {random[0].removeprefix(store.FROZEN)}, would "
            "keep random initial values. Set it to a workdir, checkpoint or Hugging Face folder that has them."
        )


def _refuse_samples(request: Request) -> None:
    section, task, data = (request.config[key] for key in ("samples", "task", "data"))
    silent = [
        f"config.{key}.name={part.name}"
        for key, part, method in (("task", task, "prefill"), ("data", data, "codec"))
        if not hasattr(getattr(request, key), method)
    ]
    if silent:
        raise UserError(f"config.samples.every={section.every}: {silent[0]} cannot continue texts. Use 0 steps.")
    if not section.prompts:
        raise UserError("config.samples.prompts=(): no text to continue. Give one, or set config.samples.every=0.")


def _refuse_unknown_metric(best_metric: str, names: Sequence[str]) -> None:
    if best_metric not in names:
        raise UserError(f"config.evaluation.best_metric={best_metric!r}: must be one of {', '.join(names)}.")
