"""What a config needs before anyone pays for it: parameters, bytes and FLOPs of each device, and the compiled step."""

import dataclasses
import math
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import optax

from ...optimizers.plan import patterns
from ...optimizers.residence import HOST_KIND
from .. import dataset, optimizer
from ..base.errors import UserError
from ..config import components
from ..config.check import check
from ..sharding import chips, partitioning
from ..step.program import Assembly, Program
from ..step.schedule import Schedule
from . import collectives, device_program, flop_count, prediction

SOLVER_ITERATIONS = 12  # of coupled Newton, assumed; matrices of condition 1e4 take 8 to 13
_HOST = "statistics in host memory"
# Mesh axes with which predicted peaks were far below the compiler's, and by how much at most (docs/results.md).
UNDERRATED, UNDERRATED_BY = ("expert",), 1.3


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of the train step.

    Attributes:
      seconds: taken to compile.
      cpu_seconds: of all cores together, however busy the machine.
      error: why it could not be compiled, "" where it was; then there is nothing else.
      arguments, temporaries, peak: bytes on each device; the new state is written over the old one.
      traffic: kind of collective -> (how many, bytes of their results on a device); what is in a loop counts once.
    """

    seconds: float
    cpu_seconds: float
    error: str = ""
    arguments: int = 0
    temporaries: int = 0
    peak: int = 0
    traffic: Mapping[str, tuple[int, int]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Figures:
    """A config on a mesh.

    Attributes:
      mesh: axis -> devices.
      device_kind: of the devices, or of those that they stand for.
      parameters: treatment -> (tensors, elements).
      blocks: of each bucket: name, blocks, shape, slots on a device, share of the elements that is padding.
      bytes: what a device holds between two steps, by kind, and the gradient during one.
      model_flops: of a step on each device, by the task's own count.
      optimizer_flops: likewise, of the optimizer's products as traced.
      traced_flops: likewise, of all products of the step as traced, recomputation included: what devices do twice is in
        the predicted ones alone.
      memory: bytes of a device, None where it is not known.
      predicted: what a step takes, without compiling it.
      host_cores: of all hosts together, to solve the roots; None where they do not, or the time of a step is not known.
      compiled: None where nothing was compiled.
    """

    mesh: Mapping[str, int]
    device_kind: str
    parameters: Mapping[str, tuple[int, int]]
    blocks: Sequence[Mapping[str, Any]]
    bytes: Mapping[str, int]
    model_flops: float
    optimizer_flops: float
    traced_flops: float
    memory: int | None
    predicted: prediction.Prediction
    host_cores: float | None
    compiled: Compiled | None

    @property
    def state_bytes(self) -> int:
        """On a device between two steps."""
        return _kept(self.bytes)

    @property
    def needed(self) -> int:
        """Bytes of a device: the compiler's peak, or the predicted one."""
        return self.compiled.peak if self.compiled and not self.compiled.error else self.predicted.peak

    @property
    def activations(self) -> int:
        """Bytes of a device that a step needs, as predicted, besides the state."""
        return self.predicted.peak - self.state_bytes

    @property
    def fits(self) -> bool | None:
        """None where it cannot be told."""
        if self.compiled and self.compiled.error:
            return False
        if self.memory is None or self.needed <= self.memory < self.needed * self.margin:
            return None
        return self.needed <= self.memory

    @property
    def margin(self) -> float:
        """How many times the bytes that are needed it may take, as far as it is known."""
        compiled = self.compiled is not None and not self.compiled.error
        return 1.0 if compiled or not any(self.mesh.get(axis, 1) > 1 for axis in UNDERRATED) else UNDERRATED_BY

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain dicts."""
        return dataclasses.asdict(self) | {
            "state_bytes": self.state_bytes,
            "activations": self.activations,
            "needed": self.needed,
            "fits": self.fits,
        }


def figures(config: Any, devices: Sequence[Any], *, compiles: bool, kind: str = "") -> Figures:
    """The figures of a config on some devices, which need not be of this machine.

    Args:
      config: a complete one.
      devices: of the mesh.
      compiles: whether the train step is compiled for them; minutes, for large models.
      kind: of device, that these stand for; by default they stand for themselves.

    Raises:
      UserError: the config does not fit the devices, or its data set does not tell shapes.
    """
    check(config)
    task, data, options = (components.build(section) for section in (config.task, config.data, config.optimizer))
    mesh = partitioning.make_mesh(config.mesh, devices)
    partitioning.check_rules(config.sharding_rules, mesh)
    partitioning.check_batch(config.batch_size, config.microbatches, mesh)
    example = dataset.spec(data)
    if example is None:
        raise UserError(
            f"{config.data.name} does not tell the shapes of an example; give it a method spec(), see docs/data.md"
        )
    peak = config.schedule.learning_rate
    rate = Schedule(optax.constant_schedule(peak), peak)
    with jax.set_mesh(mesh):
        sharding = partitioning.batch_sharding(mesh)
        batch = {
            name: jax.ShapeDtypeStruct((config.batch_size, *leaf.shape), leaf.dtype, sharding=sharding)
            for name, leaf in example.items()
        }
        program = Program.of(config, task, mesh, batch)
        assembly = program.assemble(options, rate)
        tx, params = assembly.tx, assembly.abstract.params
        update = flop_count.count(tx.update, params, assembly.abstract.opt_state, params, while_turns=SOLVER_ITERATIONS)
        traced = flop_count.count(assembly.step, assembly.abstract, batch, while_turns=SOLVER_ITERATIONS)
        kind = kind or devices[0].device_kind
        held = _bytes(assembly, batch)
        model_flops = task.flops(batch) / mesh.size
        predicted = prediction.predict(
            assembly.step,
            assembly.abstract,
            batch,
            kept=sum(map(_tiled, jax.tree.leaves((assembly.abstract, batch)))),
            model_flops=model_flops,
            kind=kind,
            turns=SOLVER_ITERATIONS,
        )
        cores = None
        if getattr(options, "refresh", "") == "host" and predicted.step_seconds:
            seconds = prediction.host_seconds(tx.plan(params).buckets)
            cores = prediction.host_cores(seconds, config.optimizer.interval, predicted.step_seconds)
        return Figures(
            mesh=dict(mesh.shape),
            device_kind=kind,
            parameters=_by_treatment(params, optimizer.treatments(tx, params)),
            blocks=_block_table(tx, params),
            bytes=held,
            model_flops=model_flops,
            optimizer_flops=update,
            traced_flops=traced,
            memory=chips.memory(kind),
            predicted=predicted,
            host_cores=cores,
            compiled=_compile(assembly, batch) if compiles else None,
        )


def suggestions(found: Figures, config: Any) -> list[str]:
    """What to change where it does not fit, most promising first; [] where it does, or nobody can tell."""
    if found.fits is not False or found.memory is None:
        return []
    held = found.state_bytes + found.bytes["gradients"]
    lines = []
    if held > 0.5 * found.memory and found.mesh.get("data", 1) > 1:
        lines.append(f"mesh.fsdp {2 * config.mesh.fsdp} instead of {config.mesh.fsdp}: parameters in more parts")
    if held < found.memory:
        task = config.task
        if task.get("remat") == "none":
            lines.append("task.remat full instead of none: activations are computed again in the backward pass")
        if task.get("compute_dtype") == "float32":
            lines.append("task.compute_dtype bfloat16 instead of float32")
        parts = config.microbatches
        lines.append(f"microbatches {2 * parts} instead of {parts}: activations of half as many examples at a time")
    statistics, roots = (found.bytes.get(kind, 0) for kind in ("statistics", "roots"))
    if statistics + roots > 0.1 * found.memory:
        size = config.optimizer.block_size
        lines.append(f"optimizer.statistics_memory host instead of device: {statistics / 1e9:.2f} GB leave it")
        lines.append(f"optimizer.block_size {size // 2} instead of {size}: less to keep for long sides")
    return lines or ["a larger slice, or a smaller batch or model"]


def _kept(found: Mapping[str, int]) -> int:
    return sum(size for kind, size in found.items() if kind not in ("gradients", _HOST))


def _by_treatment(params: Any, treatments: Mapping[str, str]) -> dict[str, tuple[int, int]]:
    found: dict[str, tuple[int, int]] = {}
    for path, leaf in zip(patterns.paths(params), jax.tree.leaves(params), strict=True):
        kind = treatments.get(path, "all alike").split(" ")[0]
        tensors, elements = found.get(kind, (0, 0))
        found[kind] = (tensors + 1, elements + math.prod(leaf.shape))
    return found


def _block_table(tx: Any, params: Any) -> list[dict[str, Any]]:
    if not hasattr(tx, "plan"):
        return []
    rows = []
    for bucket in tx.plan(params).buckets:
        real = sum(math.prod(leaf.view.lengths) * leaf.view.stacked for leaf in bucket.leaves)
        held = bucket.slots.size * math.prod(bucket.shape)
        rows.append(
            {
                "name": bucket.name,
                "blocks": bucket.blocks,
                "shape": list(bucket.shape),
                "slots on a device": bucket.slots.shape[1],
                "padding": 1 - real / held,
            }
        )
    return rows


def _bytes(assembly: Assembly, batch: Mapping[str, Any]) -> dict[str, int]:
    abstract = assembly.abstract
    found = {"parameters": _held(abstract.params), "gradients": _held(abstract.params)}
    for path, leaf in zip(patterns.paths(abstract.opt_state), jax.tree.leaves(abstract.opt_state), strict=True):
        kind = _HOST if leaf.sharding.memory_kind == HOST_KIND else _kind(path)
        found[kind] = found.get(kind, 0) + _held(leaf)
    if abstract.averaging:
        found["iterate of the average"] = _held(abstract.averaging)
    found["model state and guard"] = _held((abstract.model_state, abstract.guard, abstract.step))
    found["batch"] = _held(dict(batch))
    return found


# (regex over the path in the optimizer's state, what it is), first match wins
_KINDS = (
    (r"(.*/)?(momentum|mu|trace|m)(/.*)?", "momentum"),
    (r"(.*/)?(second_moment|nu|v|v_row|v_col|sum_of_squares)(/.*)?", "second moments"),
    (r"(.*/)?(statistics|gathered)(/.*)?", "statistics"),
    (r"(.*/)?roots?(/.*)?", "roots"),
    (r".*", "other optimizer state"),
)


def _kind(path: str) -> str:
    return patterns.first_match(_KINDS, path)


def _held(tree: Any) -> int:
    """Bytes of a device."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _tiled(leaf: Any) -> int:
    """Bytes of a device's own memory, with the padding of the layout."""
    if leaf.sharding.memory_kind == HOST_KIND:
        return 0
    return device_program.tiled(leaf.sharding.shard_shape(leaf.shape), leaf.dtype.itemsize)


def _compile(assembly: Assembly, batch: Any) -> Compiled:
    begun, begun_cpu = time.perf_counter(), time.process_time()
    try:
        compiled = assembly.step.lower(assembly.abstract, batch).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        found = re.search(r"Ran out of memory.*", str(error))
        reason = found[0] if found else str(error).splitlines()[0]
        return Compiled(time.perf_counter() - begun, time.process_time() - begun_cpu, error=reason)
    memory: Any = compiled.memory_analysis()
    traffic: dict[str, tuple[int, int]] = {}
    for each in collectives.find(compiled.as_text() or ""):
        count, size = traffic.get(each.kind, (0, 0))
        traffic[each.kind] = (count + 1, size + each.bytes)
    return Compiled(
        time.perf_counter() - begun,
        time.process_time() - begun_cpu,
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        peak=memory.peak_memory_in_bytes,
        traffic=traffic,
    )
