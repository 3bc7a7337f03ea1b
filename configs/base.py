"""Start a config file: every knob with its default, `component`, and helpers that the shipped files share."""

from collections.abc import Callable, Mapping
from typing import Any

from ..framework.config.components import component, field_types
from ..framework.config.schema import MAY_CHANGE, get_config

__all__ = ["MAY_CHANGE", "component", "get_config"]

SHAMPOO = "shampax.optimizers.shampoo:ShampooOptions"
ADAMW = "shampax.optimizers.baselines:AdamWOptions"
# Shampoo as it was measured for the models whose configs name it.
WITHOUT_ORTHOGONALIZING = {"orthogonalize": 0, "nesterov": False, "beta2": 0.99, "interval": 10}
# A small vocabulary's embedding gains from a higher rate, under AdamW as under Shampoo.
EMBEDDING_RATE = ((r"(.*/)?[^/]*embed[^/]*(/.*)?", 4.0), (r".*", 1.0))


def of_variants(variants: Mapping[str, Callable[[Any], None]], default: str = "sample") -> Callable[..., Any]:
    """Return the function `get_config` of a file: it returns the default config, changed by a variant."""

    def get_config_of(variant: str = default) -> Any:
        config = get_config()
        variants[variant](config)
        return config

    return get_config_of


def select(config: Any, task: str, data: str, shared: str = "vocab_size", **fields: Any) -> None:
    """Set task and data, given as import strings, with some fields: each goes to the class that declares it.

    Data refer to the task's field `shared`: an override of this field in one of them changes both.
    """
    of_data = {name: fields.pop(name) for name in field_types(data) if name in fields and name != shared}
    config.task = component(task, **fields)
    config.data = component(data, **of_data, **{shared: config.task.get_ref(shared)})


def pace(config: Any, *, evaluate: str, save: str, batches: int = -1) -> None:
    """Set intervals for runs of hours or days."""
    config.log.every = "50 steps"
    config.evaluation.every = evaluate
    config.evaluation.batches = batches
    config.checkpoint.every = save
