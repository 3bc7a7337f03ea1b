"""Format a plan as tables for a person."""

import math

from .plan import Compiled, Plan


def text(title: str, plan: Plan) -> str:
    """Return the tables: parameters, blocks, bytes, FLOPs, the compiled programs, MFU, and whether the plan fits."""
    axes = ", ".join(f"{axis} {size}" for axis, size in plan.mesh.items() if size > 1) or "one device"
    total = sum(elements for _, elements in plan.parameters.values())
    lines = [f"{title} on {math.prod(plan.mesh.values())} x {plan.device_kind} ({axes})", "", f"parameters  {total:,}"]
    for kind, (tensors, elements) in plan.parameters.items():
        lines.append(f"  {kind:<24} {elements:>18,}  in {tensors} tensors")
    if plan.blocks:
        lines += ["", "buckets                          blocks  slots on a device  padding"]
        lines += [
            f"  {row['name']:<28} {row['blocks']:>8,} {row['slots on a device']:>18,} {row['padding']:>8.1%}"
            for row in plan.blocks
        ]
    lines += ["", "bytes on each device"]
    lines += [f"  {kind:<28} {_bytes(size)}" for kind, size in plan.bytes.items()]
    lines.append(f"  {'between two steps, in all':<28} {_bytes(plan.state_bytes)}")
    lines += ["", f"model FLOPs of a step on each device, by the task's formula: {plan.model_flops:.3e}"]
    if plan.square_flops:
        lines.append(f"  with whole squares of attention: {plan.square_flops:.3e}")
    for name, compiled in plan.compiled.items():
        lines += ["", *_compiled(name, compiled, plan)]
    return "\n".join([*lines, *_mfu(plan), "", _verdict(plan)])


def _compiled(name: str, compiled: Compiled, plan: Plan) -> list[str]:
    if compiled.error:
        return [f"{name} step: the compiler refuses it: {compiled.error}"]
    lines = [f"{name} step, on each device"]
    for field in ("arguments", "temporaries", "peak"):
        size = getattr(compiled, field)
        lines.append(f"  {field:<28} {_bytes(size)}{_share(size, plan.memory)}")
    work, timed = compiled.work, plan.peak_flops is not None
    lines.append(
        f"  {'work':<28} {'ms' if timed else '':>10} {'products ms' if timed else '':>12} {'FLOPs':>12} {'bytes':>15}"
    )
    for part, figures in sorted(work.parts.items(), key=lambda each: (-each[1].seconds, -each[1].bytes)):
        times = (f"{1e3 * each:,.1f}" if timed else "" for each in (figures.seconds, figures.product_seconds))
        lines.append("  {:<28} {:>10} {:>12} {:>12.3e} {}".format(part, *times, figures.flops, _bytes(figures.bytes)))
    if work.traffic:
        lines.append(
            f"  {'collectives':<28} {'ms' if timed else '':>10} {'number':>12} {'sent':>15} {'to other slices':>16}"
        )
    for kind, figures in sorted(work.traffic.items()):
        time = f"{1e3 * figures.seconds:,.1f}" if timed else ""
        crossing = _bytes(figures.crossing) if figures.crossing else ""
        lines.append(f"  {kind:<28} {time:>10} {figures.count:>12,.0f} {_bytes(figures.sent)} {crossing}")
    return lines + [f"  assumed: {each}" for each in work.assumed]


def _mfu(plan: Plan) -> list[str]:
    bound = plan.mfu(plan.model_flops)
    if bound is None or plan.step_seconds is None:
        return []
    train = plan.compiled["train"].work
    line = (
        f"a train step takes at least {1e3 * plan.step_seconds:,.1f} ms, of them {1e3 * train.network_seconds:,.1f} ms"
    )
    lines = ["", f"{line} for collectives if none overlaps", f"MFU at most {bound:.1%}"]
    if (square := plan.mfu(plan.square_flops)) is not None:
        lines[-1] += f"; counting whole squares of attention {square:.1%}"
    return lines


def _verdict(plan: Plan) -> str:
    has = f", a device has {_bytes(plan.memory).strip()}" if plan.memory is not None else ""
    verdict = {True: "fits", False: "does not fit", None: "unknown whether it fits (see --topology)"}[plan.fits]
    name, size = ("state", plan.state_bytes) if plan.peak is None else ("peak", plan.peak)
    return f"{verdict}: {name} {_bytes(size).strip()}{has}"


def _share(size: float, memory: int | None) -> str:
    return f"  {size / memory:.1%} of the device" if memory else ""


def _bytes(size: float) -> str:
    unit, factor = next((each for each in (("GB", 1e9), ("MB", 1e6)) if size >= 0.1 * each[1]), ("kB", 1e3))
    return f"{size / factor:>12,.2f} {unit}"
