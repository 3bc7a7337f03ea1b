"""The figures of a plan as a person reads them."""

import math
from collections.abc import Sequence

from .planning import SOLVER_ITERATIONS, UNDERRATED, Figures


def text(title: str, found: Figures, suggestions: Sequence[str]) -> str:
    """Several lines: parameters, blocks, bytes, FLOPs, what the compiler says, and whether it fits."""
    devices = math.prod(found.mesh.values())
    axes = ", ".join(f"{axis} {size}" for axis, size in found.mesh.items() if size > 1) or "one device"
    total = sum(elements for _, elements in found.parameters.values())
    lines = [f"{title} on {devices} x {found.device_kind} ({axes})", "", f"parameters  {total:,}"]
    for kind, (tensors, elements) in found.parameters.items():
        lines.append(f"  {kind:<24} {elements:>18,}  in {tensors} tensors")
    if found.blocks:
        lines += ["", "buckets                          blocks  slots on a device  padding"]
        lines += [
            f"  {row['name']:<28} {row['blocks']:>8,} {row['slots on a device']:>18,} {row['padding']:>8.1%}"
            for row in found.blocks
        ]
    lines += ["", "bytes on each device"]
    lines += [f"  {kind:<28} {_bytes(size)}" for kind, size in found.bytes.items() if size]
    lines.append(f"  {'between two steps, in all':<28} {_bytes(found.state_bytes)}")
    lines.append(f"  {'activations and scratch':<28} {_bytes(found.activations)}  predicted, gradients included")
    lines.append(f"  {'peak':<28} {_bytes(found.predicted.peak)}  predicted")
    lines += [
        "",
        "FLOPs of a step on each device",
        f"  {'model, the task says':<28} {found.model_flops:>12.3e}",
        f"  {'products of the optimizer':<28} {found.optimizer_flops:>12.3e}"
        f"  {found.optimizer_flops / found.model_flops:.1%} of the model's"
        f" ({SOLVER_ITERATIONS} iterations of each solver assumed)",
    ]
    lines += ["", *_predicted(found), "", *_compiled(found), *_verdict(found)]
    return "\n".join([*lines, *(f"  try {line}" for line in suggestions)])


def _predicted(found: Figures) -> list[str]:
    predicted = found.predicted
    lines = [
        f"  {'all products, as traced':<28} {found.traced_flops:>12.3e}  recomputation and optimizer included",
        f"  {'all products, as partitioned':<28} {predicted.flops:>12.3e}  with those that several devices make",
        "",
        "collectives of a step, predicted, bytes of their results on a device",
        *(f"  {kind:<28} {_bytes(size)}  in {count:,.0f}" for kind, (count, size) in sorted(predicted.traffic.items())),
    ]
    if predicted.compute_seconds is None or predicted.network_seconds is None or predicted.step_seconds is None:
        return [*lines, "", f"no public speeds of {found.device_kind} are on file: no time of a step"]
    lines += [
        "",
        f"least time of a step at the public figures of {found.device_kind}: a roofline, no measurement",
        f"  {'products and memory':<28} {1e3 * predicted.compute_seconds:>12,.1f} ms",
        f"  {'collectives':<28} {1e3 * predicted.network_seconds:>12,.1f} ms",
        f"  {'step':<28} {1e3 * predicted.step_seconds:>12,.1f} ms  MFU {predicted.utilisation:.0%} at most",
    ]
    if found.host_cores is not None:
        lines.append(f"  {'cores for roots on the hosts':<28} {found.host_cores:>12,.1f}     of all hosts together")
    return lines


def _compiled(found: Figures) -> list[str]:
    compiled = found.compiled
    if compiled is None:
        return []
    if compiled.error:
        return [f"the compiler refuses it after {compiled.seconds:.0f} s: {compiled.error}"]
    lines = [
        f"compiled in {compiled.seconds:.0f} s, {compiled.cpu_seconds:.0f} s of a core; bytes on each device",
        f"  {'arguments':<28} {_bytes(compiled.arguments)}",
        f"  {'temporaries':<28} {_bytes(compiled.temporaries)}",
        f"  {'peak':<28} {_bytes(compiled.peak)}",
        "collectives in the program (what is in a loop counts once), bytes of their results on a device",
    ]
    lines += [f"  {kind:<28} {_bytes(size)}  in {count}" for kind, (count, size) in sorted(compiled.traffic.items())]
    return lines


def _verdict(found: Figures) -> list[str]:
    if found.memory is None:
        return []
    whose = "the compiler's peak" if found.compiled and not found.compiled.error else "predicted peak"
    verdict = {True: "fits", False: "does not fit", None: "may not fit"}[found.fits]
    lines = [f"{verdict}: {whose} {found.needed / 1e9:.2f} GB, a device has {found.memory / 1e9:.2f} GB"]
    if found.margin > 1:
        axes = " or ".join(UNDERRATED)
        lines.append(f"  with mesh axes {axes} the compiler may take {found.margin:g} times as much: see --topology")
    return lines


def _bytes(size: float) -> str:
    unit, factor = next((each for each in (("GB", 1e9), ("MB", 1e6)) if size >= 0.1 * each[1]), ("kB", 1e3))
    return f"{size / factor:>12,.2f} {unit}"
