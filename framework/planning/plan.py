"""Compute a config's needs on a mesh: parameters, blocks, bytes and FLOPs of each device, and the compiled programs.

Without compilation nothing is allocated: all tables come from shapes and shardings.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from ...optimizers.plan import patterns
from .. import dataset, optimizer
from ..base.errors import UserError
from ..config import components
from ..config.check import check
from ..sharding import chips, global_batch, meshes, placement
from ..step.compiler_options import compile_with
from ..step.program import Program
from ..task import kernel_cost_of, sparse_of, square_flops_of
from . import cost

PROGRAMS = ("train", "evaluate", "predict")

# (regex over the path in the optimizer's state, kind of state), first match wins
_KINDS = (
    (r"(.*/)?(momentum|mu|trace|m)(/.*)?", "momentum"),
    (r"(.*/)?(second_moment|nu|v|v_row|v_col|sum_of_squares)(/.*)?", "second moments"),
    (r"(.*/)?(statistics|gathered)(/.*)?", "statistics"),
    (r"(.*/)?roots?(/.*)?", "roots"),
    (r".*", "other optimizer state"),
)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """Memory and work of a compiled program on each device.

    Attributes:
      error: the compiler's reason if the program does not fit; all fields below are then 0.
      arguments, temporaries, peak: bytes.
      work: time by class of work, and collectives.
    """

    error: str = ""
    arguments: int = 0
    temporaries: int = 0
    peak: int = 0
    work: cost.Work = dataclasses.field(default_factory=cost.Work)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A config's needs on a mesh.

    Attributes:
      mesh: axis -> number of devices.
      device_kind: kind of the devices.
      parameters: treatment -> (tensors, elements).
      blocks: per bucket: name, blocks, shape, slots on a device, share of the elements that is padding.
      bytes: per device and kind: what stays between two steps, and the gradient during a step.
      model_flops: FLOPs of a step on each device, by the task's formula.
      memory: bytes of a device, None if not known.
      compiled: program ("train", "evaluate" and, if the task has it, "predict") -> its figures, up to the first
        that does not fit; empty without compilation.
      square_flops: `model_flops` with the whole T x T square of attention, None if the task does not tell it.
      peak_flops: bfloat16 FLOP/s of a device, None if not known.
    """

    mesh: Mapping[str, int]
    device_kind: str
    parameters: Mapping[str, tuple[int, int]]
    blocks: Sequence[Mapping[str, Any]]
    bytes: Mapping[str, int]
    model_flops: float
    memory: int | None
    compiled: Mapping[str, Compiled]
    square_flops: float | None = None
    peak_flops: float | None = None

    @property
    def state_bytes(self) -> int:
        """Bytes that stay on each device between two steps."""
        return sum(size for kind, size in self.bytes.items() if kind != "gradients")

    @property
    def peak(self) -> int | None:
        """Peak bytes of a device, None without compiled programs. The whole state stays in memory during each."""
        if not self.compiled or any(each.error for each in self.compiled.values()):
            return None
        return max(each.peak + max(0, self.state_bytes - each.arguments) for each in self.compiled.values())

    @property
    def step_seconds(self) -> float | None:
        """Least time of a train step, None if it is not known. Collectives do not overlap with other work."""
        train = self.compiled.get("train", Compiled())
        return train.work.seconds + train.work.network_seconds if self.peak_flops and train.work.parts else None

    def mfu(self, flops: float | None) -> float | None:
        """Return the MFU that the train step cannot exceed if it is to compute `flops`, None if it is not known."""
        if not flops or not self.peak_flops or not self.step_seconds:
            return None
        return flops / self.peak_flops / self.step_seconds

    @property
    def fits(self) -> bool | None:
        """Whether a device has enough memory, None if unknown. Without compilation it is at best unknown."""
        if any(each.error for each in self.compiled.values()):
            return False
        if self.memory is not None and max(self.peak or 0, self.state_bytes) > self.memory:
            return False
        return None if self.peak is None else True

    def to_json(self) -> dict[str, Any]:
        """Return all figures as plain dicts."""
        derived = {"state_bytes": self.state_bytes, "peak": self.peak, "fits": self.fits}
        derived |= {"step_seconds": self.step_seconds, "mfu_bound": self.mfu(self.model_flops)}
        derived |= {"mfu_bound_whole_square": self.mfu(self.square_flops)}
        return dataclasses.asdict(self) | derived


