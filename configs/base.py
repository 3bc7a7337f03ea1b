"""What config files start from: every knob with its default, and `component` to choose task, data and optimizer."""

from ..framework.config.components import component
from ..framework.config.schema import MAY_CHANGE, get_config

__all__ = ["MAY_CHANGE", "component", "get_config"]
