__version__ = "0.1.0"

from .core.gpu import read_gpus
from .core.host import read_memory
from .core.manager import (ResourceBusy, ResourceConflict, ResourceManager, ResourceStatus, ResourceType, ResourceUnavailable,
                           WorkerState)
from .core.validation import ValidationAction, validate_resources_for_job

__all__ = ["ResourceBusy", "ResourceConflict", "ResourceManager", "ResourceStatus", "ResourceType", "ResourceUnavailable",
           "ValidationAction", "WorkerState", "read_gpus", "read_memory", "validate_resources_for_job"]
