"""Adapters as PEFT stores them: adapter_config.json as knobs, and tensors beside those of the base's family."""

import math
from typing import Any

from .. import lora
from .families import FAMILIES, Config, Knobs, stacks
from .tensors import Tensors

_PREFIX = "base_model.model."  # of the names of tensors
_READ = {"bias", "lora_alpha", "init_lora_weights", "peft_type", "r", "target_modules", "use_rslora"}
# Fields that do not change the logits.
_IGNORED = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "lora_dropout",  # of training
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "task_type",
}
# Other values of init_lora_weights change the base.
_CHOICES = {"peft_type": ("LORA",), "bias": ("none",), "init_lora_weights": (True, False, "gaussian")}


def knobs(adapter: Config, model_type: str) -> Knobs:
    """Return the knobs of adapters that an adapter_config.json determines.

    Raises:
      ValueError: a field is not known or has a value that no knob expresses.
    """
    for field, value in adapter.items():
        if value and field not in _READ | _IGNORED:
            raise ValueError(
                f"adapter_config.json: {field}={value!r}: is not known here, and may change what the adapter computes. "
                "Remove it if it does not"
            )
    for field, choices in _CHOICES.items():
        if adapter.get(field, choices[0]) not in choices:
            raise ValueError(f"adapter_config.json: {field}={adapter[field]!r}: must be one of {choices}")
    rank, alpha, targets = adapter.get("r"), adapter.get("lora_alpha"), adapter.get("target_modules")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        raise ValueError(f"adapter_config.json: r={rank!r}, lora_alpha={alpha!r}: must be a whole and another number")
    ours = _layers(model_type)
    if not isinstance(targets, list) or not {*targets} <= {*ours}:
        raise ValueError(f"adapter_config.json: target_modules={targets!r}: must be a list of {', '.join(ours)}")
    alpha *= math.sqrt(rank) if adapter.get("use_rslora") else 1
    named = {"lora_rank": rank, "lora_alpha": float(alpha)}
    return named | {"lora_targets": tuple(name for layer, name in ours.items() if layer in targets)}


def config(task: Knobs, model_type: str) -> dict[str, Any]:
    """Return the adapter_config.json of the adapters of a task, for a base of a family."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": task["lora_rank"],
        "lora_alpha": task["lora_alpha"],
        "target_modules": [layer for layer, name in _layers(model_type).items() if name in task["lora_targets"]],
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def tensors(task: Knobs, model_type: str) -> dict[str, Tensors]:
    """Return the path of each parameter of adapters -> its tensors, given all knobs of the task."""
    found = {}
    for path, (text, axes, first) in stacks(task, model_type).items():
        layer, _, last = path.rpartition("/")
        if last == "kernel" and layer.rpartition("/")[2] in task["lora_targets"]:
            name, _, order = text.partition(".weight: ")
            stored, _, wanted = order.partition(" -> ")
            outputs, inputs = stored.split()
            into, out = (
                " ".join(axis for axis in wanted.split() if axis in side.split("*")) for side in (inputs, outputs)
            )
            a, b = f"lora_A.weight: R {inputs} -> {into} R", f"lora_B.weight: {outputs} R -> R {out}"
            for parameter, described in ((lora.A, a), (lora.B, b)):
                ranked = axes | {"R": task["lora_rank"]}
                found[f"{layer}/{parameter}"] = Tensors.parse(f"{_PREFIX}{name}.{described}", ranked, first=first)
    return found


def _layers(model_type: str) -> dict[str, str]:
    """Return the name of each dense layer of a family -> its name here."""
    kernels = {path: text for path, text in FAMILIES[model_type].tensors.items() if path.endswith("/kernel")}
    return {text.partition(".weight")[0].rpartition(".")[2]: path.split("/")[-2] for path, text in kernels.items()}
