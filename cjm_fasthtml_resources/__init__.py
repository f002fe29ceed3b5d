__version__ = "0.2.0"

from typing import TYPE_CHECKING, Any

from .core.display import show_with

if TYPE_CHECKING:
    from .core.conflict import ResourceBusy, ResourceConflict, ResourceUnavailable
    from .core.gpu import read_gpus
    from .core.manager import ResourceManager
    from .core.memory import read_memory
    from .core.monitor import ResourceMonitor
    from .core.out_of_memory import explain_out_of_memory
    from .core.resources import ResourceStatus, ResourceType, WorkerState
    from .core.validation import ValidationAction, validate_resources_for_job
    from .ui.panel import ResourcePanel

__all__ = ["ResourceBusy", "ResourceConflict", "ResourceManager", "ResourceMonitor", "ResourcePanel", "ResourceStatus",
           "ResourceType", "ResourceUnavailable", "ValidationAction", "WorkerState", "explain_out_of_memory",
           "read_gpus", "read_memory", "validate_resources_for_job"]

_PLACES = {   # imported when they are asked for
    "ResourceBusy": "core.conflict", "ResourceConflict": "core.conflict", "ResourceUnavailable": "core.conflict",
    "ResourceManager": "core.manager", "ResourceMonitor": "core.monitor", "ResourcePanel": "ui.panel",
    "ResourceStatus": "core.resources", "ResourceType": "core.resources", "WorkerState": "core.resources",
    "ValidationAction": "core.validation", "validate_resources_for_job": "core.validation",
    "explain_out_of_memory": "core.out_of_memory", "read_gpus": "core.gpu", "read_memory": "core.memory"}


def __getattr__(name: str) -> Any:
    if name not in _PLACES: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)


def __dir__() -> list[str]: return sorted({*globals(), *__all__})


def _show(value: Any) -> str:
    from .ui.cards import html_of  # imported when the first value is shown
    return html_of(value)


show_with(_show)
