"""Convert the rotary positions of a config.json to knobs and back.

Up to version 4, `transformers` writes rope_theta and rope_scaling; from 5 on one field, rope_parameters, with both,
for models with two kinds of layers by kind. Both are read, and the former is written, which both versions read.
"""

from collections.abc import Mapping
from typing import Any

# Kind of scaling -> field -> its name in the knob; the first ones are needed.
_FIELDS = {
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low",
        "high_freq_factor": "high",
        "original_max_position_embeddings": "original",
    },
    "yarn": {
        "factor": "factor",
        "original_max_position_embeddings": "original",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "attention_factor": "attention_factor",
        "mscale": "mscale",
        "mscale_all_dim": "mscale_all_dim",
        "truncate": "truncate",
    },
}
_OPTIONAL = ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate")


def from_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return rope_theta, rope_scaling and, with two kinds of layers, local_rope_theta.

    Args:
      config: fields of config.json with the defaults of the family.

    Raises:
      ValueError: the scaling is not known.
    """
    given = config.get("rope_parameters") or {}
    whole = given.get("full_attention", given)
    theta = whole.get("rope_theta", config["rope_theta"])
    scaling = _scaling(whole or config.get("rope_scaling") or {}, config)
    found: dict[str, Any] = {"rope_theta": float(theta)} | ({"rope_scaling": scaling} if scaling else {})
    if "rope_local_base_freq" in config:
        local = given.get("sliding_attention") or {}
        found["local_rope_theta"] = float(local.get("rope_theta", config["rope_local_base_freq"]))
        if _scaling(local, config):
            raise ValueError(f"config.json: rope_parameters={given}: layers with a window cannot be scaled here")
    return found


def _scaling(section: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    fields: dict[str, Any] = {x: value for x, value in section.items() if value is not None and x != "rope_theta"}
    fields = {"original_max_position_embeddings": config.get("max_position_embeddings")} | fields
    kind: str = fields.pop("rope_type", fields.pop("type", "default"))
    names = _FIELDS.get(kind)
    if names is None or "original_max_position_embeddings" not in names:
        fields.pop("original_max_position_embeddings")
    if names is None or not set(names) - set(_OPTIONAL) <= set(fields) <= set(names):
        known = "; ".join(f"{kind} {' '.join(names)}".strip() for kind, names in _FIELDS.items())
        raise ValueError(f"config.json: rotary positions {dict(section)}: are not one of: {known}")
    if kind == "default":
        return ""
    return " ".join([kind, *(f"{short}={_text(fields[name])}" for name, short in names.items() if name in fields)])


def to_config(knobs: Mapping[str, Any], *, local: bool) -> dict[str, Any]:
    """Return the fields of config.json; with `local` that of a second kind of layers, too."""
    kind, *parts = knobs["rope_scaling"].split() or ["default"]
    values = dict(part.split("=") for part in parts)
    fields = {name: _number(values[short]) for name, short in _FIELDS[kind].items() if short in values}
    scaling = None if kind == "default" else {"rope_type": kind, **fields}
    of_local = {"rope_local_base_freq": knobs["local_rope_theta"] or knobs["rope_theta"]} if local else {}
    return {"rope_theta": knobs["rope_theta"], "rope_scaling": scaling, **of_local}


def _number(text: str) -> float:
    return int(text) if text.isdecimal() else float(text)


def _text(number: float) -> str:
    return str(int(number)) if float(number).is_integer() else repr(float(number))
