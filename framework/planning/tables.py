"""Format a plan as tables for a person."""

import math

from .plan import Compiled, Plan


def text(title: str, plan: Plan) -> str:
    """Return the tables: parameters, blocks, bytes, FLOPs, the compiled programs, and whether the plan fits."""
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
    for name, compiled in plan.compiled.items():
        lines += ["", *_compiled(name, compiled)]
    return "\n".join([*lines, "", _verdict(plan)])


def _compiled(name: str, compiled: Compiled) -> list[str]:
    if compiled.error:
        return [f"{name} step: the compiler refuses it: {compiled.error}"]
    lines = [f"{name} step; per device, the content of a loop counts once"]
    for field in ("arguments", "temporaries", "peak"):
        lines.append(f"  {field:<28} {_bytes(getattr(compiled, field))}")
    lines.append(f"  {'FLOPs':<28} {compiled.flops:>12.3e}")
    lines += [
        f"  {kind:<28} {_bytes(size)} of results in {count}, {_bytes(sent).strip()} sent"
        for kind, (count, size, sent) in sorted(compiled.traffic.items())
    ]
    return lines


def _verdict(plan: Plan) -> str:
    has = f", a device has {_bytes(plan.memory).strip()}" if plan.memory is not None else ""
    verdict = {True: "fits", False: "does not fit", None: "unknown whether it fits (see --topology)"}[plan.fits]
    name, size = ("state", plan.state_bytes) if plan.peak is None else ("peak", plan.peak)
    return f"{verdict}: {name} {_bytes(size).strip()}{has}"


def _bytes(size: float) -> str:
    unit, factor = next((each for each in (("GB", 1e9), ("MB", 1e6)) if size >= 0.1 * each[1]), ("kB", 1e3))
    return f"{size / factor:>12,.2f} {unit}"
