__version__ = "0.1.0"

from typing import TYPE_CHECKING, Any

from .core.conflict import ResourceBusy, ResourceConflict, ResourceUnavailable
from .core.display import show_with
from .core.gpu import read_gpus
from .core.manager import ResourceManager
from .core.memory import read_memory
from .core.resources import ResourceStatus, ResourceType, WorkerState

if TYPE_CHECKING:
    from .core.monitor import ResourceMonitor
    from .core.out_of_memory import explain_out_of_memory
    from .core.validation import ValidationAction, validate_resources_for_job
    from .ui.panel import ResourcePanel

__all__ = ["ResourceBusy", "ResourceConflict", "ResourceManager", "ResourceMonitor", "ResourcePanel", "ResourceStatus",
           "ResourceType", "ResourceUnavailable", "ValidationAction", "WorkerState", "explain_out_of_memory",
           "read_gpus", "read_memory", "validate_resources_for_job"]

_LATER = {   # imported when they are asked for
    "ResourceMonitor": "core.monitor", "ResourcePanel": "ui.panel",
    "ValidationAction": "core.validation", "validate_resources_for_job": "core.validation",
    "explain_out_of_memory": "core.out_of_memory"}


def __getattr__(name: str) -> Any:
    if name not in _LATER: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module
    return getattr(import_module(f"{__name__}.{_LATER[name]}"), name)


def _show(value: Any) -> str:
    from .ui.cards import html_of  # imported when the first value is shown
    return html_of(value)


show_with(_show)
