"""Rotary positions (RoFormer, arXiv 2104.09864), and scalings of them for rows longer than those of pretraining."""

import math

import jax
import jax.numpy as jnp
import numpy as np

Rotation = tuple[jax.Array, jax.Array]
# Kind -> its numbers with their defaults; None for numbers that must be given.
_SCALINGS: dict[str, dict[str, float | None]] = {
    "linear": {"factor": None},
    "llama3": {"factor": None, "low": 1.0, "high": 4.0, "original": None},
    "yarn": {
        "factor": None,
        "original": None,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "attention_factor": 0.0,
        "mscale": 0.0,
        "mscale_all_dim": 0.0,
        "truncate": 1.0,
    },
}


def parse_scaling(text: str) -> tuple[str, dict[str, float]]:
    """Return kind and numbers of a scaling, such as "llama3 factor=8 low=1 high=4 original=8192"; "" means no scaling.

    `factor` is the longest wavelength's. "linear" stretches all wavelengths (position interpolation, arXiv 2306.15595).
    "llama3" stretches those longer than original / low and keeps those shorter than original / high (Llama 3.1, public
    code of its model). "yarn" (arXiv 2309.00071, sections 3.2 to 3.4) stretches those of fewer than `beta_slow` turns
    in `original` positions and keeps those of more than `beta_fast`. Between these bounds both interpolate. YaRN
    multiplies queries and keys by `attention_factor`, by default 0.1 ln(factor) + 1 or, with `mscale` and
    `mscale_all_dim`, (0.1 mscale ln(factor) + 1) / (0.1 mscale_all_dim ln(factor) + 1); see `score_factor`. Its bounds
    are rounded outwards to whole dimensions unless `truncate` is 0 (gpt-oss).

    Raises:
      ValueError: the text is no such scaling.
    """
    kind, *given = text.split() or [""]
    try:
        numbers = {name: float(value) for name, value in (each.split("=") for each in given)}
        known = _SCALINGS[kind] if kind else {}
        merged = {name: numbers.pop(name, default) for name, default in known.items()}
        if numbers or any(value is None or not 0 <= value < math.inf for value in merged.values()):
            raise ValueError
        if kind and merged["factor"] < 1:  # pyright: ignore[reportOptionalOperand]
            raise ValueError
    except (KeyError, ValueError):
        forms = [
            " ".join((kind, *(f"{name}=" if value is None else f"[{name}={value:g}]" for name, value in known.items())))
            for kind, known in _SCALINGS.items()
        ]
        allowed = "; ".join(f"'{form}'" for form in forms)
        raise ValueError(
            f"task.rope_scaling={text!r}: must be '' or one of {allowed}, with factors of at least 1"
        ) from None
    return kind, merged  # pyright: ignore[reportReturnType]


def rotary_angles(
    positions: jax.Array, head_dim: int, theta: float, scaling: str = "", fraction: float = 1.0
) -> Rotation:
    """Return cosines and sines, float32 [B, T, 1, R / 2], for positions [B, T].

    Args:
      positions: int32.
      head_dim: width of a head.
      theta: longest wavelength / 2 pi.
      scaling: as in `parse_scaling`.
      fraction: R / head_dim, share of the dimensions that are rotated (GPT-NeoX, arXiv 2204.06745, section 2.1).
    """
    rotated = int(head_dim * fraction)
    frequencies = theta ** (-jnp.arange(0, rotated, 2, dtype=jnp.float32) / rotated)
    kind, numbers = parse_scaling(scaling)
    if kind:
        frequencies *= jnp.asarray(_shrinkage(kind, numbers, rotated, theta), jnp.float32)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if kind == "yarn":
        attention_factor = numbers["attention_factor"] or _attention_factor(numbers)
        return attention_factor * cos, attention_factor * sin
    return cos, sin


def score_factor(scaling: str) -> float:
    """Return the factor of latent attention's scores, 1 but for YaRN: (0.1 mscale_all_dim ln(factor) + 1)^2.

    It is that of DeepSeek-V2 and V3 (public code of their models), of whose queries and keys only a part is rotated and
    thereby multiplied by `attention_factor`.
    """
    kind, numbers = parse_scaling(scaling)
    return _growth(numbers["factor"], numbers["mscale_all_dim"]) ** 2 if kind == "yarn" else 1.0


def _attention_factor(numbers: dict[str, float]) -> float:
    if numbers["mscale"] and numbers["mscale_all_dim"]:
        return _growth(numbers["factor"], numbers["mscale"]) / _growth(numbers["factor"], numbers["mscale_all_dim"])
    return _growth(numbers["factor"], 1.0)


def _growth(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1


def _shrinkage(kind: str, numbers: dict[str, float], rotated: int, theta: float) -> np.ndarray:
    """Return the factors of the frequencies theta^(-2 i / rotated), [rotated / 2]: 1 where they stay."""
    pairs = np.arange(rotated // 2)
    turns = numbers.get("original", 0) / (2 * math.pi) * theta ** (-2 * pairs / rotated)
    if kind == "linear":
        kept = np.zeros(len(pairs))
    elif kind == "llama3":
        kept = np.clip((turns - numbers["low"]) / (numbers["high"] - numbers["low"]), 0, 1)
    else:
        bounds = (numbers["original"] / (2 * math.pi * numbers[name]) for name in ("beta_fast", "beta_slow"))
        first, last = (rotated * math.log(bound) / (2 * math.log(theta)) for bound in bounds)
        if numbers["truncate"]:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, rotated - 1)
        kept = 1 - np.clip((pairs - first) / max(last - first, 1e-3), 0, 1)
    return kept + (1 - kept) / numbers["factor"]


def rotate(x: jax.Array, rotation: Rotation) -> jax.Array:
    """Rotate the pairs (x[i], x[i + R/2]), i < R/2, of x [B, T, heads, D] by their positions' angles, in float32."""
    cos, sin = rotation
    rotated = 2 * cos.shape[-1]
    first, second = jnp.split(x[..., :rotated].astype(jnp.float32), 2, axis=-1)
    parts = [first * cos - second * sin, second * cos + first * sin]
    if rotated < x.shape[-1]:
        parts.append(x[..., rotated:].astype(jnp.float32))
    return jnp.concatenate(parts, axis=-1).astype(x.dtype)