def make_plan(config: Any, devices: Sequence[Any], *, compiles: Collection[str] = ()) -> Plan:
    """Plan a config for some devices, which need not belong to this machine.

    Args:
      config: a complete config.
      devices: devices of the mesh.
      compiles: names of the programs to compile for these devices, of `PROGRAMS`; minutes for a large model.

    Raises:
      UserError: the config does not fit the devices, or its data set does not tell shapes.
    """
    check(config)
    task, data, options = components.build_all(config)
    mesh = placement.mesh_of(config, devices)
    example = dataset.spec(data)
    if example is None:
        raise UserError(
            f"config.data.name={config.data.name}: the data set does not tell the shapes of an example. Give it a "
            "method spec(), see docs/data.md."
        )
    with jax.set_mesh(mesh):
        batch = global_batch.spec(example, config.batch_size, mesh)
        rate = optax.constant_schedule(config.schedule.learning_rate)
        program = Program(config, task, options, mesh, batch, rate)
        tx, state = program.tx, program.abstract
        kind = devices[0].device_kind
        compiled: dict[str, Compiled] = {}
        for name, lowered in program.lower() if compiles else ():
            if name in compiles and not any(each.error for each in compiled.values()):
                compiled[name] = _compile(lowered, program, mesh)
            if len(compiled) == len(compiles):
                break
        square = square_flops_of(task, batch)
        return Plan(
            mesh=dict(mesh.shape),
            device_kind=kind,
            parameters=_by_treatment(state.params, optimizer.treatments(tx, state.params)),
            blocks=_block_table(tx, state.params),
            bytes=_bytes_by_kind(state, batch, getattr(sparse_of(task), "sparse", ())),
            model_flops=task.flops(batch) / mesh.size,
            square_flops=square and square / mesh.size,
            peak_flops=chips.peak_flops(kind),
            memory=chips.memory(kind),
            compiled=compiled,
        )


def _by_treatment(params: Any, treatments: Mapping[str, str]) -> dict[str, tuple[int, int]]:
    found: dict[str, tuple[int, int]] = {}
    for path, leaf in zip(patterns.paths(params), jax.tree.leaves(params), strict=True):
        kind = treatments.get(path, "all alike").split(" ")[0]
        tensors, elements = found.get(kind, (0, 0))
        found[kind] = (tensors + 1, elements + math.prod(leaf.shape))
    return found


def _block_table(tx: Any, params: Any) -> list[dict[str, Any]]:
    rows = []
    for bucket in (bucket for layout in optimizer.layouts(tx, params).values() for bucket in layout.plan.buckets):
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


def _bytes_by_kind(state: Any, batch: Any, sparse: Collection[str]) -> dict[str, int]:
    held = meshes.bytes_on_device
    params = zip(patterns.paths(state.params), jax.tree.leaves(state.params), strict=True)
    found = {"parameters": held(state.params), "gradients": held([x for path, x in params if path not in sparse])}
    for path, leaf in zip(patterns.paths(state.opt_state), jax.tree.leaves(state.opt_state), strict=True):
        kind = patterns.first_match(_KINDS, path)
        found[kind] = found.get(kind, 0) + held(leaf)
    found["frozen parameters"] = held(state.frozen)
    found["average"] = held(state.averaging)
    found["model state and guard"] = held((state.model_state, state.guard, state.step))
    found["batch"] = held(batch)
    return {kind: size for kind, size in found.items() if size}


def _compile(lowered: jax.stages.Lowered, program: Program, mesh: Mesh) -> Compiled:
    try:
        compiled = compile_with(lowered, program.compiler_options)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        found = re.search(r"Ran out of memory.*", str(error))
        return Compiled(found[0] if found else str(error).splitlines()[0])
    memory: Any = compiled.memory_analysis()
    kind = mesh.devices.flat[0].device_kind
    return Compiled(
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        peak=memory.peak_memory_in_bytes,
        work=cost.judge(
            compiled.as_text() or "",
            chips.chip(kind),
            tpu=kind.startswith("TPU"),
            kernel=functools.partial(kernel_cost_of, program.task),
            islands=_islands(mesh),
        ),
    )


def _islands(mesh: Mesh) -> list[int]:
    """Return for each device the number of its slice or, of GPUs, of its process, which is a node's."""
    if meshes.SLICE_AXIS in mesh.shape:
        return np.repeat(np.arange(mesh.shape[meshes.SLICE_AXIS]), mesh.size // mesh.shape[meshes.SLICE_AXIS]).tolist()
    gpus = mesh.devices.flat[0].platform in ("gpu", "cuda")
    return [device.process_index if gpus else 0 for device in mesh.devices.flat]
