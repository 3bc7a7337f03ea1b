"""Which mesh and block size have the lowest predicted step time among those that fit."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ..base.errors import UserError
from ..sharding import chips
from . import planning

LARGEST_TENSOR = 8  # devices that share each product: more than a host has are slow to talk to each other
BLOCK_SIZES = (512, 1_024, 2_048)
_KEPT = 3  # meshes that other block sizes are tried with


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A way to run a config.

    Attributes:
      overrides: what to change in the config, as KEY=VALUE.
      figures: of it; None where it cannot work.
      refusal: why it cannot.
    """

    overrides: tuple[str, ...]
    figures: planning.Figures | None
    refusal: str = ""

    @property
    def seconds(self) -> float:
        """Of a predicted step; infinite where it does not fit, as far as that can be told."""
        if self.figures is None or self.figures.fits is False:
            return math.inf
        return self.figures.predicted.step_seconds or math.inf

    def to_json(self) -> dict[str, Any]:
        """What a program wants to know of it."""
        found = self.figures
        return {
            "overrides": list(self.overrides),
            "fits": False if found is None else found.fits,
            "step_seconds": found and found.predicted.step_seconds,
            "utilisation": found and found.predicted.utilisation,
            "peak": found and found.predicted.peak,
            "refusal": self.refusal,
        }


def search(
    make: Callable[[Sequence[str]], Any], devices: Sequence[Any], kind: str, note: Callable[[str], None]
) -> list[Candidate]:
    """All candidates tried, best first: every mesh with the config's block size, and other sizes on the best of them.

    Args:
      make: the config with overrides, each KEY=VALUE.
      devices: of the mesh.
      kind: of device, that these stand for.
      note: is told what is tried.

    Raises:
      UserError: no public figures of such devices are on file.
    """
    if chips.memory(kind) is None or chips.speeds(kind) is None:
        raise UserError(f"memory and speeds of {kind} are not on file; name a --chip: {', '.join(chips.KINDS)}")
    tried = [_try(make, overrides, devices, kind, note) for overrides in _meshes(make(()), len(devices))]
    ranked = sorted(tried, key=lambda each: each.seconds)
    own = getattr(make(()).optimizer, "block_size", None)
    if own is not None:
        best = [each for each in ranked[:_KEPT] if each.seconds < math.inf] or ranked[:1]
        tried += [
            _try(make, (*each.overrides, f"optimizer.block_size={size}"), devices, kind, note)
            for each in best
            for size in BLOCK_SIZES
            if size != own
        ]
    return sorted(tried, key=lambda each: each.seconds)


def _meshes(config: Any, count: int) -> Iterator[tuple[str, ...]]:
    left = count // math.prod(config.mesh[axis] for axis in config.mesh if axis not in ("data", "fsdp", "tensor"))
    for tensor in _divisors(left):
        if tensor <= LARGEST_TENSOR:
            for fsdp in _divisors(left // tensor):
                yield "mesh.data=-1", f"mesh.fsdp={fsdp}", f"mesh.tensor={tensor}"


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _try(
    make: Callable[[Sequence[str]], Any],
    overrides: tuple[str, ...],
    devices: Sequence[Any],
    kind: str,
    note: Callable[[str], None],
) -> Candidate:
    note(" ".join(overrides))
    try:
        return Candidate(overrides, planning.figures(make(overrides), devices, compiles=False, kind=kind))
    except UserError as error:
        return Candidate(overrides, None, " ".join(str(error).split()))


def text(found: Sequence[Candidate], shown: int = 5) -> str:
    """The best few, with the flags that choose them."""
    good = [each for each in found if each.seconds < math.inf]
    refused = sum(each.figures is None for each in found)
    lines = [
        f"{len(found)} tried, {len(good)} fit, {refused} cannot work; predicted, best first:",
        "  step ms   MFU   peak GB  flags",
    ]
    for each in good[:shown]:
        assert each.figures is not None
        predicted = each.figures.predicted
        flags = " ".join(f"--config.{override}" for override in each.overrides)
        share = f"{predicted.utilisation or 0:.0%}"
        unsure = "" if each.figures.fits else "  (may not fit: see --topology)"
        lines.append(f"  {1e3 * each.seconds:>7,.1f}  {share:>4}  {predicted.peak / 1e9:>8.2f}  {flags}{unsure}")
    if not good:
        smallest = min((each for each in found if each.figures), key=lambda each: _needed(each), default=None)
        if smallest is not None:
            lines.append(
                f"none fits; the smallest needs {_needed(smallest) / 1e9:.2f} GB: {' '.join(smallest.overrides)}"
            )
        else:
            lines.append(f"none works: {found[0].refusal}")
    return "\n".join(lines)


def _needed(candidate: Candidate) -> int:
    assert candidate.figures is not None
    return candidate.figures.needed
